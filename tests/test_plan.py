"""The planner: against what was measured here, what others have published, closed forms, and bad input."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study_spot
from eqm_dist.config import SIZES, Config
from eqm_dist.options import parse
from eqm_dist.planner import memory, speed
from eqm_dist.planner.hardware import GPUS
from eqm_dist.planner.model import Work
from eqm_dist.planner.plan import daly, goodput, plan, young
from eqm_dist.presets import PRESETS
from eqm_dist.train.memory import model_state_bytes
from tests import commands

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
XL = Work.of(PRESETS["eqm-xl2"](), 1)


def measured() -> dict[str, Any]:
    (path,) = RESULTS.glob("memory_*.json")
    return json.loads(path.read_text())


def small(**options: Any) -> Work:
    """The model of benchmarks/bench_memory.py: SiT-S/2 on 4x32x32 latents with two EMAs."""
    config: dict[str, Any] = {
        "data": {"latent_shape": [4, 32, 32], "num_classes": 1000},
        "model": {"size": "S", "patch_size": 2},
        "optimizer": {"ema_decays": [0.999, 0.9999]},
        "evaluation": {"every": 0},
        "train": {"global_batch": 4},
    }
    return replace(Work.of(parse(Config, config, "test"), 1), **options)


# --- memory, against the record of benchmarks/bench_memory.py ---


@pytest.mark.parametrize(
    ("case", "stage", "gpus"),
    [("plain", 0, 1), ("ZeRO 0", 0, 2), ("ZeRO 1", 1, 1), ("ZeRO 1", 1, 2), ("ZeRO 2", 2, 2), ("ZeRO 3", 3, 2)],
)
def test_model_state_is_that_which_was_measured(case: str, stage: int, gpus: int) -> None:
    found = measured()["state"][case][str(gpus)][0]
    states = ("weight", "exp_avg", "ema_", "computing", "gradient")
    held = sum(found[kind] for kind in states)
    if stage == 3:  # half of the gradient is among the buffers in the record (docs/training.md)
        held += found["parameters"] * 4 // gpus
    work = small(gpus=gpus, stage=stage)
    assert work.trained == found["parameters"]
    planned = model_state_bytes(work.trained, work.emas, stage, gpus)
    assert planned == pytest.approx(held, rel=0.1)
    parts = memory.memory(replace(work, batch=1 * gpus, precision="fp32"))
    assert parts["weights, moments, EMAs"] == planned - 4 * work.trained // (gpus if stage else 1) * (
        2 if stage == 3 else 1
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_which_were_measured(precision: str, checkpointing: bool) -> None:
    record = measured()
    found = record["activations"][f"{precision}, {'computed again' if checkpointing else 'kept'}"]
    work = small(precision=precision, checkpointing=checkpointing)
    assert memory.activation_bytes(work, record["batch"]) == pytest.approx(found, rel=0.1)


# --- speed, against what others have published for the same network (docs/scaling.md has the sources) ---

PUBLISHED: dict[str, Any] = {"stage": 0, "plain": True, "checkpointing": True, "compiled": False, "precision": "bf16"}


@pytest.mark.parametrize(
    ("gpu", "gpus", "images", "images_per_s"),
    [("a100", 1, 128, 107.5), ("h800", 8, 128, 284.0)],
    ids=["fast-DiT", "LightningDiT"],
)
def test_the_speed_of_others_is_met_within_a_fifth(gpu: str, gpus: int, images: int, images_per_s: float) -> None:
    work = replace(XL.on(gpus, images), **PUBLISHED)
    planned = images / sum(speed.step(work, GPUS[gpu]).values())
    assert planned == pytest.approx(images_per_s, rel=0.2)
    assert planned > images_per_s  # a roofline leaves things out; that it is too fast is what the page says


def test_bytes_of_elementwise_kernels_are_those_which_were_counted() -> None:
    path = max(RESULTS.glob("counts_*.json"))
    (found,) = (row for row in json.loads(path.read_text())["counted"] if row["size"] == "XL")
    work = replace(XL, compiled=False, precision="bf16")
    moved = speed.elementwise(work, found["batch"], times=1) / found["blocks"]
    block = found["block"]
    assert moved == pytest.approx(1e6 * (block["forward_elementwise_mb"] + block["backward_elementwise_mb"]), rel=0.01)
    assert 6 * work.macs / 1e9 == pytest.approx(found["gflop_per_image"], rel=1e-3)
    assert abs(sum(speed.KERNELS) - block["forward_kernels"] - block["backward_kernels"]) <= 1


def test_a_gpu_is_never_faster_than_its_peak() -> None:
    for size in SIZES:
        given = {"data": {"latent_shape": [4, 32, 32]}, "model": {"size": size}, "evaluation": {"every": 0},
                 "train": {"global_batch": 4096, "precision": "bf16"}}  # fmt: skip
        config = parse(Config, given, "test")
        for gpu in GPUS.values():
            for gpus in (1, 8, 64, 1024):
                found = plan(Work.of(config, gpus), gpu, math.inf, None)
                assert 0 < found.mfu < 0.607
                assert found.images_per_s <= gpus / 1 * plan(Work.of(config, 1), gpu, math.inf, None).images_per_s * 1.2


def test_what_costs_more_takes_longer() -> None:
    gpu = GPUS["h100"]
    base = XL.on(8)

    def seconds(**options: Any) -> float:
        return sum(speed.step(replace(base, **options), gpu).values())

    assert seconds(checkpointing=True) > 1.2 * seconds()
    assert seconds(compiled=False) > seconds()
    assert seconds(precision="fp32") > seconds(precision="tf32") > seconds()
    assert seconds(stage=3) > seconds(stage=1)
    # ZeRO 2 sends the gradient once a micro-batch, of which there are four (docs/training.md).
    one, two = (speed.traffic(replace(base, stage=stage, micro=8), gpu)[0] for stage in (1, 2))
    assert two == pytest.approx(4 * one)
    assert speed.fid_hours(replace(base, guided=True), gpu) == pytest.approx(2 * speed.fid_hours(base, gpu), rel=0.05)


# --- goodput, against a simulation of the same, and the intervals of Young and Daly ---


@pytest.mark.parametrize(("interval", "stall", "save"), [(60.0, 0.0, 6.0), (300.0, 5.0, 0.0), (900.0, 0.5, 30.0)])
def test_goodput_is_what_the_simulation_finds(interval: float, stall: float, save: float) -> None:
    between, restart = 4000.0, 40.0
    closed = goodput(interval, stall, save, restart, between)
    found = [study_spot.fixed(interval, stall, save, restart, between, 4e6, seed) for seed in range(8)]
    mean = sum(found) / len(found)
    error = math.sqrt(sum((each - mean) ** 2 for each in found) / len(found) / (len(found) - 1))
    assert mean == pytest.approx(closed, abs=4 * error)
    assert error < 0.003


def test_goodput_is_largest_at_dalys_interval_and_near_youngs() -> None:
    stall, between = 5.0, 4000.0
    best = max(range(20, 2000), key=lambda interval: goodput(interval, stall, 0.0, 40.0, between))
    assert daly(stall, between) == pytest.approx(best, rel=0.01)
    assert young(stall, between) == pytest.approx(best, rel=0.05)


def test_goodput_without_failures_is_what_saves_leave() -> None:
    assert goodput(95.0, 5.0, 6.0, 40.0, math.inf) == 0.95
    assert goodput(10.0, 0.0, 20.0, 40.0, math.inf) == 0.5  # a save waits for the one before
    assert goodput(1e9, 0.0, 0.0, 40.0, 1.0) == 0.0


def test_elastic_weeks_are_seeded_and_lose_more_with_more_failures() -> None:
    weeks = [study_spot.week(300.0, hours, seed=1) for hours in (24.0 * 30, 24.0 * 30, 24.0)]
    assert weeks[0] == weeks[1]
    assert 0 < weeks[2].goodput < weeks[0].goodput < 1


# --- the command ---


def run(*arguments: str) -> dict[str, Any]:
    ended = commands.run("plan", "--json", *arguments)
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def test_what_does_not_fit_is_said_with_what_would() -> None:
    found = run("--preset", "eqm-xl2", "--gpus", "1")
    assert not found["fits"]
    (sentence,) = found["sentences"]
    size, flags, then = re.findall(
        r"takes ([\d.]+) GB and does not fit .* 80 GB; with (.*) it takes ([\d.]+) GB", sentence
    )[0]
    assert flags == "--train.micro_batch 128"
    assert float(size) > 80 >= float(then)
    # What is advised is taken, and helps.
    assert run("--preset", "eqm-xl2", "--gpus", "1", *flags.split())["fits"]


def test_what_the_plan_does_not_count_is_said() -> None:
    found = run("--preset", "eqm-b2", "--objective.energy", "dot")
    assert found["sentences"][0].startswith("An explicit energy is trained by a double backward, whose time and memory")
    (uneven,) = run("--preset", "eqm-b2", "--gpus", "24")["sentences"]
    assert uneven == "256 images do not divide by 24 GPUs: some wait for those with more."
    few = run("--preset", "eqm-b2", "--failure-hours", "1")
    assert few["goodput"] < 0.8
    assert re.search(r"is lost to failures; save every [\d,]+ steps \(--checkpoint.every\)", few["sentences"][0])


def test_every_remedy_is_found_where_it_is_the_only_one() -> None:
    tight = replace(GPUS["h100"], memory=1.0)
    assert memory.remedy(XL.on(8), tight) is None
    work = XL.on(8, 1)
    for flags, size in (
        ("--engine.zero_stage 2", 7.5e9),
        ("--engine.zero_stage 3", 5.3e9),
        ("--engine.offload cpu", 0),
    ):
        found = None
        limit = 12e9
        while limit > 1e9:
            found = memory.remedy(work, replace(tight, memory=limit))
            if found is not None and found[0] and found[0].endswith(flags) and limit > size:
                break
            limit -= 0.05e9
        assert found is not None, flags
        assert memory.fits(found[1], replace(tight, memory=limit))


def test_the_table_has_every_size_that_a_batch_can_be_divided_over() -> None:
    ended = commands.run("plan", "--preset", "eqm-xl2", "--table")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["1", "2", "4", "8", "16", "32", "64", "128", "256"]
    assert len({len(row) for row in rows}) == 1
    ended = commands.run("plan", "--preset", "eqm-xl2", "--table", "--images-per-gpu", "32", "--json")
    assert [each["gpus"] for each in json.loads(ended.out)] == [2**power for power in range(11)]


def test_the_page_has_the_table_that_the_command_prints() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for arguments in (["--preset", "eqm-xl2", "--table"], ["--preset", "eqm-xl2", "--table", "--images-per-gpu", "32"]):
        assert f"pipelines/plan.py {' '.join(arguments)}\n" in page
        assert commands.run("plan", *arguments).out in page


def test_a_price_is_taken_and_multiplied() -> None:
    found = run("--preset", "eqm-b2", "--price", "2.5")
    assert found["dollars"] == [pytest.approx(2.5 * found["gpu_hours"])] * 2
    assert run("--preset", "eqm-b2", "--gpu", "h800")["dollars"] is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--gpus 0", "Argument --gpus: must be a whole number of at least 1, got 0; see --help."),
        ("--gpus 100001", "--gpus must be at most 100,000, got 100,001."),
        ("--gpu v100", "Argument --gpu: invalid choice: 'v100'"),
        ("--price -1", "Argument --price: must be a number of at least 0, got -1"),
        ("--failure-hours 0", "Argument --failure-hours: must be a positive number of hours, got 0"),
        ("--gpu h800 --spot", "--spot has no effect with --gpu h800, of which no such price is known; give --price."),
        ("--gpus 2 --launcher local", "--launch.launcher local is one process with one GPU; leave it out, or plan"),
        ("--preset eqm-xl2 --gpus 512", "512 GPUs cannot share a batch of 256 images; lower --gpus, or raise"),
        ("--train.steps few", "train.steps: should be a valid integer"),
    ],
)
def test_bad_input_is_one_sentence(flags: str, sentence: str) -> None:
    ended = commands.run("plan", *flags.split())
    assert (ended.code, ended.out) == (2, "")
    assert sentence in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_plan_needs_no_torch() -> None:
    code = """
import contextlib, io, sys
from eqm_dist.commands.plan import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["--preset", "eqm-xl2"])
print(sorted({"torch", "numpy", "ray", "deepspeed"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
