"""From data to noise along a straight line, at a constant pace or at one that comes to rest at the data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.errors import ConfigError, DataError

Path = Callable[[Tensor], Tensor]
"""gamma [B] -> coefficient of the data [B], from 0 at gamma = 0 to 1 at gamma = 1; the noise has the rest."""


def constant_pace(gamma: Tensor) -> Tensor:
    """The path of the EqM paper: gamma itself is the coefficient of the data."""
    return gamma


@dataclass(frozen=True)
class SelfStoppingPath:
    """The path of Beckmann Transport Models (arXiv 2608.01692), which reaches the data at rest.

    The coefficient of the noise is alpha = 1 - 2 gamma / (1 + a) up to gamma = a = ``braking_start`` (their t_c) and
    (1 - gamma)^2 / (1 - a^2) from there on: a constant pace, then a parabola. Value and derivative agree at a, and both
    vanish at gamma = 1. The authors do not publish their t_c.

    Args:
        braking_start: a, where the path begins to slow down, in [0, 1).

    Raises:
        ConfigError: braking_start out of range.
    """

    braking_start: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.braking_start < 1:
            raise ConfigError(
                f"braking_start of a self-stopping path must lie in [0, 1), got {self.braking_start}; try 0.8."
            )

    def __call__(self, gamma: Tensor) -> Tensor:
        start = self.braking_start
        cruising = 1 - 2 * gamma / (1 + start)
        braking = (1 - gamma) ** 2 / (1 - start**2)
        return 1 - torch.where(gamma <= start, cruising, braking)

    @property
    def pace(self) -> TruncatedDecay:
        """The derivative by gamma: a truncated decay, whose scale of 2 / (1 + a) makes the path end at the data.

        So d x_gamma / d gamma = (latents - noise) * pace(gamma), the target of Equilibrium Matching with this c(gamma).
        What differs is where on the line it is asked for: EqM's x_gamma goes on at a constant pace.
        """
        return TruncatedDecay(self.braking_start, 2 / (1 + self.braking_start))

    @property
    def step_size_bound(self) -> float:
        """The step size above which descent jumps over the part of the path on which it slows down: 1 - a.

        At a distance of r times the noise the field of one datum has the length 2 sqrt(r / (1 - a^2)), again in units
        of the noise. Its slope has no bound at r = 0, so that descent neither converges nor diverges: it settles at
        r = eta^2 / (1 - a^2), where each step leads just as far to the other side. That lies on the parabola as long as
        eta <= 1 - a; beyond, samples keep swinging over it at the full pace.
        """
        return 1 - self.braking_start

    def distance_at_rest(self, step_size: float) -> float:
        """How far from a datum descent settles, in units of the noise: eta^2 / (1 - a^2), for eta <= 1 - a."""
        return step_size**2 / (1 - self.braking_start**2)


def corrupt(latents: Tensor, noise: Tensor, gamma: Tensor, path: Path = constant_pace) -> Tensor:
    """x_gamma = path(gamma) * latents + (1 - path(gamma)) * noise: noise at gamma = 0, data at gamma = 1.

    Args:
        latents: [B, ...].
        noise: [B, ...], like ``latents``.
        gamma: [B] in [0, 1].
        path: the coefficient of the data, by default gamma.

    Returns:
        [B, ...].
    """
    data = per_sample(path(gamma), latents)
    return data * latents + (1 - data) * noise


def per_sample(values: Tensor, batch: Tensor) -> Tensor:
    """Values [B] in a shape that multiplies a batch [B, ...] sample by sample.

    Raises:
        DataError: the number of values is not the batch size.
    """
    if values.shape != batch.shape[:1]:
        raise DataError(
            f"A batch of shape {tuple(batch.shape)} needs one value per sample, got shape {tuple(values.shape)}; "
            "pass a vector of the batch size."
        )
    return values.reshape(-1, *[1] * (batch.ndim - 1))
