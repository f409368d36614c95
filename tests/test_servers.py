"""A server that the project starts is for this user on this machine, and runs nothing that it need not."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eqm_dist.track.mlflow import close_run, default_uri, open_run
from tests.processes import wait_for
from tests.test_track import free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[psutil.Process, int, str]]:
    """``make ui`` in a directory of a name that no address bears: its process, its port, and a run that it shows."""
    place = tmp_path_factory.mktemp("a%b what?")
    directory = place / "runs" / "one"
    directory.mkdir(parents=True)
    uri = default_uri(place / "runs")
    run = open_run(
        directory, name="one", tracking_uri=uri, experiment="e", params={}, config_yaml="a: 1\n", timeout_s=60
    )
    close_run(run, "FINISHED")
    port, venv = free_port(), Path(sys.executable).parents[1]
    make = ["make", "--file", str(ROOT / "Makefile"), "--assume-old", f"{venv}/.installed", "ui",
            f"VENV={venv}", f"UI_PORT={port}"]  # fmt: skip
    with (place / "log").open("wb") as log:
        started = subprocess.Popen(make, cwd=place, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: started.poll() is not None or answer(port, "/health") == b"OK")
        assert started.poll() is None, (place / "log").read_text()
        yield psutil.Process(started.pid), port, run.run_id
    finally:
        os.killpg(started.pid, signal.SIGINT)
        assert started.wait(timeout=60) != 0
    assert not psutil.pid_exists(started.pid)
    assert sorted(path.name for path in place.iterdir()) == ["log", "runs"]


def answer(port: int, path: str, **headers: str) -> bytes | None:
    """What the server says; None where it does not answer, its code where it refuses."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as found:
            return found.read()
    except urllib.error.HTTPError as error:
        with error:
            return str(error.code).encode()
    except OSError:
        return None


@pytest.mark.multiprocess
def test_the_ui_shows_a_run_with_its_files(ui: tuple[psutil.Process, int, str]) -> None:
    _, port, run = ui
    assert b'"status": "FINISHED"' in (answer(port, f"/api/2.0/mlflow/runs/get?run_id={run}") or b"")
    assert answer(port, f"/get-artifact?run_uuid={run}&path=config.yaml") == b"a: 1\n"


@pytest.mark.multiprocess
def test_the_ui_is_reached_from_this_machine_by_its_name_alone(ui: tuple[psutil.Process, int, str]) -> None:
    process, port, _ = ui
    processes = [process, *process.children(recursive=True)]
    sockets = [socket for each in processes for socket in each.net_connections("all")]
    assert {socket.laddr for socket in sockets if socket.status == "LISTEN"} == {("127.0.0.1", port)}
    assert answer(port, "/api/2.0/mlflow/experiments/get?experiment_id=0", Host="evil.example") == b"403"
    assert answer(port, "/api/2.0/mlflow-artifacts/artifacts") != b"200"


@pytest.mark.multiprocess
def test_the_ui_is_one_server_and_no_queue_of_jobs(ui: tuple[psutil.Process, int, str]) -> None:
    commands = [" ".join(child.cmdline()) for child in ui[0].children(recursive=True)]
    assert not [command for command in commands if "huey" in command or "job" in command], commands
    assert len(commands) <= 4, commands  # mlflow, uvicorn, its worker and what watches it
