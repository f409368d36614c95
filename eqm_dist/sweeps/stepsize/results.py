"""What samplers gave: their ranking, the Pareto front, who is measured with more samples, and the table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from eqm_dist.sweeps import report
from eqm_dist.sweeps.comparison import COLUMNS, CSV_COLUMNS, Seeded, Standing, by_trial, cells, compare, csv_cells
from eqm_dist.sweeps.report import CSV_FILE, ranking, shown
from eqm_dist.sweeps.spaces import trial_name


@dataclass(frozen=True)
class Result:
    """What a trial gave.

    Attributes:
        overrides: the trial: dotted keys with their values.
        samples: images that it was measured with.
        fid: None where it failed.
        nfe: mean NFE for an image; None where it failed.
        seconds: of one worker, in all.
        failure: the reason, or None.
        seed: that compares it with others; None for the seed of the search, which ranks it among all.
    """

    overrides: dict[str, Any]
    samples: int
    fid: float | None
    nfe: float | None
    seconds: float
    failure: str | None = None
    seed: int | None = None

    @property
    def trial(self) -> str:
        """Name of the trial, a function of the point."""
        return trial_name(self.overrides)

    @property
    def figures(self) -> dict[str, float]:
        """Its figures as MLflow calls them."""
        found = {
            "eval/fid": self.fid,
            "eval/nfe": self.nfe,
            "eval/samples": float(self.samples),
            "time/trial_s": self.seconds,
        }
        return {key: value for key, value in found.items() if value is not None}


def measured_with(results: Iterable[Result], samples: int, seed: int | None = None) -> dict[str, Result]:
    """The results with so many samples, by trial; by default those of the search."""
    return {result.trial: result for result in results if result.samples == samples and result.seed == seed}


def ranked(results: Iterable[Result]) -> list[Result]:
    """The last result of each trial in the search, the best first: those with more samples before others, failures at
    the end.
    """
    last: dict[str, Result] = {}
    for result in results:
        if result.seed is None and (result.trial not in last or last[result.trial].samples <= result.samples):
            last[result.trial] = result
    return sorted(last.values(), key=lambda found: (found.fid is None, -found.samples, found.fid or 0.0))


def finalists(results: Iterable[Result], samples: int, most: int) -> list[Result]:
    """The best trials with so many samples, which are compared with other seeds."""
    return [result for result in ranked(results) if result.samples == samples and result.fid is not None][:most]


def compared(results: Sequence[Result], samples: int, seeds: Iterable[int]) -> list[Standing]:
    """The trials that have an FID with all seeds; of a tie the one with fewer NFE is taken."""
    rounds = {seed: measured_with(results, samples, seed) for seed in seeds}
    points: list[Seeded] = []
    for one in ranked(results):
        found = [by_seed.get(one.trial) for by_seed in rounds.values()]
        fids = {
            seed: result.fid for seed, result in zip(rounds, found, strict=True) if result and result.fid is not None
        }
        nfe = [result.nfe for result in found if result and result.nfe is not None]
        if rounds and len(fids) == len(rounds):
            points.append(Seeded(one.overrides, fids, (fmean(nfe),)))
    return compare(points)


def ordered(order: Sequence[Result], standings: Sequence[Standing]) -> list[Result]:
    """Ranked results, those that were compared first, in the order of the comparison."""
    place = {trial: number for number, trial in enumerate(by_trial(standings))}
    return sorted(order, key=lambda one: place.get(one.trial, len(place)))


def pareto_front(results: Iterable[Result]) -> list[Result]:
    """Results that no other beats in FID without a higher NFE, by rising NFE."""
    front: list[Result] = []
    measured = [result for result in results if result.fid is not None]
    for result in sorted(measured, key=lambda found: (found.nfe, found.fid)):
        if not front or (result.fid or 0.0) < (front[-1].fid or 0.0):
            front.append(result)
    return front


def survivors(results: Iterable[Result], reduction: int) -> list[Result]:
    """Those that are measured with more samples: the best one of every ``reduction``, and the Pareto front."""
    order = [result for result in ranked(results) if result.fid is not None]
    kept = order[: -(-len(order) // reduction)]
    return [*kept, *(result for result in pareto_front(order) if result not in kept)]


def table(order: Sequence[Result], keys: Sequence[str], most: int = 10) -> list[str]:
    """The best trials and the failures, as aligned lines."""
    measured = [
        ((f"{result.fid:.3f}", f"{result.nfe:.1f}".removesuffix(".0"), f"{result.samples:,}"), result.overrides)
        for result in order
        if result.fid is not None
    ]
    lines = ranking(["FID", "NFE", "samples"], measured, keys, most)
    failures = [result for result in order if result.failure is not None]
    lines += [f"failed: {shown(result.overrides, keys)}: {result.failure}" for result in failures[:most]]
    if len(failures) > most:
        lines.append(f"... and {len(failures) - most} more failures in {CSV_FILE}")
    return lines


def comparison_table(standings: Sequence[Standing], keys: Sequence[str]) -> list[str]:
    """The trials that several seeds compare, as aligned lines."""
    rows = [((*cells(one), f"{one.point.cost[0]:.1f}".removesuffix(".0")), one.point.overrides) for one in standings]
    return ranking([*COLUMNS, "NFE"], rows, keys, len(rows))


def write_csv(out: Path, order: Sequence[Result], standings: Mapping[str, Standing]) -> Path:
    """One row for each trial, the best first, with what the comparison says of it.

    Raises:
        StorageError: it cannot be written.
    """
    rows = [
        (
            (
                rank,
                one.trial,
                one.fid,
                one.nfe,
                one.samples,
                f"{one.seconds:.3f}",
                one.failure,
                *csv_cells(standings.get(one.trial)),
            ),
            one.overrides,
        )
        for rank, one in enumerate(order, start=1)
    ]
    columns = ["rank", "trial", "fid", "nfe", "samples", "seconds", "failure", *CSV_COLUMNS]
    return report.write_csv(out, columns, rows)
