"""The guard: harmful updates leave no trace, and a run that goes back is the run that never met those batches."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eqm_dist.build import OpenRun, build_run
from eqm_dist.data.loader import Batch
from eqm_dist.errors import NonFiniteLossError
from eqm_dist.open_run import open_run
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.checkpoint import EMA_FILE
from eqm_dist.train.guard import Guard
from eqm_dist.train.loop import Run, train
from eqm_dist.train.state import TrainState
from tests import tiny
from tests.distributed import run_ranks

CPU = torch.device("cpu")
STEPS, BATCH = 12, 4
# The learning rate does not depend on the step, so that a run over fewer batches is comparable.
SETTINGS: dict[str, Any] = {
    "train.steps": STEPS,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "train.guard.max_skips": 3,
    "checkpoint.keep": 99,
}


@dataclass(frozen=True)
class Batches:
    """Those of a loader, some of them damaged: the first sample is multiplied by a factor, and some left out."""

    loader: Any
    factors: dict[int, float]
    left_out: tuple[int, ...] = ()
    meet: Callable[[int], None] = lambda number: None

    def batches(self, first: int, last: int) -> Iterator[Batch]:
        numbers = iter(number for number in range(10_000) if number not in self.left_out)
        for number in (next(numbers) for _ in range(last)):
            if first > 0:
                first -= 1
                continue
            self.meet(number)
            batch = self.loader.batch(number)
            factor = torch.where(batch.positions == number * BATCH, self.factors.get(number, 1.0), 1.0)
            yield replace(batch, moments=batch.moments * factor[:, None, None, None, None])


def start(root: Path, shards: Path, batches: dict[str, Any], **overrides: Any) -> Run:
    run = build_run(open_run(tiny.config(root, shards, **{**SETTINGS, **overrides})), CPU)
    return replace(run, loader=Batches(run.loader, **batches))


def trained(root: Path, shards: Path, batches: dict[str, Any], **overrides: Any) -> Run:
    run = start(root, shards, batches, **overrides)
    train(run)
    return run


def tensors(run: Run) -> dict[tuple[str, str], Tensor]:
    return {(piece.state, piece.name): piece.values.clone() for piece in run.engine.fragments()}


def assert_same(run: Run, other: Run) -> None:
    found, expected = tensors(run), tensors(other)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def losses(run: Run, root: Path) -> list[float | None]:
    lines = list(read_metrics(root / "tiny" / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, run.state.step + 1))
    return [line.get("train/loss") for line in lines]


# --- the rule ---


@given(st.lists(st.floats(0, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=30), st.integers(1, 5))
def test_a_norm_is_compared_with_the_mean_of_those_accepted(norms: list[float], window: int) -> None:
    guard, state, accepted = Guard(3.0, window, 10, 3), TrainState(), []
    for norm in norms:
        usual = None
        if len(accepted) >= window:
            usual = sum(accepted[:window]) / window
            for later in accepted[window:]:
                usual = usual * (1 - 1 / window) + later / window
        expected = math.isfinite(norm) and (usual is None or norm <= 3 * usual * (1 + 1e-9))
        near = usual is not None and math.isclose(norm, 3 * usual, rel_tol=1e-6, abs_tol=1e-6)
        found = guard.accepts(state, norm)
        assert found == expected or near
        accepted += [norm] * found
    assert state.skipped == len(norms) - len(accepted)


def test_without_a_factor_only_what_is_not_finite_is_skipped() -> None:
    guard, state = Guard(None, 1, 2, 3), TrainState()
    assert [guard.accepts(state, norm) for norm in (1.0, 1e30, math.nan, 1.0, math.inf)] == [1, 1, 0, 1, 0]
    assert not guard.gives_up(state)
    assert not guard.accepts(state, math.nan)
    assert guard.gives_up(state)


# --- in a run ---


@pytest.mark.parametrize(
    ("factor", "rule"),
    [(math.nan, {}), (1e30, {}), (1e4, {"train.guard.skip": "spikes", "train.guard.spike_window": 3})],
    ids=["nan", "overflow", "spike"],
)
def test_a_run_with_a_skipped_update_is_the_run_without_that_batch(
    factor: float, rule: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    run = trained(tmp_path / "a", shards, {"factors": {4: factor}}, **rule)
    other = trained(tmp_path / "b", shards, {"factors": {}, "left_out": (4,)}, **{"train.steps": STEPS - 1})
    assert_same(run, other)
    found, expected = losses(run, tmp_path / "a"), losses(other, tmp_path / "b")
    assert found == [*expected[:4], None, *expected[4:]]
    assert (run.state.step, run.state.updates, run.state.skipped, run.state.rollbacks) == (STEPS, STEPS - 1, 1, 0)


def test_a_spike_that_is_let_through_does_harm(shards: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "a", shards, {"factors": {4: 1e4}})
    other = trained(tmp_path / "b", shards, {"factors": {}})
    assert run.state.skipped == 0
    assert any(not torch.equal(value, tensors(other)[key]) for key, value in tensors(run).items())


# Batches 5 to 8 are bad and three skips in a row are too many: after step 8 the run goes back to its checkpoint of
# step 4, skips batch 8 there, and goes on with batch 9. The checkpoint of step 6 lies among the skipped updates.
BAD = dict.fromkeys(range(5, 9), math.nan)
AS_IF_LEFT_OUT = (4, 5, 6, 7, 8)


def test_a_run_that_goes_back_is_the_run_without_those_batches(shards: Path, tmp_path: Path) -> None:
    run = trained(tmp_path / "a", shards, {"factors": BAD})
    other = trained(tmp_path / "b", shards, {"factors": {}, "left_out": AS_IF_LEFT_OUT}, **{"train.steps": STEPS - 1})
    assert_same(run, other)
    found, expected = losses(run, tmp_path / "a"), losses(other, tmp_path / "b")
    assert found == [*expected[:4], None, *expected[4:]]
    assert asdict(run.state) | {"usual_norm": 0} == {
        "step": STEPS, "updates": STEPS - 1, "skipped": 4, "skipped_in_a_row": 0, "rollbacks": 1, "passed_over": 4,
        "usual_norm": 0, "norms": STEPS - 1,
    }  # fmt: skip
    last = list(read_metrics(tmp_path / "a" / "tiny" / "metrics.jsonl"))[-1]
    assert (last["train/skipped_updates"], last["train/rollbacks"]) == (4, 1)
    assert last["train/images_seen"] == (STEPS + 4) * BATCH


@pytest.mark.parametrize("crash_at", [0, 4, 6, 7, 8, 9, 12])
def test_a_run_that_is_killed_around_its_return_ends_as_the_uninterrupted_one(
    crash_at: int, shards: Path, tmp_path: Path
) -> None:
    def crash(number: int) -> None:
        if number == crash_at:
            raise KeyboardInterrupt

    reference = trained(tmp_path / "a", shards, {"factors": BAD})
    with pytest.raises(KeyboardInterrupt):
        train(start(tmp_path / "b", shards, {"factors": BAD, "meet": crash}))
    run = trained(tmp_path / "b", shards, {"factors": BAD})
    assert_same(run, reference)
    assert run.state == reference.state
    assert losses(run, tmp_path / "b") == losses(reference, tmp_path / "a")


def test_where_it_goes_back_to_does_not_hang_on_a_save_out_of_turn(shards: Path, tmp_path: Path) -> None:
    reference = trained(tmp_path / "a", shards, {"factors": BAD})
    stopped = start(tmp_path / "b", shards, {"factors": BAD})
    train(replace(stopped, steps=5))  # a run's last step is saved whatever its number
    assert stopped.checkpoints.steps() == [2, 4, 5]
    run = trained(tmp_path / "b", shards, {"factors": BAD})
    assert_same(run, reference)
    assert run.checkpoints.steps() == [2, 4, 6, 8, 10, 12]


def test_a_damaged_checkpoint_is_gone_back_behind(shards: Path, tmp_path: Path) -> None:
    def damage(number: int) -> None:
        if number == 7:
            (tmp_path / "tiny" / "checkpoints" / "step_00000004" / EMA_FILE).write_bytes(b"")

    run = trained(tmp_path, shards, {"factors": BAD, "meet": damage})
    # After step 8 it is back at step 2, where batch 8 is next.
    assert (run.state.rollbacks, run.state.passed_over) == (1, 6)
    assert (tmp_path / "tiny" / "checkpoints" / "damaged-step_00000004").exists()
    assert [at for at, loss in enumerate(losses(run, tmp_path), 1) if loss is None] == [3]


def test_a_run_that_is_not_helped_by_going_back_ends(shards: Path, tmp_path: Path) -> None:
    for _ in range(2):  # starting again changes nothing
        run = start(tmp_path, shards, {"factors": dict.fromkeys(range(5, 99), math.nan)})
        with pytest.raises(NonFiniteLossError) as raised:
            train(run)
        good = run.checkpoints.path(4)
        assert f"3 updates in a row up to step 7, and going back to {good} did not help (3 times)" in str(raised.value)
        assert (run.state.rollbacks, run.state.skipped) == (3, 12)
    assert all(value.isfinite().all() for value in tensors(run).values())


def test_a_run_without_a_checkpoint_to_go_back_to_ends(shards: Path, tmp_path: Path) -> None:
    run = start(tmp_path, shards, {"factors": dict.fromkeys(range(1, 99), math.nan)})
    with pytest.raises(NonFiniteLossError, match="up to step 4, and there is no checkpoint of an earlier step"):
        train(run)


def test_going_back_again_needs_no_more_patience_after_progress(shards: Path, tmp_path: Path) -> None:
    # Three bad batches, one good step, and so on: every return is from a later checkpoint.
    bad = {number: math.nan for number in range(60) if number % 6 in (3, 4, 5)}
    settings = {"train.guard.max_rollbacks": 1, "checkpoint.every": 1}
    run = trained(tmp_path, shards, {"factors": bad}, **settings)
    assert run.state.rollbacks == 3


# --- on several workers, under every engine ---

ENGINES = {"torch": {"engine.kind": "torch"}} | {f"zero{stage}": {"engine.zero_stage": stage} for stage in range(4)}


def run_all(rank: int, opened: dict[str, OpenRun]) -> dict[str, tuple[TrainState, Tensor, list[float | None]]]:
    found = {}
    for name, each in opened.items():
        run = build_run(each, CPU)
        run = replace(run, loader=Batches(run.loader, {**BAD, 10: 1e4}))
        train(run)
        weights = torch.cat([value.flatten() for value in run.ema_weights().values()])
        lines = read_metrics(each.directory / "metrics.jsonl")
        found[name] = run.state, weights, [line.get("train/loss") for line in lines]
    return found


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.deepspeed
def test_every_engine_skips_and_goes_back_alike(shards: Path, tmp_path: Path) -> None:
    def opened(name: str, engine: dict[str, Any]) -> OpenRun:
        rule = {"train.guard.skip": "spikes", "train.guard.spike_window": 3, "launch.launcher": "ray"}
        return open_run(tiny.config(tmp_path, shards, **{**SETTINGS, **rule, **engine, "run.name": name}))

    alone = run_ranks(1, run_all, {"alone": opened("alone", ENGINES["torch"])})[0]["alone"]
    # In the damaged batches one sample of one of the two workers is bad.
    ranks = run_ranks(2, run_all, {name: opened(name, engine) for name, engine in ENGINES.items()})
    assert alone[0].skipped == 5
    for name in ENGINES:
        for state, weights, curve in (ranks[0][name], ranks[1][name]):
            assert replace(state, usual_norm=0) == replace(alone[0], usual_norm=0)
            # The order of fp32 sums differs: some 1e-7, which Adam passes on (see test_engines.py).
            torch.testing.assert_close(weights, alone[1], rtol=2e-5, atol=2e-5)
            assert [loss is None for loss in curve] == [loss is None for loss in alone[2]]
