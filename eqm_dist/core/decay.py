"""The gradient magnitudes c(gamma) (paper, Equations 4 to 6 and the gradient multiplier lambda).

Equilibrium Matching needs c(1) = 0, which makes data stationary points. The constant decay breaks this on purpose: it
is the time-free flow-matching baseline.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eqm_dist.errors import ConfigError


class Decay(Protocol):
    """A family member c(gamma)."""

    @property
    def gradient_scale(self) -> float:
        """lambda, the factor in front."""
        ...

    @property
    def data_slope(self) -> float | None:
        """The s of c(gamma) = s * (1 - gamma) near data; None where c does not vanish there."""
        ...

    def __call__(self, gamma: Tensor) -> Tensor:
        """c_gamma, in the shape of ``gamma``, whose values lie in [0, 1]."""
        ...


@dataclass(frozen=True)
class ConstantDecay:
    """c = lambda: time-free flow matching (paper, Equation 2)."""

    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self.gradient_scale)

    @property
    def data_slope(self) -> None:
        return None

    def __call__(self, gamma: Tensor) -> Tensor:
        return torch.full_like(gamma, self.gradient_scale)


@dataclass(frozen=True)
class LinearDecay:
    """c = lambda * (1 - gamma) (paper, Equation 4)."""

    gradient_scale: float

    def __post_init__(self) -> None:
        _require_positive(self.gradient_scale)

    @property
    def data_slope(self) -> float:
        return self.gradient_scale

    def __call__(self, gamma: Tensor) -> Tensor:
        return self.gradient_scale * (1 - gamma)


@dataclass(frozen=True)
class TruncatedDecay:
    """c = lambda up to decay_start, then a straight line to 0 (paper, Equation 5).

    The defaults are the published choice.
    """

    decay_start: float = 0.8
    gradient_scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay_start < 1:
            raise ConfigError(
                f"decay_start of a truncated decay must lie in [0, 1), got {self.decay_start}; the paper uses 0.8."
            )
        _require_positive(self.gradient_scale)

    @property
    def data_slope(self) -> float:
        return self.gradient_scale / (1 - self.decay_start)

    def __call__(self, gamma: Tensor) -> Tensor:
        return self.gradient_scale * ((1 - gamma) / (1 - self.decay_start)).clamp(max=1)


@dataclass(frozen=True)
class PiecewiseDecay:
    """c / lambda runs from decay_value at 0 to 1 at decay_start and on to 0 at 1 (paper, Equation 6).

    By cases, as the paper defines it: the minimum of the two lines, which the official code takes, is the same only for
    decay_value <= 1 / (1 - decay_start).
    """

    decay_start: float
    decay_value: float
    gradient_scale: float

    def __post_init__(self) -> None:
        if not 0 < self.decay_start < 1:
            raise ConfigError(
                f"decay_start of a piecewise decay must lie in (0, 1), got {self.decay_start}; the paper uses 0.8."
            )
        if not 0 <= self.decay_value < math.inf:
            raise ConfigError(
                f"decay_value must be finite and not negative, got {self.decay_value}; 1 gives the truncated decay."
            )
        _require_positive(self.gradient_scale)

    @property
    def data_slope(self) -> float:
        return self.gradient_scale / (1 - self.decay_start)

    def __call__(self, gamma: Tensor) -> Tensor:
        before = self.decay_value + (1 - self.decay_value) / self.decay_start * gamma
        after = (1 - gamma) / (1 - self.decay_start)
        return self.gradient_scale * torch.where(gamma <= self.decay_start, before, after)


def divergence_bound(decay: Decay) -> float | None:
    """The step size above which plain gradient descent diverges near data.

    There the target is s * (x - x_gamma) with s = lambda / (1 - decay_start), so descent multiplies the distance from
    the datum by 1 - eta * s, and eta must not exceed 2 / s: 0.1 with the published values.

    Returns:
        The bound, or None where the field does not vanish at data, which then attract no descent at any step size.
    """
    return None if decay.data_slope is None else 2 / decay.data_slope


def _require_positive(gradient_scale: float) -> None:
    if not 0 < gradient_scale < math.inf:
        raise ConfigError(f"gradient_scale must be positive and finite, got {gradient_scale}; the paper uses 4.")
