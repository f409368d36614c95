"""What several seeds say of points: how far apart they are, which are tied, and which is taken.

The same seed gives all points the same noise, so FIDs rise and fall together from seed to seed. What is left when they
are subtracted seed by seed is much smaller than the spread of each.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

CONFIDENCE = 0.95
MOST_SEEDS = 1000
"""Beyond so many seeds nobody will tell two points apart."""

Fids = Mapping[int, float]
"""FIDs of a point by seed."""


@dataclass(frozen=True)
class Difference:
    """How much higher the FID of a point is than that of another, over the seeds of both.

    Attributes:
        seeds: that both have, at least 2.
        mean: of the differences.
        spread: their standard deviation.
    """

    seeds: int
    mean: float
    spread: float

    @property
    def error(self) -> float:
        """The standard error of the mean difference."""
        return self.spread / math.sqrt(self.seeds)

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return t_quantile(self.seeds - 1) * self.error

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % t interval of the mean difference."""
        return self.mean - self.margin, self.mean + self.margin

    @property
    def told(self) -> bool:
        """Whether the interval leaves out 0: these seeds say which of the two is better."""
        low, high = self.interval
        return not low <= 0 <= high

    @property
    def tied(self) -> bool:
        """Whether the two are as good as each other: not told apart, and within one standard error.

        Of few seeds the interval alone is so wide that it holds 0 for almost everything.
        """
        return not self.told and abs(self.mean) <= self.error

    @property
    def seeds_to_tell(self) -> int | None:
        """The fewest seeds whose interval would leave out 0, were mean and spread as they are; None above 1,000."""
        return seeds_to_tell(self.mean, self.spread)


def mean_and_spread(fids: Fids) -> tuple[float, float | None]:
    """The mean FID, and the standard deviation over seeds; one seed has none."""
    values = list(fids.values())
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(point: Fids, other: Fids) -> Difference | None:
    """How much higher a point's FID is than another's; None where they have fewer than two seeds in common."""
    differences = [point[seed] - other[seed] for seed in point if seed in other]
    if len(differences) < 2:
        return None
    return Difference(len(differences), statistics.fmean(differences), statistics.stdev(differences))


def to_lowest(points: Sequence[Fids]) -> tuple[int, list[Difference | None]]:
    """The point with the lowest mean FID, and how much higher each of them is; None for that one."""
    lowest = min(range(len(points)), key=lambda place: mean_and_spread(points[place])[0])
    return lowest, [None if place == lowest else difference(fids, points[lowest]) for place, fids in enumerate(points)]


def taken(points: Sequence[Fids], costs: Sequence[tuple[float, ...]]) -> int:
    """The point that is taken: the cheapest of those that are tied with the lowest mean FID, itself among them.

    Args:
        points: their FIDs.
        costs: what each costs; of equal first numbers the second ones are compared, and so on.
    """
    lowest, differences = to_lowest(points)
    tied = [place for place, found in enumerate(differences) if found is not None and found.tied]
    return min([lowest, *tied], key=lambda place: (costs[place], mean_and_spread(points[place])[0]))


def seeds_to_tell(mean: float, spread: float) -> int | None:
    """See ``Difference.seeds_to_tell``."""

    def enough(seeds: int) -> bool:
        return t_quantile(seeds - 1) * spread / math.sqrt(seeds) < abs(mean)

    if not enough(MOST_SEEDS):
        return None
    fewest, most = 1, MOST_SEEDS  # one seed is never enough
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if enough(middle) else (middle, most)
    return most


@cache
def t_quantile(freedom: int) -> float:
    """The t below which a share of (1 + 0.95) / 2 of Student's distribution lies."""
    low, high = 0.0, 20.0  # 12.7 with one degree of freedom
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < CONFIDENCE else (low, middle)
    return (low + high) / 2


def within(t: float, freedom: int) -> float:
    """The share of Student's distribution in [-t, t], which is a finite sum (Abramowitz and Stegun, 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd = math.cos(angle), freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
