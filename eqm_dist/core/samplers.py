"""Descent methods. A sampler is an immutable set of numbers; what it remembers between steps is an explicit state.

The field points downhill, so every method adds it. Every step makes exactly one evaluation of the field.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from eqm_dist.errors import ConfigError

Field = Callable[[Tensor], Tensor]
"""x [B, ...] -> field [B, ...]"""

State = TypeVar("State")


class Sampler(Protocol[State]):
    """One evaluation of the field per step."""

    def init(self, x: Tensor) -> State:
        """The state before the first step from x [B, ...]."""
        ...

    def step(self, field: Field, x: Tensor, state: State) -> tuple[Tensor, State]:
        """The next point and the state that goes with it; x and state are left as they are."""
        ...


@dataclass(frozen=True)
class GradientDescent:
    """x_{k+1} = x_k + step_size * field(x_k) (paper, Equation 8)."""

    step_size: float

    def __post_init__(self) -> None:
        _require_step_size(self.step_size)

    def init(self, x: Tensor) -> None:
        return None

    def step(self, field: Field, x: Tensor, state: None) -> tuple[Tensor, None]:
        return x + self.step_size * field(x), None


@dataclass(frozen=True)
class NesterovGradientDescent:
    """x_{k+1} = x_k + step_size * field(x_k + momentum * (x_k - x_{k-1})) (paper, Equation 9).

    The step starts from x_k, not from the look-ahead point as in Nesterov's own method. The first step has no momentum.
    """

    step_size: float
    momentum: float

    def __post_init__(self) -> None:
        _require_step_size(self.step_size)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {self.momentum}; the paper uses 0.3.")

    def init(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def step(self, field: Field, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        displacement = self.step_size * field(x + self.momentum * state)
        return x + displacement, displacement


def _require_step_size(step_size: float) -> None:
    if not 0 < step_size < math.inf:
        raise ConfigError(f"step_size must be positive and finite, got {step_size}; the paper uses 0.0017 to 0.003.")
