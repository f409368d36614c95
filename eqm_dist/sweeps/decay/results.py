"""What trainings gave: each run, each point over its seeds, their ranking and the table."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.sweeps import report
from eqm_dist.sweeps.comparison import COLUMNS, CSV_COLUMNS, Seeded, Standing, cells, compare, csv_cells
from eqm_dist.sweeps.paired import mean_and_spread
from eqm_dist.sweeps.report import ranking, shown
from eqm_dist.sweeps.spaces import Overrides, trial_name

MOST_ROWS = 20
LINEAGE_FILE = "lineage.csv"


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
        parent: the run whose checkpoint it began with, or None.
    """

    name: str
    overrides: dict[str, Any]
    seed: int
    how: str
    step: int
    fid: float | None
    seconds: float
    failure: str | None = None
    parent: str | None = None

    @property
    def point(self) -> str:
        """Names its point."""
        return trial_name(self.overrides)

    @property
    def score(self) -> float:
        """The FID, infinite where there is none: the smaller, the better."""
        return math.inf if self.fid is None else self.fid


@dataclass(frozen=True)
class Summary:
    """A point with what its runs gave.

    Attributes:
        overrides: the point.
        step: the last one that any of its runs was evaluated at.
        fids: there, by seed.
        runs: the names of those runs.
    """

    overrides: dict[str, Any]
    step: int
    fids: Mapping[int, float]
    runs: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Of its FIDs."""
        return mean_and_spread(self.fids)[0]


def summaries(results: Sequence[Trained], named: Callable[[Trained], str] = lambda one: one.point) -> list[Summary]:
    """The points, those that were trained longest first, then those with more seeds there, then by mean FID.

    A run that failed or was stopped gives its point no FID. The seeds that are left would be those that luck has left,
    so a point with fewer of them is not held against one with more.

    Args:
        results: of all runs.
        named: what runs of one point have in common.
    """
    found: dict[str, list[Trained]] = {}
    for trained in results:
        if trained.fid is not None:
            found.setdefault(named(trained), []).append(trained)
    rows: list[Summary] = []
    for runs in found.values():
        step = max(trained.step for trained in runs)
        there = {one.seed: one for one in runs if one.step == step}
        fids = {seed: one.fid for seed, one in there.items() if one.fid is not None}
        rows.append(Summary(runs[0].overrides, step, fids, tuple(one.name for one in there.values())))
    return sorted(rows, key=lambda row: (-row.step, -len(row.fids), row.mean))


Ranked = list[tuple[Summary, Standing]]
"""Points with how they compare, the best first."""


def ranked(rows: Sequence[Summary], cost: Callable[[Overrides], tuple[float, ...]]) -> Ranked:
    """The points in their order; those with the most steps and seeds are compared, and of a tie the cheapest is first.

    Args:
        rows: the points as ``summaries`` gives them.
        cost: what a point costs; of equal first numbers the second ones are compared.
    """
    whole = [row for row in rows if (row.step, len(row.fids)) == (rows[0].step, len(rows[0].fids))]
    rest = rows[len(whole) :]
    points = [Seeded(row.overrides, row.fids, cost(row.overrides)) for row in whole]
    of = {id(point): row for point, row in zip(points, whole, strict=True)}
    first = [(of[id(standing.point)], standing) for standing in compare(points)]
    return first + [(row, Standing(Seeded(row.overrides, row.fids, ()), None, lowest=False)) for row in rest]


def table(order: Ranked, results: Sequence[Trained], keys: Sequence[str]) -> list[str]:
    """The best points and all failures, as aligned lines."""
    several = any(len(row.fids) > 1 for row, _ in order)
    rows = [
        ((*(cells(standing) if several else cells(standing)[:1]), f"{row.step:,}"), row.overrides)
        for row, standing in order
    ]
    lines = ranking([*(COLUMNS if several else COLUMNS[:1]), "step"], rows, keys, MOST_ROWS)
    return lines + [f"{one.how}: {told(one, keys)}: {one.failure}" for one in results if one.failure]


def told(one: Trained, keys: Sequence[str]) -> str:
    """A run with its point, where points differ."""
    point = shown(one.overrides, keys)
    return f"{one.name} ({point})" if point else one.name


def lineage(results: Sequence[Trained], last: str) -> list[Trained]:
    """The runs that led to a member of a population, each going on from the one before."""
    known = {one.name: one for one in results}
    runs = [known[last]]
    while (parent := runs[0].parent) is not None and parent in known:
        runs.insert(0, known[parent])
    return runs


def write_csv(out: Path, order: Ranked, results: Sequence[Trained]) -> Path:
    """One row for each run, those of the best point first, with what the comparison says of its point.

    Raises:
        StorageError: it cannot be written.
    """
    places: dict[str, int] = {}
    for number, (row, _) in enumerate(order):
        for name in (*row.runs, trial_name(row.overrides)):
            places.setdefault(name, number)

    def place(one: Trained) -> int:
        return places.get(one.name, places.get(one.point, len(order)))

    rows = [
        (
            (one.name, one.how, one.fid, one.step, one.seed, f"{one.seconds:.1f}", one.failure, one.parent,
             *csv_cells(order[place(one)][1] if place(one) < len(order) else None)),
            one.overrides,
        )
        for one in sorted(results, key=lambda one: (place(one), one.seed, one.name))
    ]  # fmt: skip
    columns = ["run", "how", "fid", "step", "seed", "seconds", "failure", "parent", *CSV_COLUMNS]
    return report.write_csv(out, columns, rows)


def write_lineage(out: Path, runs: Sequence[Trained]) -> Path:
    """The schedule of a member of a population: a row for each run that led to it, with the steps that it trained.

    Raises:
        StorageError: it cannot be written.
    """
    starts = [0, *(one.step for one in runs)]
    rows = [((start, one.step, one.name, one.parent), one.overrides) for start, one in zip(starts, runs, strict=False)]
    return report.write_csv(out, ["from_step", "to_step", "run", "parent"], rows, LINEAGE_FILE)
