"""What reaches a user's terminal is ours: what other packages print of a lost worker stays with them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import tiny
from tests.processes import wait_for

ROOT = Path(__file__).parents[1]
LINES = re.compile(
    r"|..:..:.. (run tiny starts, .*|saved step .*|step .* of .*|drew .*"
    r"|warning: worker \d on \S+ \(127\.0\.0\.1\) was killed or crashed; failure 1 of 3 in a row, restarting .*)"
    r"|(run tiny|.*/out) is complete|  [A-Za-z ]{4,14} .*"
)


def started(command: list[str], log: Path) -> subprocess.Popen[str]:
    """A command on a cluster of its own, both of whose streams go into a file as into a terminal."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env={**os.environ, "RAY_ADDRESS": "local"}, stdout=file,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


def workers(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if child.name().startswith(f"ray::{name}")]


def foreign(log: Path) -> list[str]:
    """The lines that are none of ours."""
    return [line for line in log.read_text().splitlines() if not LINES.fullmatch(line)]


@pytest.mark.slow  # starts Ray
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_that_loses_a_worker_says_so_once_and_listens_to_nobody_elsewhere(shards: Path, tmp_path: Path) -> None:
    overrides = tiny.overrides(tmp_path, shards, **{"train.steps": 600, "train.log_every": 20, "checkpoint.every": 100})
    flags = tiny.flags({**overrides, "launch.launcher": "ray", "launch.workers": 2, "track.mlflow": True})
    log = tmp_path / "terminal"
    run = started(["pipelines/train.py", *flags], log)
    wait_for(lambda: " loss " in log.read_text(), run)
    everything = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    sockets = [socket for process in everything for socket in process.net_connections("tcp")]
    listening = {socket.laddr.ip for socket in sockets if socket.status == "LISTEN"}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    workers(run, "RayTrainWorker")[0].send_signal(signal.SIGKILL)
    assert run.wait(timeout=240) == 0
    assert foreign(log) == []
    assert log.read_text().count("warning: ") == 1
    assert "restarts: 1" in log.read_text()


@pytest.mark.slow  # starts Ray
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_set_of_images_that_loses_an_actor_says_nothing_of_it(shards: Path, tmp_path: Path) -> None:
    run, log = tiny.trained(tmp_path / "runs", shards), tmp_path / "terminal"
    command = ["pipelines/sample.py", "--model", str(run), "--samples", "5000", "--out", str(tmp_path / "out")]
    drawing = started(command, log)
    wait_for(lambda: list((tmp_path / "out").glob(".units/*.json")), drawing)
    workers(drawing, "_Actor")[0].send_signal(signal.SIGKILL)
    assert drawing.wait(timeout=240) == 0
    assert foreign(log) == []
