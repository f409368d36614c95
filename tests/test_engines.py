"""Two ways, one number: engines, ZeRO stages and numbers of workers give the same run, saved and resumed anyhow."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from eqm_dist.build import OpenRun, build_model, build_run
from eqm_dist.config import Config
from eqm_dist.errors import ConfigError
from eqm_dist.open_run import open_run
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.loop import train
from tests.distributed import run_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.deepspeed]

STEPS, HALF = 20, 10
# 3 workers do not divide the batch. Two micro-batches, so that accumulation is part of the comparison.
GLOBAL_BATCH, MICRO_BATCH = 10, 3
ENGINES = {"torch": {"engine.kind": "torch"}} | {f"zero{stage}": {"engine.zero_stage": stage} for stage in range(4)}

# Ways to hold the state that the stages allow besides.
VARIANTS = {
    f"zero{stage} in host memory": {"engine.zero_stage": stage, "engine.offload": "cpu"} for stage in (1, 2, 3)
} | {
    # Several flat partitions and no parameter that stays gathered, which else only large models have.
    "zero3 in pieces": {
        "engine.zero_stage": 3,
        "engine.deepspeed": {"zero_optimization": {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}},
    }
}

# The runs differ in the order of fp32 sums: of gradients over ranks and micro-batches, and in the blocking of matrix
# products. Each is off by some 1e-7 of its value, and Adam's division by the root of the second moment passes that on
# where a gradient is near zero. Twenty steps at this learning rate stay below 2e-5; a lost sample, a wrong learning
# rate or a stale EMA is off by 1e-2 and more.
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Curve:
    """What a run came to: its losses and gradient norms step by step, and its EMA weights."""

    losses: torch.Tensor
    grad_norms: torch.Tensor
    parts: torch.Tensor
    """[steps, parts of the model]: their gradient norms."""
    ema: torch.Tensor


def config(root: Path, name: str, **overrides: object) -> Config:
    return with_overrides(
        digits(),
        {
            "run.root": str(root),
            "run.name": name,
            "model.hidden_size": 32,
            "model.depth": 2,
            "model.num_heads": 2,
            "optimizer.gradient_clip": 5.0,
            "optimizer.warmup_steps": 5,
            "optimizer.ema_decays": [0.9, 0.99],
            "train.steps": STEPS,
            "train.global_batch": GLOBAL_BATCH,
            "train.micro_batch": MICRO_BATCH,
            "train.log_every": 1,
            "train.log_grad_norms": True,
            "checkpoint.every": HALF,
            "evaluation.every": 0,
            "track.mlflow": False,
            **overrides,
        },
    )


def run_engines(rank: int, runs: list[OpenRun], stop_at: int | None) -> list[Curve | None]:
    """Every run in turn, in these processes; rank 0 returns their curves."""
    return [_run(rank, opened, stop_at) for opened in runs]


def _run(rank: int, opened: OpenRun, stop_at: int | None) -> Curve | None:
    run = build_run(opened, torch.device("cpu"))
    train(replace(run, steps=stop_at) if stop_at else run)
    ema = torch.cat([value.flatten() for value in run.ema_weights().values()])
    lines = list(read_metrics(opened.directory / "metrics.jsonl"))
    losses, norms = ([line[key] for line in lines] for key in ("train/loss", "train/grad_norm"))
    parts = [[line[key] for key in line if key.startswith("train/grad_norm/")] for line in lines]
    return None if rank else Curve(torch.tensor(losses), torch.tensor(norms), torch.tensor(parts), ema)


def assert_same(curve: Curve | None, reference: Curve | None, what: str) -> None:
    assert curve is not None
    assert reference is not None
    assert len(curve.losses) == len(reference.losses) == STEPS
    assert curve.parts.shape == (STEPS, 4)  # embedders, two blocks, final layer
    for part in ("losses", "grad_norms", "parts", "ema"):
        found, expected = getattr(curve, part), getattr(reference, part)
        difference = (found - expected).abs() / expected.abs().clamp(min=1)
        assert difference.max() < TOLERANCE, f"{what}: {part} differ by {difference.max():.1e}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """The plain engine on one worker, without a stop."""
    opened = open_run(config(tmp_path_factory.mktemp("reference"), "plain", **{"engine.kind": "torch"}))
    ((curve,),) = run_ranks(1, run_engines, [opened], None)
    initial = torch.cat([value.flatten() for value in build_model(opened.config).state_dict().values()])
    assert (curve.ema - initial).abs().max() > 100 * TOLERANCE  # the comparison is of something that moves
    return curve


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every engine on two workers, stopped and saved half-way."""
    root = tmp_path_factory.mktemp("half")
    runs = [open_run(config(root, name, **engine)) for name, engine in ENGINES.items()]
    run_ranks(2, run_engines, runs, HALF)
    return root


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_engine_on_any_number_of_workers_gives_the_same_run(world: int, reference: Curve, tmp_path: Path) -> None:
    # The reference keeps its activations and these compute them again: that changes no number either.
    again = {"train.activation_checkpointing": True}
    runs = [open_run(config(tmp_path, name, **engine, **again)) for name, engine in ENGINES.items()]
    curves = run_ranks(world, run_engines, runs, None)[0]
    for name, curve in zip(ENGINES, curves, strict=True):
        assert_same(curve, reference, f"{name} on {world} workers")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_resumes_on_any_engine_and_any_number_of_workers(
    world: int, reference: Curve, half_done: Path, tmp_path: Path
) -> None:
    # Each saved run goes on under the engine two places further, so that every change of kind is met.
    names = list(ENGINES)
    pairs = [(saved, names[(at + 2) % len(names)]) for at, saved in enumerate(names)]
    runs = []
    for saved, resumed in pairs:
        _copy_run(half_done, tmp_path, saved)
        runs.append(open_run(config(tmp_path, saved, **{"engine.kind": "deepspeed", **ENGINES[resumed]})))
    curves = run_ranks(world, run_engines, runs, None)[0]
    for (saved, resumed), curve in zip(pairs, curves, strict=True):
        assert_same(curve, reference, f"{saved} on 2 workers, then {resumed} on {world}")


def _copy_run(source: Path, target: Path, name: str) -> None:
    import shutil

    shutil.copytree(source / name, target / name)
    if not (target / "data").exists():
        shutil.copytree(source / "data", target / "data")
    file = target / name / "config.yaml"
    file.write_text(file.read_text().replace(str(source), str(target)))


def run_in_parts(rank: int, runs: list[list[OpenRun]], ends: list[int | None]) -> list[Curve | None]:
    """Each run in several parts, one after another: the same run directory under one engine after another."""
    return [[_run(rank, part, end) for part, end in zip(parts, ends, strict=True)][-1] for parts in runs]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_offload_and_raw_keys_change_no_number_and_no_checkpoint(reference: Curve, tmp_path: Path) -> None:
    pairs = {f"{name}, then plain": (engine, ENGINES["torch"]) for name, engine in VARIANTS.items()} | {
        f"plain, then {name}": (ENGINES["torch"], engine) for name, engine in VARIANTS.items()
    }
    runs = [
        [open_run(config(tmp_path, f"run{at}", **engine)) for engine in engines]
        for at, engines in enumerate(pairs.values())
    ]
    curves = run_ranks(2, run_in_parts, runs, [HALF, None])[0]
    for name, curve in zip(pairs, curves, strict=True):
        assert_same(curve, reference, name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_then_one_then_three_workers_under_any_stages_are_one_run(reference: Curve, tmp_path: Path) -> None:
    stages = [(1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 3, 2), (3, 2, 1)]
    curves: list[Curve | None] = []
    for part, (world, end) in enumerate([(2, 7), (1, 14), (3, None)]):
        runs = [open_run(config(tmp_path, f"run{at}", **ENGINES[f"zero{run[part]}"])) for at, run in enumerate(stages)]
        curves = run_ranks(world, run_engines, runs, end)[0]
    for run, curve in zip(stages, curves, strict=True):
        assert_same(curve, reference, f"2, 1 and 3 workers under ZeRO {run}")


@pytest.mark.parametrize("energy", ["dot", "l2"])
def test_an_explicit_energy_trains_alike_under_every_engine_that_takes_it(energy: str, tmp_path: Path) -> None:
    # The keys' biases have no gradient in exact arithmetic (softmax ignores a shift). What is left is rounding, 1e-7,
    # which Adam with its usual eps would blow up into whole steps; this eps keeps it as small as it is.
    overrides = {"objective.energy": energy, "model.zero_init": False, "optimizer.eps": 1e-4}
    names = ["torch", "zero0", "zero1", "zero2", "zero2 in host memory"]
    runs = [
        open_run(config(tmp_path, name.replace(" ", "-"), **{**ENGINES, **VARIANTS}[name], **overrides))
        for name in names
    ]
    plain, *others = run_ranks(2, run_engines, runs, None)[0]
    for name, curve in zip(names[1:], others, strict=True):
        assert_same(curve, plain, f"{energy} under {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        {"objective.kind": "self_stopping", "objective.weighting.kind": "min_snr"},
        {"objective.weighting.kind": "relative", "objective.dispersive.weight": 0.5, "objective.dispersive.group": 2},
    ],
    ids=["self_stopping", "dispersive"],
)
def test_other_objectives_train_alike_on_one_worker_and_under_every_engine_on_two(
    objective: dict[str, object], tmp_path: Path
) -> None:
    # 12 samples are 3 groups of 2 for each of 2 workers, in one micro-batch or in three.
    batch = {"train.global_batch": 12, **objective}
    alone = open_run(config(tmp_path, "alone", **{**batch, "train.micro_batch": 12, "engine.kind": "torch"}))
    plain = run_ranks(1, run_engines, [alone], None)[0][0]
    runs = [
        open_run(config(tmp_path, name, **ENGINES[name], **{**batch, "train.micro_batch": 2}))
        for name in ("torch", "zero2", "zero3")
    ]
    for name, curve in zip(("torch", "zero2", "zero3"), run_ranks(2, run_engines, runs, None)[0], strict=True):
        assert_same(curve, plain, f"{name} on 2 workers")


def weights_at_the_start(rank: int, opened: OpenRun) -> torch.Tensor:
    """Of the plain engine, weights and EMAs, on ranks whose initial weights differ."""
    config = with_overrides(opened.config, {"run.seed": rank})
    engine = build_run(replace(opened, config=config), torch.device("cpu")).engine
    return torch.cat([piece.values for piece in engine.fragments() if piece.state.startswith(("weight", "ema"))])


def test_the_plain_engine_starts_from_the_weights_of_rank_0(tmp_path: Path) -> None:
    opened = open_run(config(tmp_path, "run", **ENGINES["torch"]))
    (alone,) = run_ranks(1, weights_at_the_start, opened)
    for found in run_ranks(3, weights_at_the_start, opened):
        assert torch.equal(found, alone)


def engine_in_effect(rank: int, opened: OpenRun) -> tuple[str, str]:
    """What the record says of it, and what it is."""
    run = build_run(opened, torch.device("cpu"))
    return run.engine.name, type(run.engine).__name__


@pytest.mark.parametrize(
    ("workers", "given", "name"),
    [
        (1, {}, "the plain engine"),
        (2, {}, "DeepSpeed ZeRO-1"),
        (1, {"engine.kind": "deepspeed"}, "DeepSpeed ZeRO-1"),
        (1, {"engine.zero_stage": 2}, "DeepSpeed ZeRO-2"),
        (2, {"engine.kind": "torch"}, "the plain engine"),
    ],
)
def test_the_engine_follows_the_number_of_workers_unless_somebody_chose_one(
    workers: int, given: dict[str, object], name: str, tmp_path: Path
) -> None:
    opened = open_run(config(tmp_path, "run", **given))
    kind = "TorchEngine" if name == "the plain engine" else "DeepSpeedEngine"
    assert run_ranks(workers, engine_in_effect, opened) == workers * [(name, kind)]


def test_the_record_of_an_automatic_engine_keeps_it_automatic(tmp_path: Path) -> None:
    recorded = open_run(config(tmp_path, "run")).config.engine
    assert [recorded.stage(workers) for workers in (1, 2)] == [None, 1]
    assert recorded.kind == "auto"


def test_bf16_is_the_same_under_both_engines(tmp_path: Path) -> None:
    runs = [
        open_run(config(tmp_path, name, **ENGINES[name], **{"train.precision": "bf16"})) for name in ("torch", "zero2")
    ]
    plain, zero = run_ranks(1, run_engines, runs, None)[0]
    # Same autocast, same products; only the fp32 update differs in its order of operations.
    assert_same(zero, plain, "zero2 in bf16")


def test_what_deepspeed_refuses_is_one_sentence(tmp_path: Path) -> None:
    raw = [{"zero_optimization": {"mics_shard_size": 2}}, {"zero_optimization": {"no_such_key": 1}}]  # one was removed
    opened = [open_run(config(tmp_path, "run", **{"engine.deepspeed": each})) for each in raw]
    for each, message in zip(raw, run_ranks(1, refusals, opened)[0], strict=True):
        assert message.startswith("engine.deepspeed must be what DeepSpeed ")
        assert str(each) in message


def refusals(rank: int, runs: list[OpenRun]) -> list[str]:
    messages = []
    for opened in runs:
        with pytest.raises(ConfigError) as raised:
            build_run(opened, torch.device("cpu"))
        messages.append(str(raised.value))
    return messages
