"""Saving while training goes on: the state of its step and no other, whole or absent, and a failure costs one save."""

import os
import random
import re
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from eqm_dist.build import OpenRun, build_run
from eqm_dist.config import Config
from eqm_dist.errors import ConfigError, StorageError
from eqm_dist.open_run import open_run
from eqm_dist.track.jsonl import JsonlTracker, read_metrics
from eqm_dist.train.checkpoint import EMA_FILE, MARKER, read_marker, verify_file
from eqm_dist.train.loop import Run, train
from eqm_dist.train.saving import Saver, _be_nice, write_tensors
from eqm_dist.train.state import TrainState
from tests import tiny
from tests.disk import no_file_larger_than
from tests.distributed import run_ranks
from tests.savers import CPU, assert_filled, fill, start_savers

SHARDED = {"launch.launcher": "ray", "engine.zero_stage": 2}


def start(config: Config) -> Run:
    return build_run(open_run(config), CPU)


# --- the state of its step ---


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_saved_is_the_state_of_its_step_though_training_went_on(
    device: str, shards: Path, tmp_path: Path
) -> None:
    run = build_run(open_run(tiny.config(tmp_path, shards)), torch.device(device))
    for step in (1, 2):  # the second time in buffers that were used before
        fill(run, step)
        held = threading.Event()
        run.saver._thread.submit(held.wait)  # so that nothing is written before the state has changed
        run.saver.begin(TrainState(step))
        run.saver.wait_copied()
        fill(run, 9)
        held.set()
        run.saver.settle()
        assert_filled(start(tiny.config(tmp_path, shards)), step)


def test_no_update_is_made_before_the_state_is_copied(shards: Path, tmp_path: Path) -> None:
    """The copy of step 2 is held up until an update could have been made; the run is still the uninterrupted one."""
    clean, slow = (start(tiny.config(tmp_path, shards, **{"run.name": name})) for name in ("clean", "slow"))
    train(clean)
    train(replace(slow, steps=1))
    slow.saver._copier.submit(time.sleep, 0.3)
    train(slow)
    for path in clean.checkpoints.whole():
        for name in read_marker(path)["files"]:
            if name != "config.yaml":
                assert (path / name).read_bytes() == (slow.checkpoints.directory / path.name / name).read_bytes()
    assert slow.checkpoints.steps()[-3:] == clean.checkpoints.steps()


def test_the_next_save_waits_for_the_one_before_and_says_so(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run = start(tiny.config(tmp_path, shards))
    held = threading.Event()
    run.saver._thread.submit(held.wait)
    began = time.monotonic()
    run.saver.begin(TrainState(1))
    assert not run.saver.done
    threading.Timer(1.5, held.set).start()
    run.saver.begin(TrainState(2))
    assert time.monotonic() - began > 1.5
    assert re.search(r"waited \d\.\d s until step 1 was saved, to save step 2", caplog.text)
    run.saver.settle()
    assert run.checkpoints.steps() == [1, 2]


def test_each_whole_checkpoint_is_told_once_in_the_training_thread(shards: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, bool]] = []

    def tell(path: Path, step: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((path.name, step, (path / MARKER).exists()))

    train(build_run(open_run(tiny.config(tmp_path, shards)), CPU, tell))
    assert told == [(f"step_{step:08d}", step, True) for step in (2, 4, 6)]


def test_a_run_that_ends_with_an_error_still_completes_the_save_in_flight(shards: Path, tmp_path: Path) -> None:
    run = start(tiny.config(tmp_path, shards))
    threading.Timer(0.3, (held := threading.Event()).set).start()
    run.saver._thread.submit(held.wait)
    run.saver.begin(TrainState(3))
    with pytest.raises(KeyboardInterrupt), run.saver:
        raise KeyboardInterrupt
    assert run.checkpoints.steps() == [3]


@pytest.mark.multiprocess
@pytest.mark.deepspeed
def test_a_resumed_sharded_run_is_the_uninterrupted_one_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    opened = [
        open_run(tiny.config(tmp_path, shards, **SHARDED, **{"run.name": name, "train.steps": 12}))
        for name in ("uninterrupted", "resumed")
    ]
    assert run_ranks(2, _stop_and_resume, opened) == [6, 6]
    newest = [each.directory / "checkpoints" / "step_00000012" for each in opened]
    names = sorted(path.name for path in newest[0].glob("*.safetensors"))
    assert names == [EMA_FILE, "state-0000-of-0002.safetensors", "state-0001-of-0002.safetensors"]
    for name in names:
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name
    curves = [
        [(line["step"], line["train/loss"]) for line in read_metrics(each.directory / "metrics.jsonl")]
        for each in opened
    ]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[0]] == list(range(1, 13))
    # The whole EMA, which was put together from the files of both ranks, is that of the plain engine's format.
    plain = start(tiny.config(tmp_path, shards, **{"run.name": "resumed", "train.steps": 12}))
    ema = safetensors.torch.load_file(newest[0] / EMA_FILE)
    expected = plain.ema_weights()
    assert ema.keys() == expected.keys()
    assert all(torch.equal(ema[name], expected[name]) for name in expected)


def _stop_and_resume(rank: int, opened: list[OpenRun]) -> int:
    uninterrupted, resumed = opened
    train(build_run(uninterrupted, CPU))
    train(replace(build_run(resumed, CPU), steps=6))
    run = build_run(resumed, CPU)
    step = run.state.step
    train(run)
    return step


# --- whole or absent ---

# One rank of the plain engine, and two of a sharded one, whose files come from both.
KILLED = [
    (1, {}, 0),
    *(pytest.param(2, SHARDED, seed, marks=[pytest.mark.slow, pytest.mark.deepspeed]) for seed in range(3)),
]


@pytest.mark.multiprocess
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "engine", "seed"), KILLED)
def test_a_kill_of_any_rank_at_any_instant_leaves_a_whole_checkpoint(
    world: int, engine: dict[str, Any], seed: int, shards: Path, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path, shards, **{"train.steps": 1_000_000})
    opened = open_run(tiny.config(tmp_path, shards, **engine, **{"train.steps": 1_000_000}))
    chance, newest, unfinished = random.Random(seed), 0, []
    # At least 20 times, and until kills did fall into the middle of a save, at different stages of it, and many saves
    # came to their end. On a busy machine a round sees few of them, so a round lasts longer each time.
    for number in count():
        if number >= 20 and newest > 20 and len(unfinished) > 5 and len(set(unfinished)) > 2:
            break
        (meeting := tmp_path / f"meeting-{number}").mkdir()
        ranks = start_savers(world, opened, meeting)
        time.sleep(chance.uniform(0.0, 0.15) * (1 + number / 20))
        for rank in chance.choice([ranks, ranks[:1], ranks[1:]]):
            rank.kill()
        time.sleep(chance.uniform(0.0, 0.05))  # the survivor may go on for a while: its save must come to nothing
        for rank in ranks:
            rank.kill()
            rank.join()
        left = {path.name: len(list(path.iterdir())) for path in (tmp_path / "tiny/checkpoints").glob("step_*")}
        run = start(config)  # verifies and reads the newest checkpoint, or raises: a plain engine on one process
        unfinished += [files for name, files in left.items() if name not in map(_name, run.checkpoints.whole())]
        assert run.state.step >= newest
        newest = run.state.step
        if newest:
            assert_filled(run, newest)
        for path in run.checkpoints.whole():
            marker = read_marker(path)
            for name in marker["files"]:
                verify_file(path, name, marker)
    assert not list((tmp_path / "tiny/checkpoints").glob("damaged-*"))
    run = start(config)
    run.saver.begin(TrainState(newest + 1))
    run.saver.settle()
    assert list(map(_name, sorted((tmp_path / "tiny/checkpoints").iterdir()))) == list(
        map(_name, run.checkpoints.whole())
    )


def _name(path: Path) -> str:
    return path.name


# --- failures ---


@pytest.mark.multiprocess
@pytest.mark.deepspeed
def test_all_ranks_judge_alike_of_saves_that_fail_on_one(shards: Path, tmp_path: Path) -> None:
    opened = open_run(tiny.config(tmp_path, shards, **SHARDED))
    sentence, other = run_ranks(2, _fail_on_rank_one, opened)
    assert sentence == other
    assert sentence.startswith("Saving step 5 failed on rank 1: Cannot write ")
    assert "state-0001-of-0002.safetensors: File too large; free space or choose another directory. " in sentence
    assert sentence.endswith(
        f"Nothing was lost: the last good checkpoint is {tmp_path}/tiny/checkpoints/step_00000002."
    )


def _fail_on_rank_one(rank: int, opened: OpenRun) -> str:
    run = build_run(opened, CPU)

    def save(step: int, fails: bool) -> None:
        with no_file_larger_than(1000 if fails and rank == 1 else resource.RLIM_INFINITY):
            run.saver.begin(TrainState(step))
            run.saver.settle()

    save(1, fails=True)
    assert (run.saver.failed, run.checkpoints.whole()) == (1, [])
    save(2, fails=False)
    save(3, fails=True)  # the first in a row
    save(4, fails=True)
    assert run.saver.failed == 3
    with pytest.raises(StorageError) as raised:
        save(5, fails=True)
    assert run.checkpoints.steps() == [2]
    return str(raised.value)


def test_failed_saves_are_warned_of_and_counted_in_the_record(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(tiny.config(tmp_path, shards))
    with no_file_larger_than(1000):
        run.saver.begin(TrainState(0))
        run.saver.settle()
    assert "warning: Saving step 0 failed on rank 0: Cannot write " in caplog.text
    assert "Training goes on" in caplog.text
    train(run)
    assert run.checkpoints.steps() == [2, 4, 6]
    assert [line["checkpoint/failed_saves"] for line in read_metrics(tmp_path / "tiny/metrics.jsonl")] == [1] * 6


def test_a_line_of_metrics_that_fits_in_part_is_written_whole_later(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(file, resume_step=0)
    tracker.log(1, {"train/loss": 1.0})
    whole = file.read_bytes()
    with no_file_larger_than(len(whole) + 5):
        tracker.log(2, {"train/loss": 0.5})
    assert file.read_bytes() == whole  # and not half a line
    tracker.log(3, {"train/loss": 0.25})
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]


@pytest.mark.parametrize("settle", [lambda saver: None, Saver.settle], ids=["in flight", "settled"])
def test_the_last_save_must_not_fail(settle: Callable[[Saver], None], shards: Path, tmp_path: Path) -> None:
    saver = start(tiny.config(tmp_path, shards)).saver
    with no_file_larger_than(1000):
        saver.begin(TrainState(6))
        settle(saver)
        with pytest.raises(StorageError, match=r"Saving step 6 .* there is no earlier checkpoint"), saver:
            pass


def test_an_error_of_any_other_kind_is_a_failed_save_too(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other ranks wait for this one's outcome, so it must have one."""
    run = start(tiny.config(tmp_path, shards))
    run.saver._host["a/key/0"] = torch.zeros(3, dtype=torch.float64)  # no state is like this
    run.saver.begin(TrainState(2))
    run.saver.settle()
    assert run.saver.failed == 1
    assert "Saving step 2 failed on rank 0: AssertionError" in caplog.text


# --- retention ---


def test_every_mth_checkpoint_is_kept_for_good(shards: Path, tmp_path: Path) -> None:
    keep = {"checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 3, "train.steps": 8}
    run = start(tiny.config(tmp_path, shards, **keep))
    train(run)
    assert run.checkpoints.kept(run.checkpoints.steps()) == {3: ["every 3"], 6: ["every 3"], 8: ["newest"]}
    assert run.checkpoints.steps() == [3, 6, 8]


def test_steps_that_are_not_saved_cannot_be_kept(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep_every=3 must be a multiple of every=2, .*; change one of them"):
        tiny.config(tmp_path, shards, **{"checkpoint.keep_every": 3})


# --- the format ---

SHAPES = st.dictionaries(st.text(min_size=1, max_size=20), st.lists(st.integers(0, 5), max_size=3), max_size=5)


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES)
def test_what_is_written_is_what_safetensors_reads(
    shapes: dict[str, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("format") / "x.safetensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    record = write_tensors(path, shapes, iter(tensors.values()))
    assert record["x.safetensors"]["bytes"] == path.stat().st_size
    verify_file(path.parent, path.name, {"files": record})
    found = safetensors.torch.load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as reader:
        assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0
        assert set(reader.keys()) == set(tensors)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_writer_never_takes_a_higher_priority_than_its_process_has() -> None:
    def niceness(before: int) -> int:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, before)
        _be_nice()
        return os.getpriority(os.PRIO_PROCESS, thread)

    for before, after in ((3, 13), (15, 19)):  # 15 is what Ray gives its workers, and only root may lower it
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(niceness, before).result() == after
