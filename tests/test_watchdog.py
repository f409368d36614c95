"""Workers that stand still: found, told apart from those that only take long, described and ended."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eqm_dist.launch.watchdog import Watchdog
from tests.processes import wait_for

DEADLINE_S = 2.0
PATIENT_S = 4.0
"""Where a worker must not be ended, however busy the machine is."""

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from eqm_dist.launch.watchdog import Watchdog

def stands_still():
    time.sleep(1000)

def work():
    with Watchdog(1, {deadline_s}, Path({log!r})) as watchdog:
        for step in range(5):
            watchdog.beat(step + 1, "training")
        {then}

thread = threading.Thread(target=work)  # as in a Ray worker, whose main thread answers Ray
thread.start()
thread.join()
"""


def start(log: Path, then: str, deadline_s: float = DEADLINE_S) -> subprocess.Popen[bytes]:
    program = PROGRAM.format(deadline_s=deadline_s, log=str(log), then=then)
    return subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1])


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "rank-0000.log"


def test_a_process_stopped_by_a_signal_is_named_and_ended(log: Path) -> None:
    # A thread may run on for a moment after it has stopped its process.
    process = start(log, "os.kill(os.getpid(), signal.SIGSTOP); stands_still()")
    assert process.wait(timeout=120) == -signal.SIGKILL
    sentence = await_text(log)
    assert re.fullmatch(
        rf"..:..:.. warning: rank 1 on \S+ \(process {process.pid}\) has made no step for \d+ s, after step 5: it was"
        r" stopped by a signal; ended, so that the run restarts\n",
        sentence,
    )


def test_where_a_worker_hangs_is_said_and_its_stacks_are_kept(log: Path) -> None:
    process = start(log, "stands_still()")
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert "after step 5: it is in stands_still (<string>:7); ended" in await_text(log)
    stacks = await_text(log.with_name("rank-0001.stacks"))
    assert "in stands_still" in stacks
    assert "in _wait_for_tstate_lock" in stacks or "in join" in stacks  # the other thread's too


def test_what_takes_its_time_is_left_alone(log: Path) -> None:
    phases = ["starting", "saving", "evaluating", "finishing"]
    process = start(log, f"[(watchdog.beat(5, doing), time.sleep({1.25 * DEADLINE_S})) for doing in {phases}]")
    assert process.wait(timeout=120) == 0
    assert not log.exists()


def test_steps_within_the_deadline_are_left_alone(log: Path) -> None:
    # Many beats in a deadline and a half, so that one of them may be late by almost all of it on a busy machine.
    end = f"end = time.monotonic() + {1.5 * PATIENT_S}"
    beats = "while time.monotonic() < end: watchdog.beat(6, 'training'); time.sleep(0.02)"
    assert start(log, f"{end}\n        {beats}", PATIENT_S).wait(timeout=120) == 0
    assert not log.exists()


def test_the_watchdog_ends_with_its_worker(log: Path) -> None:
    process = start(log, "watchdog.beat(5, 'evaluating'); stands_still()")
    wait_for(lambda: bool(watchdogs_of(process.pid)))
    (watchdog,) = watchdogs_of(process.pid)
    process.kill()
    process.wait()
    watchdog.wait(timeout=60)
    assert not log.exists()


def test_a_watchdog_is_cheap_and_leaves_nothing(log: Path) -> None:
    before = psutil.Process().children(), psutil.Process().num_fds()
    began = time.thread_time()  # which stands still while others have the core
    with Watchdog(0, 600, log) as watchdog:
        for step in range(10_000):
            watchdog.beat(step, "training")
    assert time.thread_time() - began < 5  # ten thousand steps; a beat is some microseconds
    assert (psutil.Process().children(), psutil.Process().num_fds()) == before


TWO = """
import sys, time
from pathlib import Path
from eqm_dist.launch.watchdog import Watchdog

class Norm:
    def item(self):  # under NCCL the host waits for the others here
        time.sleep(1000)

def loads_a_batch():
    time.sleep(1000)

rank = int(sys.argv[1])
with Watchdog(rank, {deadline_s}, Path({log!r})) as watchdog:
    for step in range(3):
        watchdog.join()
        watchdog.beat(step + 1, "training")
    if rank == {hangs}:
        loads_a_batch()
    {waits}
"""


@pytest.mark.parametrize(
    ("waits", "hangs"),
    [
        ("watchdog.join(); Norm().item()", 1),
        # Without a guard the host runs ahead until the device's queue is full: further on, and in no update.
        ("watchdog.beat(4, 'training'); time.sleep(1000)", 0),
    ],
)
def test_who_reads_a_value_that_another_rank_holds_up_is_not_blamed(log: Path, waits: str, hangs: int) -> None:
    program = TWO.format(deadline_s=DEADLINE_S, log=str(log), waits=waits, hangs=hangs)
    ranks = [subprocess.Popen([sys.executable, "-c", program, str(r)], cwd=Path(__file__).parents[1]) for r in (0, 1)]
    try:
        assert ranks[hangs].wait(timeout=120) == -signal.SIGKILL
        assert ranks[1 - hangs].poll() is None
        assert re.search(rf"warning: rank {hangs} on .*, after step 3: it is in loads_a_batch", await_text(log))
        assert log.read_text().count("\n") == 1
        # Who hears of nobody that is found is ended after all, and says whom it waited for.
        assert ranks[1 - hangs].wait(timeout=60) == -signal.SIGKILL
        wait_for(lambda: log.read_text().count("\n") == 2)
        assert f", and rank {hangs} has come less far; ended" in log.read_text()
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_what_an_attempt_before_has_left_blames_nobody(log: Path) -> None:
    log.with_name("rank-0007.late").write_text(f"1 0 {time.time()}")
    process = start(log, "stands_still()")
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert "it is in stands_still (<string>:7); ended" in await_text(log)


RANK = """
import os, signal, sys, time
from pathlib import Path
import torch, torch.distributed as dist
from eqm_dist.launch.watchdog import Watchdog

rank, then = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://{rendezvous}", rank=rank, world_size=2)
with Watchdog(rank, {deadline_s}, Path({log!r})) as watchdog:
    for step in range(3):
        dist.all_reduce(torch.ones(1))
        watchdog.beat(step + 1, "training")
    if rank == 1:
        if then == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        watchdog.beat(3, "evaluating")  # far too long, and nobody looks after it
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("then", ["stops", "sleeps"])
def test_the_rank_that_hangs_is_ended_and_not_the_one_that_waits_for_it(tmp_path: Path, log: Path, then: str) -> None:
    program = RANK.format(rendezvous=tmp_path / "rendezvous", deadline_s=DEADLINE_S, log=str(log))
    errors = [(tmp_path / f"{rank}.err").open("w") for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), then], cwd=Path(__file__).parents[1], stderr=file)
        for rank, file in enumerate(errors)
    ]
    try:
        ranks[0].wait(timeout=240)
        if then == "stops":
            assert ranks[1].wait(timeout=60) == -signal.SIGKILL
            assert ranks[0].returncode == 1  # it has heard that its connection is gone, as Ray would
            assert "RuntimeError" in (tmp_path / "0.err").read_text()
            assert log.read_text().count("\n") == 1
            assert "warning: rank 1 on " in log.read_text()
        else:  # where nobody else is found in time, the one that waits is ended after all
            assert ranks[0].returncode == -signal.SIGKILL
            assert "warning: rank 0 on " in await_text(log)
            assert "after step 3: it waits for the other ranks in all_reduce; ended" in log.read_text()
    finally:
        for process, file in zip(ranks, errors, strict=True):
            process.kill()
            process.wait()
            file.close()


def watchdogs_of(pid: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(pid).children() if "watchdog.py" in " ".join(child.cmdline())]


def await_text(file: Path) -> str:
    """What the watchdog wrote, which is after it has ended the worker."""
    wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
    return file.read_text()
