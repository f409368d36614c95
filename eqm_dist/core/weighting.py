"""Weights of the loss by gamma. The paper has none.

With a large enough network weights do not move the minimum at a point that only one gamma explains; they say where a
network of limited size is to be exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from eqm_dist.core.corruption import Path, constant_pace
from eqm_dist.core.decay import Decay
from eqm_dist.errors import ConfigError

Weighting = Callable[[Tensor], Tensor]
"""gamma [B] in (0, 1) -> weight of the sample's loss [B]"""


@dataclass(frozen=True)
class RelativeWeighting:
    """w = 1 / max(c(gamma), floor)^2: the error in proportion to the length of the target.

    Without a floor the samples near the data, whose target vanishes, would be all that counts.

    Args:
        decay: c(gamma).
        floor: the smallest c that is divided by, positive.

    Raises:
        ConfigError: the floor is not positive.
    """

    decay: Decay
    floor: float

    def __post_init__(self) -> None:
        _require_positive("floor", self.floor)

    def __call__(self, gamma: Tensor) -> Tensor:
        return self.decay(gamma).clamp(min=self.floor) ** -2


@dataclass(frozen=True)
class MinSnrWeighting:
    """Min-SNR (Hang et al., arXiv 2303.09556): w = min(SNR, limit) for the error of the datum that a field points to.

    With x_gamma = d * latents + (1 - d) * noise and d = path(gamma), the signal-to-noise ratio is d^2 / (1 - d)^2, and
    an error of the field is (1 - d) / c(gamma) times as large in the datum. On the field's own error that makes
    w = min(d^2, limit * (1 - d)^2) / c(gamma)^2, which vanishes at pure noise.

    Args:
        decay: c(gamma).
        limit: the largest ratio that counts, positive; Hang et al. use 5.
        path: the coefficient of the data, by default gamma.

    Raises:
        ConfigError: the limit is not positive.
    """

    decay: Decay
    limit: float
    path: Path = constant_pace

    def __post_init__(self) -> None:
        _require_positive("limit", self.limit)

    def __call__(self, gamma: Tensor) -> Tensor:
        data = self.path(gamma)
        return (data**2).minimum(self.limit * (1 - data) ** 2) / self.decay(gamma) ** 2


def weighted(loss: Callable[..., Tensor], weighting: Weighting) -> Callable[..., Tensor]:
    """A loss ``(model, *inputs, gamma=, noise=) -> [B]``, each sample's multiplied by the weight of its gamma."""

    def weighted_loss(model: Callable[..., Tensor], *inputs: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
        return weighting(gamma) * loss(model, *inputs, gamma=gamma, noise=noise)

    return weighted_loss


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"The {name} of a loss weighting must be positive and finite, got {value}.")
