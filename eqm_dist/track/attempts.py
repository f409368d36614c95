"""What interruptions cost a run: restarts, steps done again, and the share of its time that made progress.

``attempts.jsonl`` has a line for each time that the run was begun, begun again, or sent back by the guard:

    {"time": 1763892000.0, "boot": "0a832431-aba2-...", "up_s": 86400.0, "step": 120, "reached": 137, "workers": 2}

It goes on from ``step`` on so many workers (the same ones, without a number, after the guard), when the record had come
to step ``reached``. How long steps took is in ``metrics.jsonl``, from which steps that are done again are dropped.

Clocks are set, so time is what the machine counts since its start, ``up_s``. Only from one start of a machine to the
next, or from one machine to another, it is the difference of their clocks.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from eqm_dist.documents import to_json
from eqm_dist.errors import DataError
from eqm_dist.storage.boot import boot, seconds_up
from eqm_dist.storage.files import atomic_write
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.loop import Tracker

STEP_TIME = "time/step_s"


@dataclass(frozen=True)
class Moment:
    """Now, by the clock and by what no clock shifts.

    Attributes:
        time: seconds since 1970.
        boot: name of the machine since its start; empty where the system gives none.
        up_s: seconds since that.
    """

    time: float
    boot: str
    up_s: float

    @classmethod
    def now(cls) -> "Moment":
        """This one."""
        return cls(time.time(), boot(), seconds_up())

    def until(self, later: "Moment") -> float:
        """Seconds; none where a clock says less."""
        counted = bool(self.boot) and self.boot == later.boot
        return max(0.0, later.up_s - self.up_s if counted else later.time - self.time)


class Attempts:
    """The attempts of one run, this one the last.

    Args:
        file: ``attempts.jsonl``, to which this attempt is added.
        record: the lines of ``metrics.jsonl`` as the attempt before left them.
        step: where this attempt begins.
        workers: their number.
        clock: the present moment.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(
        self,
        file: Path,
        record: Iterable[Mapping[str, Any]],
        step: int,
        workers: int,
        clock: Callable[[], Moment] = Moment.now,
    ) -> None:
        self._file, self._clock = file, clock
        self._lines = list(read_metrics(file))
        if not all(_is_attempt(line) for line in self._lines):
            raise DataError(f"Every line of {file} must say the time and the step reached; delete the file.")
        intervals = [(line["step"], line[STEP_TIME]) for line in record if STEP_TIME in line]
        self._add(step, max([step, *(reached for reached, _ in intervals)]), workers=workers)
        self._since = self._lines[0]["step"]  # a run that was forked from another did not do the steps before
        self._step, self._intervals, self._productive_s = self._since, list[tuple[int, float]](), 0.0
        for at, step_s in intervals:
            if self._since < at <= step:
                self._count(at, step_s)

    def counters(self, step: int, step_s: float) -> dict[str, float]:
        """Count the steps up to ``step``, which took ``step_s`` seconds each; what the attempts came to so far."""
        self._count(step, step_s)
        # Clocks of two machines may say less than what the steps took; it was not less.
        elapsed_s = max(self._productive_s, self._elapsed_s())
        return {
            "run/restarts": sum("workers" in line for line in self._lines) - 1,
            "run/lost_steps": sum(line["reached"] - line["step"] for line in self._lines),
            "run/goodput": self._productive_s / elapsed_s if elapsed_s > 0 else 0.0,
        }

    def go_back(self, step: int) -> None:
        """The steps after this one are done again, by the same workers."""
        self._add(step, max(step, self._step))
        while self._intervals and self._intervals[-1][0] > step:
            self._productive_s -= self._intervals.pop()[1]
        self._step = step

    def _elapsed_s(self) -> float:
        """Since the first attempt began."""
        began = [Moment(line["time"], line.get("boot", ""), line.get("up_s", 0.0)) for line in self._lines]
        return sum(moment.until(later) for moment, later in pairwise([*began, self._clock()]))

    def _count(self, step: int, step_s: float) -> None:
        seconds = (step - self._step) * step_s
        self._intervals.append((step, seconds))
        self._productive_s += seconds
        self._step = step

    def _add(self, step: int, reached: int, **more: int) -> None:
        self._lines.append({**asdict(self._clock()), "step": step, "reached": reached, **more})
        atomic_write(self._file, "".join(to_json(line) + "\n" for line in self._lines).encode())


def _is_attempt(line: Mapping[str, Any]) -> bool:
    times = line.get("time"), line.get("up_s", 0.0)
    whole = type(line.get("reached")) is int and isinstance(line.get("boot", ""), str)
    return whole and all(type(seconds) in (int, float) for seconds in times)


class CountingTracker:
    """Adds the counters to every line that says how long steps took, and hands everything on."""

    def __init__(self, tracker: Tracker, attempts: Attempts) -> None:
        self._tracker, self._attempts = tracker, attempts

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record, with the counters."""
        counters = self._attempts.counters(step, metrics[STEP_TIME]) if STEP_TIME in metrics else {}
        self._tracker.log(step, {**metrics, **counters})

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Record."""
        self._tracker.log_image(step, key, path)

    def go_back(self, step: int) -> None:
        """Later steps are done again."""
        self._attempts.go_back(step)
        self._tracker.go_back(step)

    def finish(self) -> None:
        """Finish the tracker."""
        self._tracker.finish()
