"""Pictures of a sweep of trainings: FID with error bars, c(gamma), and the keys as parallel coordinates."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from eqm_dist.build import build_decay
from eqm_dist.options import required
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.results import Summary
from eqm_dist.sweeps.pictures import plain_numbers
from eqm_dist.sweeps.report import short, shown

MOST_ROWS = 30
"""Points that a picture names: the best ones."""


def pictures(plan: Plan, order: Sequence[Summary]) -> dict[str, Figure]:
    """The pictures by their names, of the points that were trained longest; ``order`` has the best first."""
    longest = [summary for summary in order if summary.step == order[0].step]
    keys = plan.search.keys
    found = {"fid.png": fid_with_error_bars([(shown(summary.overrides, keys), summary.fids) for summary in longest])}
    decays = [(plan.config_of(one.overrides, "best", 0).objective.decay, one.mean) for one in longest]
    if all(decay is not None for decay, _ in decays):
        found["c_gamma.png"] = c_gamma_curves([(build_decay(required(decay)), mean) for decay, mean in decays])
    if len(keys) > 1:
        values = [({short(key): summary.overrides.get(key) for key in keys}, summary.mean) for summary in longest]
        found["parallel.png"] = parallel_coordinates(values)
    return found


def fid_with_error_bars(points: Sequence[tuple[str, Sequence[float]]]) -> Figure:
    """Every point's FID: the mean of its seeds with their standard deviation, and each seed.

    Args:
        points: names and the FIDs of their seeds, the best first.
    """
    shown = points[:MOST_ROWS]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(shown)), layout="constrained", dpi=150)
    axes = figure.subplots()
    for place, (_, fids) in enumerate(shown):
        spread = stdev(fids) if len(fids) > 1 else 0.0
        axes.errorbar(fmean(fids), place, xerr=spread, fmt="o", color="C0", capsize=4)
        axes.scatter(fids, [place] * len(fids), s=9, color="black", zorder=3)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("FID: mean and standard deviation over seeds; each seed a dot")
    axes.grid(axis="x", which="both", alpha=0.25)
    return figure


def c_gamma_curves(curves: Sequence[tuple[Callable[[Tensor], Tensor], float]]) -> Figure:
    """c(gamma) of every point, coloured by FID.

    Args:
        curves: gamma [n] -> c_gamma [n], and the FID of its training.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    gamma = torch.linspace(0, 1, 201)
    colour = _colours([fid for _, fid in curves])
    for decay, fid in sorted(curves, key=lambda curve: -curve[1]):
        axes.plot(gamma.numpy(), decay(gamma).numpy(), color=colour.to_rgba(np.array([fid]))[0])
    axes.set_xlabel("gamma (0 noise, 1 data)")
    axes.set_ylabel("c(gamma)")
    axes.grid(alpha=0.25)
    figure.colorbar(colour, ax=axes, label="FID")
    return figure


def parallel_coordinates(points: Sequence[tuple[Mapping[str, Any], float]]) -> Figure:
    """Every point as a line over its keys, coloured by FID, which is the last axis.

    Args:
        points: values by key, the same keys for all (None where a point has none), and the FID.
    """
    keys = list(points[0][0])
    figure = Figure(figsize=(2 + 1.6 * (len(keys) + 1), 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    colour = _colours([fid for _, fid in points])
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
    for side in axes.spines.values():
        side.set_visible(False)
    figure.colorbar(colour, ax=axes, label="FID")
    return figure


def _heights(column: Sequence[Any]) -> list[float]:
    """Places in [0, 1] along an axis: positive numbers by their logarithm, others evenly in order."""
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in column)
    values = [math.log(value) for value in column] if numbers else None
    if values is None:
        order = list(dict.fromkeys(sorted(map(str, column))))
        values = [float(order.index(str(value))) for value in column]
    low, high = min(values), max(values)
    return [0.5 if low == high else (value - low) / (high - low) for value in values]


def _apart(heights: Sequence[float]) -> list[float]:
    """Those that are far enough from the one below that their labels do not meet."""
    kept: list[float] = []
    for height in heights:
        if not kept or height - kept[-1] > 0.045:
            kept.append(height)
    return kept


def _colours(fids: Sequence[float]) -> ScalarMappable:
    low, high = min(fids), max(fids)
    scale = LogNorm if high > 10 * low else Normalize
    return ScalarMappable(scale(low, high if high > low else low * 1.01), "viridis_r")
