"""Pictures of a sweep of samplers: FID against step size and NFE, the keys as parallel coordinates, the finalists."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eqm_dist.derived import step_size_bound
from eqm_dist.sweeps.comparison import Standing
from eqm_dist.sweeps.pictures import parallel_coordinates, plain_numbers, points_over_seeds
from eqm_dist.sweeps.report import short, shown
from eqm_dist.sweeps.stepsize.plan import Plan
from eqm_dist.sweeps.stepsize.results import Result, measured_with, pareto_front, ranked

Point = tuple[float, Result]
"""A step size, and what it gave."""
MOST_SERIES = 10
"""Lines in a picture: the best ones."""


def pictures(plan: Plan, results: Sequence[Result], standings: Sequence[Standing]) -> dict[str, Figure]:
    """The pictures by their names; the results are of all rungs, one of them at least with an FID."""
    found = [result for result in results if result.seed is None]
    series = _series(plan, found)
    drawn = {"fid_nfe.png": fid_against_nfe(series)}
    if len(plan.search.keys) > 1:
        drawn["parallel.png"] = _keys_of_first_rung(plan, found)
    if standings:
        drawn["finalists.png"] = points_over_seeds(standings, plan.search.keys)
    with_steps = {name: points for name, found in series.items() if (points := _with_steps(plan, found))}
    if with_steps:
        drawn["fid_step_size.png"] = fid_against_step_size(with_steps, step_size_bound(plan.model.config))
    return drawn


def _keys_of_first_rung(plan: Plan, results: Sequence[Result]) -> Figure:
    """All trials with the samples that all of them have."""
    samples = min(result.samples for result in results if result.fid is not None)
    points = [
        ({short(key): result.overrides.get(key) for key in plan.search.keys}, result.fid)
        for result in measured_with(results, samples).values()
        if result.fid is not None
    ]
    return parallel_coordinates(points, f"{samples:,} samples, seed {plan.search.seed}")


def _series(plan: Plan, results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by sampler, that is by everything but step size and NFE; the best samplers."""
    keys = [key for key in plan.search.keys if short(key) not in ("step_size", "nfe")]
    measured = [result for result in results if result.fid is not None]
    names = {result.trial: shown(result.overrides, keys) or "all" for result in measured}
    best = list(dict.fromkeys(names[result.trial] for result in ranked(measured)))[:MOST_SERIES]
    return {name: [result for result in measured if names[result.trial] == name] for name in sorted(best)}


def _with_steps(plan: Plan, results: Sequence[Result]) -> list[Point]:
    """The results of samplers that have a step size, with it."""
    sizes = [plan.model_of(result.overrides).config.sampler.step_size for result in results]
    return [(size, result) for size, result in zip(sizes, results, strict=True) if size is not None]


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
    plain_numbers(axes.xaxis)
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
    plain_numbers(axes.yaxis)
    axes.set_ylabel("FID")
    axes.grid(which="both", alpha=0.25)
    return figure, axes


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
