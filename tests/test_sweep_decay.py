"""``tuning/sweep_decay.py``: trials that are runs, stopped by their FID, forked, killed and found again."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray.tune.schedulers import TrialScheduler

from eqm_dist.commands.sweep_decay import main
from eqm_dist.errors import CheckpointError, ConfigError, LaunchError
from eqm_dist.launch import ray_tune
from eqm_dist.launch.fork import fork_run
from eqm_dist.launch.ray_cluster import cluster
from eqm_dist.launch.ray_tune import EarlyStop, Trial, _Asha
from eqm_dist.options import dump
from eqm_dist.sweeps.decay.plan import AXES, Plan
from eqm_dist.sweeps.decay.population import explored
from eqm_dist.sweeps.decay.results import Trained, lineage, ranked, summaries, table, write_lineage
from eqm_dist.sweeps.search import Search
from eqm_dist.sweeps.spaces import parse_space
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.evaluations import SCORE
from tests import tiny

SCRIPT = Path(__file__).parent.parent / "tuning" / "sweep_decay.py"
RATE, SCALE, FAMILY = "optimizer.learning_rate", "objective.decay.gradient_scale", "objective.decay.family"
EXTRACTOR = """
import os
import pathlib
import signal
import torch

class Pixels(torch.nn.Module):
    id = "pixels of a sweep"
    num_features = 4
    def forward(self, images):
        if pathlib.Path(__file__).with_name("deadly").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        pathlib.Path(__file__).with_name("threads").write_text(str(torch.get_num_threads()))
        return images.flatten(1)[:, :4].double() / 255
"""
GRID = {FAMILY: ["linear", "constant"], RATE: [0.01]}


def flags(root: Path, space: object = GRID, **others: Any) -> list[str]:
    """A sweep of tiny runs: 6 steps, evaluated every 2."""
    shards = root / "blots"
    if not shards.exists():
        tiny.write_blots(shards)
        (root / "decay_extractor.py").write_text(EXTRACTOR)
    (root / "space.yaml").write_text(yaml.safe_dump(space))
    config = {"evaluation.every": 2, "evaluation.samples": 12, "evaluation.extractor": "decay_extractor:Pixels",
              "sampler.nfe": 3}  # fmt: skip
    values = tiny.overrides(root / "runs", shards, **config)
    del values["launch.launcher"], values["run.name"]
    return tiny.flags({**values, "space": str(root / "space.yaml"), "out": str(root / "sweep"), **others})


def results(root: Path) -> list[dict[str, Any]]:
    file = root / "sweep" / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(
    root: Path,
    arguments: list[str],
    kill_at: int | None = None,
    cpus: int = 2,
    code: int = 0,
    number: signal.Signals = signal.SIGKILL,
) -> str:
    """The command in a process of its own with a cluster of so many CPUs; killed once it has so many results."""
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "RAY_ADDRESS": "local",
        "PYTHONPATH": path,
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cpus}),
    }
    # Into a file: a pipe would stay open for as long as any process of a killed driver's cluster lives.
    said = root / "said.txt"
    with said.open("w") as file:
        command = [sys.executable, str(SCRIPT), *arguments]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if kill_at is not None:
        end = time.monotonic() + 400
        while len(results(root)) < kill_at:
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
    process.wait(timeout=500 if kill_at is None else 90)
    if kill_at is None or number != signal.SIGKILL:
        assert process.returncode == code, said.read_text()
    return said.read_text()


def test_a_fork_goes_on_as_its_origin_would_have(tmp_path: Path) -> None:
    shards = tiny.write_blots(tmp_path / "blots")
    common = {"checkpoint.keep": 9, "optimizer.schedule": "constant"}

    def train(name: str, **others: Any) -> list[float]:
        values = tiny.overrides(tmp_path, shards, **{"run.name": name, **common, **others})
        outcome = tiny.train(*tiny.flags(values))
        assert outcome.code == 0, outcome.err
        return [line["train/loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    losses = train("origin")
    fork_run(tmp_path / "origin", 4, tmp_path / "same")
    fork_run(tmp_path / "origin", 4, tmp_path / "other")
    assert train("same") == losses  # bit for bit: weights, moments, EMAs and position
    other = train("other", **{"objective.decay.gradient_scale": 2.0})
    assert other[:4] == losses[:4]
    assert other[4] < losses[4]  # half the target
    before = sorted((tmp_path / "other").rglob("*"))
    fork_run(tmp_path / "origin", 2, tmp_path / "other")  # it has begun
    assert sorted((tmp_path / "other").rglob("*")) == before
    with pytest.raises(CheckpointError, match="has none of step 3, but those of"):
        fork_run(tmp_path / "origin", 3, tmp_path / "third")


def test_early_stopping_knows_what_an_earlier_attempt_measured() -> None:
    past = {f"run{number}": [(2, float(number)), (4, float(number))] for number in range(1, 9)}
    trial: Any = SimpleNamespace(trial_id="new")
    controller: Any = None  # ASHA asks it nothing
    for fid, stops in ((1.5, False), (7.5, True)):
        for known, expected in ((past, stops), ({}, False)):
            scheduler = _Asha(EarlyStop(grace=2, reduction=2, past=known), steps=8)
            scheduler.on_trial_add(controller, trial)
            decision = scheduler.on_trial_result(controller, trial, {"step": 2, "fid": fid})
            assert (decision == TrialScheduler.STOP) == expected
            assert ("new" in scheduler.stopped) == expected


def test_a_run_that_ends_while_it_is_reported_reports_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(tmp_path, tmp_path / "blots", **{"train.steps": 4})
    metrics, heard = Trial(config).directory / "metrics.jsonl", threading.Event()
    reports: list[dict[str, Any]] = []

    def evaluated(step: int, fid: float) -> None:
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, SCORE: fid}) + "\n")

    def train(_: object) -> None:
        metrics.parent.mkdir(exist_ok=True)
        evaluated(2, 3.0)
        assert heard.wait(60)
        evaluated(4, 1.0)

    def report(result: dict[str, Any]) -> None:
        reports.append(result)
        heard.set()
        for thread in threading.enumerate():
            if thread.name == "training":
                thread.join()  # as slow as a driver with other work

    monkeypatch.setattr(ray_tune, "open_run", lambda _: SimpleNamespace(mlflow=None))
    monkeypatch.setattr(ray_tune.local, "train", train)
    monkeypatch.setattr(ray_tune.tune, "report", report)
    ray_tune._train(
        {"trial": {"config": dump(config), "origin": None, "parent": None, "threads": torch.get_num_threads()}}
    )
    assert reports == [{"step": 2, "fid": 3.0}, {"step": 4, "fid": 1.0}]


def trained(scale: float, seed: int, step: int, fid: float | None, how: str = "complete") -> Trained:
    return Trained(f"{scale}-{seed}", {SCALE: scale}, seed, how, step, fid, 1.0)


def test_a_point_is_the_mean_and_the_spread_of_its_seeds() -> None:
    rows = summaries([trained(1.0, 0, 6, 2.0), trained(4.0, 0, 6, 1.0), trained(1.0, 1, 6, 4.0),
                      trained(4.0, 1, 6, 3.0), trained(9.0, 0, 2, 0.5), trained(1.0, 2, 2, 9.0)])  # fmt: skip
    assert [row.overrides[SCALE] for row in rows] == [4.0, 1.0, 9.0]  # the longest first
    assert [(row.mean, row.fids) for row in rows[:2]] == [(2.0, {0: 1.0, 1: 3.0}), (3.0, {0: 2.0, 1: 4.0})]
    lines = table(ranked(rows, lambda point: (1.0,)), [], [SCALE])
    assert lines[0].split()[:4] == ["rank", "FID", "+-", "seeds"]
    assert lines[0].split()[-2:] == ["step", "gradient_scale"]
    assert "1.414" in lines[1]  # of 1 and 3, over n - 1
    assert lines[3].split() == ["3", "0.500", "-", "1", "-", "-", "-", "-", "2", "9.0"]


def test_a_point_whose_bad_seeds_were_stopped_or_failed_is_not_put_above_one_that_has_them_all() -> None:
    whole = [trained(1.0, seed, 6, fid) for seed, fid in enumerate((1.31, 1.33, 1.35))]
    for bad in (
        [trained(4.0, 1, 2, 9.0, "stopped"), trained(4.0, 2, 4, 8.0, "stopped")],
        [trained(4.0, 1, 6, None, "failed"), trained(4.0, 2, 6, None, "lost")],
        [],
    ):
        order = ranked(summaries([trained(4.0, 0, 6, 1.30), *bad, *whole]), lambda point: (1.0,))
        assert [row.overrides[SCALE] for row, _ in order] == [1.0, 4.0]
        _, lucky = table(order, [], [SCALE])[1:]
        assert lucky.split() == ["2", "1.300", "-", "1", "-", "-", "-", "-", "6", "4.0"]  # no spread, and no verdict


def test_one_seed_each_has_no_columns_of_seeds() -> None:
    order = ranked(summaries([trained(1.0, 0, 6, 2.0)]), lambda point: (1.0,))
    assert [line.split() for line in table(order, [], [SCALE])] == [
        ["rank", "FID", "step", "gradient_scale"],
        ["1", "2.000", "6", "1.0"],
    ]


def test_of_tied_trainings_the_cheaper_is_first() -> None:
    runs = [trained(scale, seed, 6, fid) for scale, fids in ((4.0, (1.30, 1.40, 1.20)), (1.0, (1.31, 1.39, 1.21)))
            for seed, fid in enumerate(fids)]  # fmt: skip
    for costs, best in (({4.0: 2.0, 1.0: 1.0}, 1.0), ({4.0: 1.0, 1.0: 1.0}, 4.0)):
        order = ranked(summaries(runs), lambda point, costs=costs: (costs[point[SCALE]],))
        assert order[0][0].overrides[SCALE] == best


def test_the_cost_of_a_point_is_its_training_and_then_its_images(tmp_path: Path) -> None:
    config = tiny.config(tmp_path, tmp_path / "blots")
    plan = Plan(config, Search(parse_space(GRID, AXES, "test"), "grid", 1, 0, tmp_path), 1, 0, 2, 1, 0.0)
    base = plan.cost({})
    assert plan.cost({"sampler.nfe": 2 * config.sampler.nfe}) == (base[0], 2 * base[1])
    assert plan.cost({"train.global_batch": 2 * config.train.global_batch}) == (2 * base[0], base[1])


def test_the_lineage_of_a_member_is_its_schedule(tmp_path: Path) -> None:
    def member(name: str, rate: float, step: int, parent: str | None) -> Trained:
        return Trained(name, {RATE: rate}, 0, "complete", step, 1.0, 1.0, None, parent)

    runs = [member("g0-m0", 0.1, 2, None), member("g0-m1", 0.2, 2, None), member("g1-m0", 0.16, 4, "g0-m1"),
            member("g1-m1", 0.2, 4, "g0-m1"), member("g2-m1", 0.128, 6, "g1-m0")]  # fmt: skip
    found = lineage(runs, "g2-m1")
    assert [one.name for one in found] == ["g0-m1", "g1-m0", "g2-m1"]
    with write_lineage(tmp_path, found).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["from_step"], row["to_step"], row["run"], row["parent"], row[RATE]) for row in rows] == [
        ("0", "2", "g0-m1", "", "0.2"),
        ("2", "4", "g1-m0", "g0-m1", "0.16"),
        ("4", "6", "g2-m1", "g1-m0", "0.128"),
    ]


def test_exploring_stays_in_the_space() -> None:
    space = parse_space({RATE: {"log": [0.001, 0.1]}, FAMILY: ["linear", "constant"]}, AXES, "test")
    point, families = {RATE: 0.09, FAMILY: "linear"}, set()
    for seed in range(40):
        near = explored(space, point, np.random.default_rng(seed))
        assert near[RATE] in (0.072, 0.1)  # 0.8 times, or 1.25 times up to the end
        families.add(near[FAMILY])
    assert families == {"linear", "constant"}


@pytest.mark.parametrize(
    ("space", "others", "message"),
    [
        ({"optimizer.learn_rate": [0.1]}, {}, "did you mean optimizer.learning_rate"),
        ({"train.steps": [1]}, {}, "train.steps cannot be an axis of this sweep"),
        (
            {FAMILY: "linear", "objective.decay.decay_start": [0.5]},
            {},
            "decay_start has no effect with family=linear",
        ),
        (GRID, {"evaluation.every": 0}, "evaluation.every=0 measures none"),
        (GRID, {"reduction": 1}, "--reduction must be at least 2"),
        (GRID, {"grace": 2}, "--grace has no effect without --reduction"),
        (GRID, {"grace": 6, "reduction": 2}, "--grace 6 must be less than train.steps=6"),
        (
            GRID,
            {"gpus-per-trial": 1.5},
            "--gpus-per-trial must be a part of one GPU or a whole number of them, got 1.5",
        ),
        (GRID, {"grace": 3, "reduction": 2}, "--grace 3 must be a multiple of evaluation.every=2"),
        (GRID, {"trials": 3}, "--trials has no effect on --search grid"),
        (GRID, {"launch.workers": 2}, "launch.workers has no effect on trials that are one process"),
        (
            GRID,
            {"launch.launcher": "ray", "launch.workers": "[1,2]"},
            "launch.workers must be one number in a sweep, got \\[1, 2\\]",
        ),
        (GRID, {"search": "pbt"}, "use optimizer.schedule=constant"),
        (
            {"model.depth": [1, 2]},
            {"search": "pbt", "trials": 2},
            "model.depth cannot change while a population trains",
        ),
        (GRID, {"search": "pbt", "grace": 4, "optimizer.schedule": "constant"}, "must be a multiple of the 4 steps"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, space: object, others: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        main(flags(tmp_path, space, **others))
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*flags(tmp_path, seeds=2, reduction=2), "--dry-run"])
    printed = capsys.readouterr().out
    assert "4 at most (grid: 2 points x 2 seeds)" in printed
    assert "96 at most" in printed  # images: 4 runs x 6 steps x 4
    assert not (tmp_path / "sweep").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    arguments = flags(tmp_path, seeds=2, **{"track.mlflow": "true", "cpus-per-trial": 2})
    run(tmp_path, arguments, kill_at=2)
    first = results(tmp_path)
    written = {line["name"]: (tmp_path / "sweep" / "runs" / line["name"] / "result.json").stat().st_mtime_ns
               for line in first}  # fmt: skip
    out = run(tmp_path, arguments)
    done = results(tmp_path)
    assert done[: len(first)] == first
    assert len(done) == len({line["name"] for line in done}) == 4
    assert all(line["how"] == "complete" and line["step"] == 6 for line in done)
    for name, when in written.items():
        assert (tmp_path / "sweep" / "runs" / name / "result.json").stat().st_mtime_ns == when
    assert "is complete" in out
    assert (tmp_path / "threads").read_text() == "2"  # although OMP_NUM_THREADS is 1 in the tests
    for picture in ("fid.png", "c_gamma.png"):
        assert (tmp_path / "sweep" / picture).stat().st_size > 1000
    trained = tiny.train("--config", str(tmp_path / "sweep" / "best.yaml"), "--dry-run")
    assert trained.code == 0, trained.err

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    parent = client.get_run(json.loads((tmp_path / "sweep" / "mlflow.json").read_text())["run_id"])
    assert parent.info.status == "FINISHED"
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        order_by=["metrics.`eval/fid` ASC"],
    )  # fmt: skip
    fids = {line["name"]: line["fid"] for line in done}
    assert sorted(fids) == sorted(child.info.run_name or "" for child in children)
    assert [child.data.metrics["eval/fid"] for child in children] == sorted(fids.values())
    assert {child.info.status for child in children} == {"FINISHED"}


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_died_with_its_process_is_tried_again_by_the_same_command(tmp_path: Path) -> None:
    arguments = flags(tmp_path, {RATE: [0.01]}, seeds=1)
    (tmp_path / "deadly").touch()
    out = run(tmp_path, arguments, code=1)
    news, error = out.splitlines()  # and no trace of anybody
    log = next((tmp_path / "sweep" / "runs").glob("*/logs/rank-0000.log"))
    assert log.read_text().count("the trial begins in process") == 3
    assert news.endswith(f"lost: its process died 3 times, as one does that has not enough memory or loses its machine;"
                         f" its log is {log}")  # fmt: skip
    assert error.startswith("error: A sweep needs one run that gives an FID, and none of 1 run in")
    assert (
        f"its process died 3 times, as one does that has not enough memory or loses its machine; its log is {log}"
        in error
    )
    assert [line["how"] for line in results(tmp_path)] == ["lost"]
    (tmp_path / "deadly").unlink()
    out = run(tmp_path, arguments)
    assert "lost" not in out
    assert [line["how"] for line in results(tmp_path)] == ["lost", "complete"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_terminated_sweep_says_so_and_goes_on_with_more_seeds_and_points(tmp_path: Path) -> None:
    arguments = flags(tmp_path, seeds=1, **{"cpus-per-trial": 2})
    out = run(tmp_path, arguments, kill_at=1, code=143, number=signal.SIGTERM)
    assert [line for line in out.splitlines() if " | " not in line] == [
        "terminated; run the same command again to resume."
    ]
    first = results(tmp_path)
    out = run(tmp_path, flags(tmp_path, {**GRID, FAMILY: ["linear", "constant", "piecewise"]}, seeds=2,
                              **{"cpus-per-trial": 2}))  # fmt: skip
    assert "is complete" in out
    done = results(tmp_path)
    assert done[: len(first)] == first
    assert len(done) == len({line["name"] for line in done}) == 6
    assert {line["seed"] for line in done} == {0, 1}
    out = run(tmp_path, flags(tmp_path, {**GRID, FAMILY: ["linear", "constant", "piecewise"]}, seeds=1,
                              **{"cpus-per-trial": 2}))  # fmt: skip
    assert results(tmp_path) == done
    assert "seeds to tell" not in out  # of one seed alone


@pytest.mark.ray
def test_what_no_machine_has_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2}))
    monkeypatch.syspath_prepend(str(tmp_path))
    ray_train = {"launch.launcher": "ray", "engine.kind": "torch"}
    with cluster():
        for others, message in (
            ({"gpus-per-trial": 1}, "--gpus-per-trial must be at most 0, which is what the largest machine"),
            ({"gpus-per-trial": 0.5}, "--gpus-per-trial must be at most 0, .* got 0.5; lower it, or add a machine"),
            ({"cpus-per-trial": 3}, "--cpus-per-trial must be at most 2, .* got 3"),
            ({"gpus-per-trial": 1, **ray_train}, "--gpus-per-trial must be at most the 0 GPUs of the cluster, got 1"),
            (
                {"launch.workers": 3, "launch.cpus_per_worker": 1, **ray_train},
                "launch.workers=3 with 1 CPUs each must fit",
            ),
        ):
            with pytest.raises(LaunchError, match=message):
                main(flags(tmp_path, seeds=1, **others))
    assert results(tmp_path) == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_population_is_the_same_after_a_kill(tmp_path: Path) -> None:
    space = {RATE: {"log": [0.001, 0.1]}, SCALE: {"linear": [1, 4]}}
    common = {"search": "pbt", "trials": 3, "grace": 2, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
    for name, kill_at in (("whole", None), ("killed", 4)):
        (tmp_path / name).mkdir()
        arguments = flags(tmp_path / name, space, **common)
        run(tmp_path / name, arguments, kill_at)
        if kill_at:
            run(tmp_path / name, arguments)
    found = [sorted(({**line, "seconds": 0} for line in results(tmp_path / name)), key=lambda line: line["name"])
             for name in ("whole", "killed")]  # fmt: skip
    assert found[0] == found[1]
    assert len(found[0]) == 9
    replaced = {json.dumps(line["overrides"]) for line in found[0]}
    assert len(replaced) > 3  # some members were replaced by others that explore
    out, names = tmp_path / "whole" / "sweep", {line["name"] for line in found[0]}
    for line in found[0]:
        assert (line["parent"] is None) == line["name"].startswith("g000")
        assert line["parent"] is None or line["parent"] in names
    with (out / "lineage.csv").open() as file:
        schedule = list(csv.DictReader(file))
    assert [(row["from_step"], row["to_step"]) for row in schedule] == [("0", "2"), ("2", "4"), ("4", "6")]
    best = (out / "best.yaml").read_text()
    for row in schedule:
        part = next(line for line in best.splitlines() if f": {row['run']}, " in line)
        assert part.startswith(f"# steps {row['from_step']} to {row['to_step']}: ")
        assert f"learning_rate {float(row[RATE])}" in part
    checkpoint = Path(next(line for line in best.splitlines() if "checkpoint: " in line).partition("checkpoint: ")[2])
    assert (checkpoint / "COMPLETE.json").exists()
    assert checkpoint.parent.parent.name == schedule[-1]["run"]
    recorded = {one["run"]: one["parent"] for one in csv.DictReader((out / "results.csv").read_text().splitlines())}
    assert recorded == {line["name"]: line["parent"] or "" for line in found[0]}
    last = list(read_metrics(tmp_path / "whole" / "sweep" / "runs" / "g002-m000" / "metrics.jsonl"))
    assert [line["step"] for line in last if "train/loss" in line] == [1, 2, 3, 4, 5, 6]  # with its origin's past


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("cpus", [2, 5])
def test_ray_train_trials_of_two_cpus_end_where_one_has_room_and_where_two_and_a_half_have(
    tmp_path: Path, cpus: int
) -> None:
    options = {"launch.launcher": "ray", "launch.workers": 2, "launch.cpus_per_worker": 1, "engine.kind": "torch"}
    arguments = flags(tmp_path, seeds=3, reduction=2, grace=2, **options)  # those that are stopped must give back
    run(tmp_path, arguments, cpus=cpus)
    ends = {line["name"]: line["how"] for line in results(tmp_path)}
    assert set(ends.values()) <= {"complete", "stopped"}
    assert "complete" in ends.values()
    for name, how in ends.items():
        if name.endswith("-s0"):  # which decides whether its point goes on; then all seeds train to the end
            others = [ends.get(name.replace("-s0", f"-s{seed}")) for seed in (1, 2)]
            assert others == ["complete" if how == "complete" else None] * 2
    log = next((tmp_path / "sweep" / "runs").glob("*/logs/rank-0000.log")).read_text()
    assert "on 2 workers" in log
