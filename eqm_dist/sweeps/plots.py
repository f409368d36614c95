"""Pictures of a sweep: FID against step size and NFE; FID of trainings, their c(gamma), their keys."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from eqm_dist.sweeps.results import Result, pareto_front

Point = tuple[float, Result]
"""A step size, and what it gave."""
MOST_ROWS = 30
"""Points that a picture names: the best ones."""


def fid_against_step_size(series: Mapping[str, Sequence[Point]], bound: float | None) -> Figure:
    """The best FID of every step size, a line for each sampler.

    A line compares results with one number of samples, the smallest, which all trials have; a large marker is the best
    of a step size with the most samples, which only the best trials have.

    Args:
        series: by the name of a sampler, its results with their step sizes.
        bound: the step size above which plain descent diverges near data, or None.
    """
    figure, axes = _figure()
    counts = sorted({result.samples for points in series.values() for _, result in points})
    for number, (name, points) in enumerate(series.items()):
        first, last = (_best_of_each([point for point in points if point[1].samples == count])
                       for count in (counts[0], counts[-1]))  # fmt: skip
        axes.plot(list(first), list(first.values()), marker=".", color=f"C{number % 10}", label=name)
        if len(counts) > 1:
            axes.scatter(list(last), list(last.values()), s=55, color=f"C{number % 10}", edgecolors="black", zorder=3)
    if bound is not None:
        axes.axvline(bound, color="black", linestyle="--")
        axes.annotate(
            f"plain descent diverges near data\nabove {bound:.3g}", (bound, 0.97), xytext=(-4, 0), ha="right", va="top",
            xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8,
        )  # fmt: skip
    _explain_samples(axes, counts, "line")
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("step size eta")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def fid_against_nfe(series: Mapping[str, Sequence[Result]]) -> Figure:
    """Every trial by what an image costs, and the Pareto front of those with the most samples.

    Args:
        series: by the name of a sampler, its results.
    """
    figure, axes = _figure()
    everything = [result for results in series.values() for result in results]
    counts = sorted({result.samples for result in everything})
    for number, (name, results) in enumerate(series.items()):
        colour = f"C{number % 10}"
        few = [result for result in results if result.samples < counts[-1]]
        many = [result for result in results if result.samples == counts[-1]]
        axes.scatter(*_coordinates(few), s=9, alpha=0.5, color=colour)
        axes.scatter(*_coordinates(many), s=55, edgecolors="black", zorder=3, label=name, color=colour)
    front = pareto_front(result for result in everything if result.samples == counts[-1])
    axes.step(*_coordinates(front), where="post", color="black", linewidth=1, label="Pareto front")
    _explain_samples(axes, counts, "small markers")
    axes.set_xlabel("evaluations of the field for an image (NFE)")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_ylabel("FID")
    axes.grid(which="both", alpha=0.25)
    return figure, axes


def _plain_numbers(axis: Axis) -> None:
    """A logarithmic axis with numbers as one says them: 0.05, not 5 x 10^-2."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _coordinates(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    return [result.nfe or 0.0 for result in results], [result.fid or 0.0 for result in results]


def _explain_samples(axes: Axes, counts: Sequence[int], few: str) -> None:
    if len(counts) == 1:
        axes.set_title(f"{counts[0]:,} samples", fontsize=9)
    else:
        middle = f"fewer than {counts[-1]:,}" if few != "line" and len(counts) > 2 else f"{counts[0]:,}"
        axes.set_title(f"{few}: {middle} samples; large markers: {counts[-1]:,} samples", fontsize=9)


def _best_of_each(points: Sequence[Point]) -> dict[float, float]:
    best: dict[float, float] = {}
    for step_size, result in sorted(points, key=lambda point: point[0]):
        assert result.fid is not None
        best[step_size] = min(result.fid, best.get(step_size, result.fid))
    return best


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
    _plain_numbers(axes.xaxis)
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
