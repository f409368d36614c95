"""Pictures of a sweep of trainings: FID over seeds, c(gamma), and the keys as parallel coordinates."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from eqm_dist.build import build_decay
from eqm_dist.options import required
from eqm_dist.sweeps.comparison import Standing
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.pictures import colours, parallel_coordinates, points_over_seeds
from eqm_dist.sweeps.report import short


def pictures(plan: Plan, standings: Sequence[Standing]) -> dict[str, Figure]:
    """The pictures by their names, of the points that were trained longest, the best first."""
    keys = plan.search.keys
    found = {"fid.png": points_over_seeds(standings, keys)}
    points = [(one.point.overrides, one.point.mean) for one in standings]
    decays = [(plan.config_of(point, "best", 0).objective.decay, mean) for point, mean in points]
    if all(decay is not None for decay, _ in decays):
        found["c_gamma.png"] = c_gamma_curves([(build_decay(required(decay)), mean) for decay, mean in decays])
    if len(keys) > 1:
        values = [({short(key): point.get(key) for key in keys}, mean) for point, mean in points]
        found["parallel.png"] = parallel_coordinates(values)
    return found


def c_gamma_curves(curves: Sequence[tuple[Callable[[Tensor], Tensor], float]]) -> Figure:
    """c(gamma) of every point, coloured by FID.

    Args:
        curves: gamma [n] -> c_gamma [n], and the FID of its training.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    gamma = torch.linspace(0, 1, 201)
    colour = colours([fid for _, fid in curves])
    for decay, fid in sorted(curves, key=lambda curve: -curve[1]):
        axes.plot(gamma.numpy(), decay(gamma).numpy(), color=colour.to_rgba(np.array([fid]))[0])
    axes.set_xlabel("gamma (0 noise, 1 data)")
    axes.set_ylabel("c(gamma)")
    axes.grid(alpha=0.25)
    figure.colorbar(colour, ax=axes, label="FID")
    return figure
