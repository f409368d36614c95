"""One process at a time works in a directory: a second one is refused, and a dead one keeps nothing."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from eqm_dist.errors import BusyError
from eqm_dist.storage import lease
from eqm_dist.storage.lease import LEASE_FILE, Holder, hold
from tests import tiny

HOLDER = """
import sys, time
from pathlib import Path
from eqm_dist.storage import lease
lease.BEAT_S = 0.2
with lease.hold(Path(sys.argv[1]), "The thing", "take another"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def another_process(directory: Path, seconds: float = 60) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the directory for so long."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), str(seconds)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def take(directory: Path) -> None:
    """Hold the directory for a moment."""
    with hold(directory, "The thing", "take another"):
        pass


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)


def of_another_machine(directory: Path) -> Path:
    """The file of a holder elsewhere."""
    holder = Holder("1" * 32, "elsewhere", 7, "another machine", 0.0, "2026-01-01 00:00:00", "train.py")
    directory.mkdir(exist_ok=True)
    file = directory / LEASE_FILE
    file.write_text(json.dumps(dataclasses.asdict(holder)))
    return file


def test_a_second_process_is_told_who_holds_it(tmp_path: Path) -> None:
    with another_process(tmp_path) as process, pytest.raises(BusyError) as refused:
        take(tmp_path)
    assert str(refused.value).startswith(f"The thing is held by process {process.pid} on ")
    assert str(refused.value).endswith("; wait until it ends, stop it, or take another.")
    take(tmp_path)  # it was killed


def test_what_ends_leaves_nothing_behind(tmp_path: Path) -> None:
    take(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), hold(tmp_path, "The thing", "take another"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    with hold(tmp_path, "The thing", "take another"):
        file = tmp_path / LEASE_FILE
        holder = Holder(**json.loads(file.read_text()))
        assert not holder.gone
        assert dataclasses.replace(holder, started=holder.started - 100).gone


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_clock_that_is_set_does_not_make_a_living_holder_a_dead_one(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process starts so long after its machine, and the system's word for when that was moves with the clock."""
    with another_process(tmp_path):
        started = psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: started + seconds)
        with pytest.raises(BusyError):
            take(tmp_path)


@contextmanager
def living(file: Path) -> Iterator[None]:
    """A holder elsewhere that gives its signs of life."""
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("short_lease")
def test_another_machine_or_container_of_the_same_name_is_not_looked_for_here(tmp_path: Path) -> None:
    """Containers on the network of their machine have its name and processes of their own."""
    file = of_another_machine(tmp_path)
    holder = Holder(**json.loads(file.read_text()))
    file.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(holder, host=socket.gethostname()))))
    with living(file), pytest.raises(BusyError, match="held by process 7"):
        take(tmp_path)


def test_a_process_that_ended_and_that_nobody_asked_for_holds_nothing(tmp_path: Path) -> None:
    """As long as its parent does not wait for it, its number stays taken."""
    with another_process(tmp_path) as process:
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        take(tmp_path)


@pytest.mark.usefixtures("short_lease")
def test_a_holder_elsewhere_that_gives_no_sign_of_life_is_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_another_machine(tmp_path)
    take(tmp_path)
    assert "process 7 on elsewhere since 2026-01-01 00:00:00 (train.py), which gives no sign of life" in caplog.text


@pytest.mark.usefixtures("short_lease")
def test_a_holder_elsewhere_that_lives_is_not_disturbed(tmp_path: Path) -> None:
    file = of_another_machine(tmp_path)
    with living(file), pytest.raises(BusyError, match="held by process 7 on elsewhere"):
        take(tmp_path)
    assert json.loads(file.read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("content", ["", "null", "[]", '{"id": 1}', "not json", "[" * 60_000, " " * 100_000 + "{}"])
def test_a_file_that_says_nothing_holds_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / LEASE_FILE).write_text(content)
    take(tmp_path)


@pytest.mark.usefixtures("short_lease")
@pytest.mark.parametrize("dead", [False, True])
def test_of_several_that_come_at_once_one_has_it(dead: bool, tmp_path: Path) -> None:
    if dead:
        of_another_machine(tmp_path)
    start, outcomes = threading.Barrier(8), []
    inside = []

    def contend() -> None:
        start.wait()
        try:
            with hold(tmp_path, "The thing", "take another"):
                inside.append(1)
                time.sleep(1.0)
                outcomes.append("held")
        except BusyError:
            outcomes.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", *["refused"] * 7]
    assert inside == [1]


def test_a_process_that_was_frozen_until_another_took_over_ends(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        of_another_machine(tmp_path)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 1
    assert "error: The thing was taken over by process 7 on elsewhere" in err
    assert err.count("\n") == 1


def test_a_second_run_of_one_name_is_refused_and_changes_nothing(tmp_path: Path, shards: Path) -> None:
    overrides = tiny.flags(tiny.overrides(tmp_path, shards))
    assert tiny.train(*overrides).code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny").rglob("*") if path.is_file()}
    with another_process(tmp_path / "tiny") as process:
        refused = tiny.train(*overrides)
        assert refused.code == 1
        assert f"The run tiny is held by process {process.pid} on" in refused.err
        assert refused.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_blots(tmp_path_factory.mktemp("shards"))
