"""What happens to the runs of ``chaos``: one function for each row of its table.

A scenario gets a run that has been submitted, waits for the right moment and strikes. What it does not undo is undone
before the next one.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.lab import faults, lab, layout
from cluster.lab.watched_run import WatchedRun

FAULT_STEP = 130
"""Ten steps after a checkpoint, and ten before the next."""
SAVE_STEP = 120
"""A checkpoint is saved and copied here."""
CUT_S = 60
KILL_EVERY_S, KILLS = 60, 10


class Trouble:
    """A run, and when faults struck it."""

    def __init__(self, run: WatchedRun) -> None:
        self.run = run
        self.times: list[float] = []

    def strike(self, fault: Callable[..., None], *arguments: Any) -> None:
        """Cause a fault, and remember when."""
        self.times.append(time.monotonic())
        fault(*arguments)


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Attributes:
        text: what happens.
        play: makes it happen.
        steps: length of the run.
        rate_mbit: of the workers' network cables, which sets the pace of the run and leaves the processors alone.
        workers: hosts beside the head at the start.
        same_workers: whether the number of workers stays what it was, so that the losses stay the same bit for bit.
        flags: of the run, by dotted key.
    """

    text: str
    play: Callable[[Trouble], None]
    steps: int
    rate_mbit: float
    workers: int
    same_workers: bool
    flags: Mapping[str, Any]


SCENARIOS: dict[str, Scenario] = {}


def _scenario(
    text: str, *, steps: int = 300, rate_mbit: float = 50, workers: int = 2, elastic: bool = False, **flags: Any
) -> Callable[[Callable[[Trouble], None]], Callable[[Trouble], None]]:
    def enter(play: Callable[[Trouble], None]) -> Callable[[Trouble], None]:
        launch = {"launch.workers": "[1,3]", "launch.resize_check_s": 15} if elastic else {"launch.workers": 2}
        others = {key.replace("__", "."): value for key, value in flags.items()}
        SCENARIOS[play.__name__] = Scenario(text, play, steps, rate_mbit, workers, not elastic, {**launch, **others})
        return play

    return enter


@_scenario("kill -9 of a worker process")
def kill_rank(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.kill_rank, 1)


@_scenario("kill -9 of a raylet; its host starts another")
def kill_raylet(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.kill_raylet, layout.worker(2))


@_scenario("power-off of a worker host, for good; elastic", elastic=True)
def kill_host(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.kill_host, layout.worker(2))


@_scenario("power-off of a worker host, on again 20 s later; two workers, no more and no fewer")
def kill_host_for_a_while(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.kill_host, layout.worker(2))
    time.sleep(20)
    faults.start_host(layout.worker(2))


@_scenario("kill -9 of the driver; the same command again")
def kill_driver(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.kill_driver)
    trouble.run.wait()
    trouble.run.submit()


@_scenario(f"network of a worker host cut for {CUT_S} s; elastic", steps=1500, elastic=True)
def cut(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.cut, layout.worker(2))
    time.sleep(CUT_S)
    faults.restore(layout.worker(2))


@_scenario("SIGSTOP of a rank", launch__hang_deadline_s=20)
def freeze(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.freeze, 1)


@_scenario("a third host joins; elastic", steps=1500, elastic=True)
def join(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.start_host, layout.worker(3))


MIRROR = f"s3://{layout.BUCKET}/runs"


@_scenario("S3 answers 500 for 15 s, from within a save on", checkpoint__mirror=MIRROR, checkpoint__mirror_deadline_s=5)
def break_s3(trouble: Trouble) -> None:
    trouble.run.reach(SAVE_STEP)
    trouble.strike(faults.break_s3)
    time.sleep(15)
    faults.mend_s3()


@_scenario("local disk of one host full, to the end")
def fill_local_disk(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.fill_disk, layout.worker(2))


@_scenario("shared disk full for 3 s", rate_mbit=10)
def fill_shared_disk(trouble: Trouble) -> None:
    trouble.run.reach(FAULT_STEP)
    trouble.strike(faults.fill_disk, None)
    time.sleep(3)  # of 20 steps and a save; the record of the steps is on that disk too
    faults.free_disk(None)


@_scenario(
    f"kill -9 of a random rank every {KILL_EVERY_S} s, {KILLS} times", steps=1500, rate_mbit=10, launch__max_failures=-1
)
def kill_again_and_again(trouble: Trouble) -> None:
    draw = random.Random(0)  # noqa: S311 (no secret)
    trouble.run.reach(1)
    begin = time.monotonic()
    for number in range(1, KILLS + 1):
        time.sleep(max(0.0, begin + number * KILL_EVERY_S - time.monotonic()))
        rank = draw.randrange(2)
        lab.wait_until(partial(_rank_runs_or_ended, trouble.run, rank), f"rank {rank}, to kill it")
        if not trouble.run.ended():
            trouble.strike(faults.kill_rank, rank)


def _rank_runs_or_ended(run: WatchedRun, rank: int) -> bool:
    return run.ended() or faults.rank_runs(rank)
