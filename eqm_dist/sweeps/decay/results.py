"""What trainings gave: each run, each point over its seeds, their ranking and the table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.sweeps import report
from eqm_dist.sweeps.report import ranking, shown
from eqm_dist.sweeps.spaces import trial_name

MOST_ROWS = 20


@dataclass(frozen=True)
class Trained:
    """How a run of a sweep ended.

    Attributes:
        name: of the run.
        overrides: its point.
        seed: its seed.
        how: ``complete``, ``stopped``, ``failed``, or ``lost`` with its process or machine.
        step: last step that was evaluated.
        fid: there; None where there is none.
        seconds: of its last attempt.
        failure: the reason, or None.
    """

    name: str
    overrides: dict[str, Any]
    seed: int
    how: str
    step: int
    fid: float | None
    seconds: float
    failure: str | None = None

    @property
    def score(self) -> float:
        """The FID, infinite where there is none: the smaller, the better."""
        return math.inf if self.fid is None else self.fid


@dataclass(frozen=True)
class Summary:
    """A point with the FIDs of its seeds that were trained longest: their mean and standard deviation."""

    overrides: dict[str, Any]
    step: int
    fids: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.fids)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.fids) if len(self.fids) > 1 else 0.0


def summaries(results: Sequence[Trained]) -> list[Summary]:
    """The points, those that were trained longest first, among them by mean FID; failed runs count for none."""
    found: dict[str, list[Trained]] = {}
    for trained in results:
        if trained.fid is not None:
            found.setdefault(trial_name(trained.overrides), []).append(trained)
    rows = []
    for runs in found.values():
        step = max(trained.step for trained in runs)
        fids = tuple(trained.fid for trained in runs if trained.step == step and trained.fid is not None)
        rows.append(Summary(runs[0].overrides, step, fids))
    return sorted(rows, key=lambda row: (-row.step, row.mean))


def table(order: Sequence[Summary], results: Sequence[Trained], keys: Sequence[str]) -> list[str]:
    """The best points and all failures, as aligned lines."""
    rows = [
        ((f"{row.mean:.3f}", f"{row.spread:.3f}", str(len(row.fids)), f"{row.step:,}"), row.overrides) for row in order
    ]
    lines = ranking(["FID", "+-", "seeds", "step"], rows, keys, MOST_ROWS)
    return lines + [
        f"{one.how}: {one.name} ({shown(one.overrides, keys)}): {one.failure}" for one in results if one.failure
    ]


def write_csv(out: Path, order: Sequence[Summary], results: Sequence[Trained]) -> Path:
    """One row for each run, those of the best point first.

    Raises:
        StorageError: it cannot be written.
    """
    place = {trial_name(summary.overrides): number for number, summary in enumerate(order)}
    by_rank = sorted(results, key=lambda one: (place.get(trial_name(one.overrides), len(place)), one.seed, one.name))
    rows = [
        ((one.name, one.how, one.fid, one.step, one.seed, f"{one.seconds:.1f}", one.failure), one.overrides)
        for one in by_rank
    ]
    return report.write_csv(out, ["run", "how", "fid", "step", "seed", "seconds", "failure"], rows)
