"""Points that were measured with the same seeds, side by side: the lowest, those tied with it, the one that is taken.

A verdict compares a point with the lowest mean FID by the paired difference of the two: ``worse`` where its 95 % t
interval leaves out 0, else ``tied`` where its mean is within one standard error of 0, else ``unclear``: more seeds
would tell. Of a tie the cheapest is taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eqm_dist.sweeps.paired import MOST_SEEDS, Difference, Fids, mean_and_spread, taken, to_lowest
from eqm_dist.sweeps.report import shown
from eqm_dist.sweeps.spaces import Overrides, trial_name

COLUMNS = ["FID", "+-", "seeds", "above lowest", "95 % interval", "verdict", "seeds to tell"]
"""Of the table. What one seed cannot say is a dash."""
CSV_COLUMNS = ["fid_mean", "fid_std", "seeds", "above_lowest", "low", "high", "verdict", "seeds_to_tell"]


@dataclass(frozen=True)
class Seeded:
    """A point with several seeds.

    Attributes:
        overrides: the point.
        fids: by seed.
        cost: what it costs; of equal first numbers the second ones are compared.
    """

    overrides: Overrides
    fids: Fids
    cost: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of its FIDs."""
        return mean_and_spread(self.fids)[0]

    @property
    def said(self) -> str:
        """``1.310 +- 0.091 over 5 seeds``, or ``1.310 with one seed``."""
        mean, spread = mean_and_spread(self.fids)
        return (
            f"{mean:.3f} with one seed" if spread is None else f"{mean:.3f} +- {spread:.3f} over {len(self.fids)} seeds"
        )


@dataclass(frozen=True)
class Standing:
    """How a point compares.

    Attributes:
        point: it.
        above: how much higher it is than the lowest; None for the lowest, and where there is one seed.
        lowest: whether it is that.
    """

    point: Seeded
    above: Difference | None
    lowest: bool

    @property
    def verdict(self) -> str | None:
        """``lowest``, ``tied``, ``unclear`` or ``worse``; None where one seed does not say."""
        if self.above is not None:
            return "worse" if self.above.told else "tied" if self.above.tied else "unclear"
        return "lowest" if self.lowest and len(self.point.fids) > 1 else None


def compare(points: Sequence[Seeded]) -> list[Standing]:
    """The points, the one that is taken first, the others by their mean FID."""
    if not points:
        return []
    fids = [point.fids for point in points]
    lowest, differences = to_lowest(fids)
    best = taken(fids, [point.cost for point in points])
    order = sorted(range(len(points)), key=lambda place: (place != best, points[place].mean))
    return [Standing(points[place], differences[place], place == lowest) for place in order]


def cells(standing: Standing) -> list[str]:
    """The row of a point, without its rank and keys."""
    mean, spread = mean_and_spread(standing.point.fids)
    row = [f"{mean:.3f}", "-" if spread is None else f"{spread:.3f}", str(len(standing.point.fids))]
    if standing.above is None:
        return [*row, "-", "-", standing.verdict or "-", "-"]
    low, high = standing.above.interval
    return [
        *row,
        f"{standing.above.mean:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        standing.verdict or "-",
        _seeds(standing.above),
    ]


def csv_cells(standing: Standing | None) -> list[Any]:
    """The same for a file, where what is not known is empty."""
    if standing is None:
        return [None] * len(CSV_COLUMNS)
    mean, spread = mean_and_spread(standing.point.fids)
    row: list[Any] = [mean, spread, len(standing.point.fids)]
    if standing.above is None:
        return [*row, None, None, None, standing.verdict, None]
    return [*row, standing.above.mean, *standing.above.interval, standing.verdict, standing.above.seeds_to_tell]


def others(standings: Sequence[Standing], keys: Sequence[str]) -> dict[str, str]:
    """The other points that may be as good as the first one, by what is said of them: ``tied with`` and ``unclear``."""
    found: dict[str, list[str]] = {"tied with": [], "unclear": []}
    if not standings or standings[0].verdict is None:
        return {}
    first = standings[0]
    for other in standings[1:]:
        pair = first.above if other.lowest else other.above if first.lowest else None  # all pairs have the lowest
        told = f", about {_seeds(pair)} would tell the two apart" if pair is not None else ""
        if other.verdict in ("lowest", "tied", "unclear"):
            said = f"{shown(other.point.overrides, keys)} (FID {other.point.said}{told})"
            found["unclear" if other.verdict == "unclear" else "tied with"].append(said)
    return {label: "; ".join(said) for label, said in found.items() if said}


def by_trial(standings: Sequence[Standing]) -> Mapping[str, Standing]:
    """The standings by the names of their trials."""
    return {trial_name(standing.point.overrides): standing for standing in standings}


def figures(point: Seeded) -> dict[str, float]:
    """What MLflow keeps of the best point."""
    mean, spread = mean_and_spread(point.fids)
    found = {"eval/fid": mean, "eval/fid_seeds": float(len(point.fids))}
    return found if spread is None else {**found, "eval/fid_std": spread}


def _seeds(above: Difference) -> str:
    seeds = above.seeds_to_tell
    return f"over {MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"
