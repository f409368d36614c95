"""What the pictures of all sweeps share: seeds with their intervals, keys as parallel coordinates, and the files."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from eqm_dist.sweeps.comparison import Standing
from eqm_dist.sweeps.paired import mean_and_spread
from eqm_dist.sweeps.report import shown

MOST_ROWS = 30
"""Points that a picture names: the best ones."""


def plain_numbers(axis: Axis) -> None:
    """A logarithmic axis with numbers as one says them: 0.05, not 5 x 10^-2."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def points_over_seeds(standings: Sequence[Standing], keys: Sequence[str]) -> Figure:
    """Every point's FID over its seeds; beside it how far it is above the lowest, where several seeds say that.

    Args:
        standings: the points, the best first.
        keys: that vary, which name a point.
    """
    rows = standings[:MOST_ROWS]
    several = any(len(row.point.fids) > 1 for row in rows)
    pairs = any(row.above is not None for row in rows)
    figure = Figure(figsize=(11 if pairs else 8, 1.2 + 0.35 * len(rows)), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2 if pairs else 1, sharey=True, squeeze=False)[0]
    _fids(panels[0], rows)
    panels[0].set_yticks(range(len(rows)), [shown(row.point.overrides, keys) for row in rows], fontsize=8)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("FID over seeds: mean and standard deviation" if several else "FID of one seed")
    if pairs:
        _above_lowest(panels[1], rows)
    return figure


def _fids(axes: Axes, rows: Sequence[Standing]) -> None:
    for place, row in enumerate(rows):
        mean, spread = mean_and_spread(row.point.fids)
        axes.errorbar(mean, place, xerr=spread, fmt="o", color="C0", capsize=4)
        axes.scatter(list(row.point.fids.values()), [place] * len(row.point.fids), s=9, color="black", zorder=3)
    values = [fid for row in rows for fid in row.point.fids.values()]
    if max(values) > 3 * min(values):
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
    axes.grid(axis="x", which="both", alpha=0.25)


def _above_lowest(axes: Axes, rows: Sequence[Standing]) -> None:
    for place, row in enumerate(rows):
        if row.above is not None:
            colour = {"tied": "C0", "unclear": "C1"}.get(str(row.verdict), "C3")
            axes.errorbar(row.above.mean, place, xerr=row.above.margin, fmt="o", color=colour, capsize=4)
        elif row.lowest:
            axes.scatter([0], [place], color="black", zorder=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("above the lowest, in pairs: 95 % interval")
    axes.grid(axis="x", alpha=0.25)


def parallel_coordinates(points: Sequence[tuple[Mapping[str, Any], float]], title: str = "") -> Figure:
    """Every point as a line over its keys, coloured by FID, which is the last axis.

    Args:
        points: values by key, the same keys for all (None where a point has none), and the FID.
        title: of the picture.
    """
    keys = list(points[0][0])
    figure = Figure(figsize=(2 + 1.6 * (len(keys) + 1), 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    colour = colours([fid for _, fid in points])
    columns = [[point[key] for point, _ in points] for key in keys] + [[fid for _, fid in points]]
    heights = [_heights(column) for column in columns]
    for row in sorted(range(len(points)), key=lambda row: -points[row][1]):
        axes.plot(
            range(len(columns)),
            [column[row] for column in heights],
            color=colour.to_rgba(np.array([points[row][1]]))[0],
        )
    for place, column in enumerate(columns):
        axes.axvline(place, color="black", linewidth=0.8)
        labels = {height: f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
                  for height, value in zip(heights[place], column, strict=True)}  # fmt: skip
        for height in _apart(sorted(labels)):
            axes.annotate(labels[height], (place, height), xytext=(4, 0), textcoords="offset points", fontsize=8,
                          va="center", bbox={"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.7})  # fmt: skip
    axes.set_xticks(range(len(columns)), [*keys, "FID"])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(colour, ax=axes, label="FID")
    return figure


def colours(fids: Sequence[float]) -> ScalarMappable:
    """A colour for every FID; by the logarithm where they differ much."""
    low, high = min(fids), max(fids)
    scale = LogNorm if high > 10 * low else Normalize
    return ScalarMappable(scale(low, high if high > low else low * 1.01), "viridis_r")


def save_pictures(out: Path, pictures: Mapping[str, Figure]) -> list[Path]:
    """Write pictures under their names; returns the files."""
    for name, picture in pictures.items():
        picture.savefig(out / name)
    return [out / name for name in pictures]


NO_VALUE = -0.12
"""The place below an axis where points are that have no value there."""


def _heights(column: Sequence[Any]) -> list[float]:
    """Places in [0, 1] along an axis: positive numbers by their logarithm, others evenly in order."""
    there = [value for value in column if value is not None]
    if there and all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in there):
        place = {value: math.log(value) for value in there}
    else:
        place = {value: float(number) for number, value in enumerate(dict.fromkeys(sorted(there, key=str)))}
    low, high = min(place.values(), default=0.0), max(place.values(), default=0.0)
    return [
        NO_VALUE if value is None else 0.5 if low == high else (place[value] - low) / (high - low) for value in column
    ]


def _apart(heights: Sequence[float]) -> list[float]:
    """Those that are far enough from the one below that their labels do not meet."""
    kept: list[float] = []
    for height in heights:
        if not kept or height - kept[-1] > 0.045:
            kept.append(height)
    return kept
