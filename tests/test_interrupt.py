"""Ctrl-C, or a scheduler's SIGTERM: the run saves where it is and ends, and the same command goes on from there."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.checkpoint import Checkpoints
from tests import tiny

ROOT = Path(__file__).parents[1]


def interrupted(
    root: Path, shards: Path, *more: str, by: signal.Signals = signal.SIGINT, wait_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Start a long run in a process group of its own, and send the group what a terminal sends it on Ctrl-C, or the
    process what a scheduler sends it."""
    flags = tiny.flags(tiny.overrides(root, shards, **LONG))
    process = subprocess.Popen(
        [sys.executable, "pipelines/train.py", *flags, *more],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    metrics = root / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + wait_s
    while not metrics.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, by) if by == signal.SIGINT else process.send_signal(by)
    out, err = process.communicate(timeout=150)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


LONG = {"train.steps": 1_000_000, "train.log_every": 10, "checkpoint.every": 1_000_000, "track.mlflow": True,
        "optimizer.schedule": "constant"}  # fmt: skip


SAID = {
    signal.SIGINT: (130, "interrupted", "Ctrl-C"),
    signal.SIGTERM: (143, "terminated", "SIGTERM"),
}
LINES = re.compile(
    r"..:..:.. (run tiny (starts|stopped at).*|saved step .*|step .* of .*)"  # and nothing of other packages
)


def check(root: Path, ended: subprocess.CompletedProcess[str], by: signal.Signals = signal.SIGINT) -> int:
    """What an interrupt leaves: exit code, one sentence, MLflow's status, a whole checkpoint; returns its step."""
    code, word, again = SAID[by]
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert ended.stderr.splitlines() == [
        f"{word}: the run saves a checkpoint and ends; {again} again ends it at once",
        f"{word}; run the same command again to resume.",
    ]
    assert [line for line in ended.stdout.splitlines() if not LINES.fullmatch(line)] == []
    with sqlite3.connect(root / "mlflow.db") as store:
        assert store.execute("select status from runs").fetchall() == [("KILLED",)]
    [step] = Checkpoints(root / "tiny" / "checkpoints", keep=1).steps()
    assert f"run tiny stopped at step {step:,}, which is saved" in ended.stdout
    assert not (root / "tiny" / "result.json").exists()
    return step


def test_an_interrupted_run_is_saved_and_goes_on(tmp_path: Path, shards: Path) -> None:
    step = check(tmp_path, interrupted(tmp_path, shards))
    overrides = tiny.overrides(tmp_path, shards, **{**LONG, "train.steps": step + 20})
    again = tiny.train(*tiny.flags(overrides))
    assert again.code == 0, again.err
    assert f"resumes at step {step:,}" in again.out
    straight = tmp_path / "straight"
    assert tiny.train(*tiny.flags({**overrides, "run.root": str(straight)})).code == 0
    last = [list(read_metrics(root / "tiny" / "metrics.jsonl"))[-1]["train/loss"] for root in (tmp_path, straight)]
    assert last[0] == last[1]


def test_a_run_that_a_scheduler_ends_is_saved(tmp_path: Path, shards: Path) -> None:
    assert check(tmp_path, interrupted(tmp_path, shards, by=signal.SIGTERM), signal.SIGTERM) > 0


@pytest.mark.slow  # starts Ray
@pytest.mark.ray
@pytest.mark.parametrize("by", list(SAID))
def test_an_interrupted_run_on_ray_is_saved_and_leaves_no_process(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ended = interrupted(tmp_path, shards, "--launcher", "ray", "--launch.workers", "2", by=by, wait_s=150)
    assert check(tmp_path, ended, by) % 10 == 0
    time.sleep(3)
    left = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    assert not re.search(rf"{tmp_path}.*(raylet|gcs_server)", left)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_blots(tmp_path_factory.mktemp("shards"))
