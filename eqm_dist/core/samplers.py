"""Descent methods and their step sizes.

A sampler is an immutable set of numbers that never calls the field: it says where to look next, is told the field
there, and moves. So whoever calls the field counts the calls, and what a sampler remembers is explicit: tensors with a
row for each sample, so that samples can leave a batch and others join it.

The field points downhill, so every method adds it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from eqm_dist.core.corruption import per_sample
from eqm_dist.errors import ConfigError

Field = Callable[[Tensor], Tensor]
"""x [B, ...] -> field [B, ...]"""

State = tuple[Tensor, ...]
"""What is remembered of each sample: tensors [B, ...]."""


class Sampler(Protocol):
    """A way from a start to a sample, one evaluation of the field at a time."""

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        """The state before the first evaluation.

        Args:
            x: [B, ...], the start.
            nfe: the most that a sample may take.
            start_time: where on the way from 0 to 1 the start lies; for integrators.

        Raises:
            ConfigError: the sampler cannot use these numbers.
        """
        ...

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        """Where the field is needed next: points [B, ...] and their times [B] in [0, 1].

        ``progress`` [B] in [0, 1) is the part of its NFE that a sample has behind it.
        """
        ...

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, Tensor | None]:
        """The next x and state, given the field [B, ...] at those points; x and state are left as they are.

        Third, the samples [B] bool that have arrived; None from a sampler whose every sample takes the whole NFE.
        """
        ...


class StepPolicy(Protocol):
    """How long each step is."""

    def start(self, x: Tensor) -> State:
        """The state before the first step from x [B, ...]."""
        ...

    def step(
        self, step_size: float, x: Tensor, point: Tensor, direction: Tensor, state: State, progress: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        """Where to step from [B, ...], the step [B, ...], and the next state; ``direction`` was found at ``point``."""
        ...


@dataclass(frozen=True)
class ConstantStep:
    """Every step is step_size * field."""

    def start(self, x: Tensor) -> State:
        return ()

    def step(
        self, step_size: float, x: Tensor, point: Tensor, direction: Tensor, state: State, progress: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        return x, step_size * direction, ()


@dataclass(frozen=True)
class DecayingStep:
    """The step size falls geometrically, from step_size at the first evaluation to final_step_size after the last."""

    final_step_size: float

    def __post_init__(self) -> None:
        _require_step_size(self.final_step_size, "final_step_size")

    def start(self, x: Tensor) -> State:
        return ()

    def step(
        self, step_size: float, x: Tensor, point: Tensor, direction: Tensor, state: State, progress: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        current = step_size * (self.final_step_size / step_size) ** progress
        return x, per_sample(current, x).to(x.dtype) * direction, ()


@dataclass(frozen=True)
class BacktrackingStep:
    """A step after which the field's norm has risen by more than ``rise`` is taken back and tried with half the size.

    The half stays for the steps that follow. No evaluation is spent on the decision: the field after a step, which
    the next step needs anyway, decides about it. Some rise is allowed because the norm need not fall while noise turns
    into an image; near data a step above the bound of ``divergence_bound`` multiplies it.
    """

    rise: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.rise < math.inf:
            raise ConfigError(f"rise must be finite and not negative, got {self.rise}; 0.1 allows a tenth more.")

    def start(self, x: Tensor) -> State:
        ones = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return ones, torch.full_like(ones, math.inf), x, torch.zeros_like(x)

    def step(
        self, step_size: float, x: Tensor, point: Tensor, direction: Tensor, state: State, progress: Tensor
    ) -> tuple[Tensor, Tensor, State]:
        shrink, last_norm, last_point, last_direction = state
        norm = field_norm(direction).to(x.dtype)
        kept = norm <= (1 + self.rise) * last_norm  # and what is not a number is not kept
        shrink = torch.where(kept, shrink, shrink / 2)
        norm = torch.where(kept, norm, last_norm)
        # Taken back to where the last norm was found, for a short enough step from there keeps it. With momentum that
        # is the look-ahead point, and the norm at the x behind it may be above for good.
        x = torch.where(per_sample(kept, x), x, last_point)
        point = torch.where(per_sample(kept, x), point, last_point)
        direction = torch.where(per_sample(kept, x), direction, last_direction)
        return x, step_size * per_sample(shrink, x) * direction, (shrink, norm, point, direction)


@dataclass(frozen=True)
class GradientDescent:
    """x_{k+1} = x_k + step_size * field(x_k) (paper, Equation 8)."""

    step_size: float
    policy: StepPolicy = ConstantStep()

    def __post_init__(self) -> None:
        _require_step_size(self.step_size)

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        _require_no_time(start_time)
        return self.policy.start(x)

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        return x, progress

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, None]:
        x, step, state = self.policy.step(self.step_size, x, x, field, state, progress)
        return x + step, state, None


@dataclass(frozen=True)
class NesterovGradientDescent:
    """x_{k+1} = x_k + step_size * field(x_k + momentum * (x_k - x_{k-1})) (paper, Equation 9).

    The step starts from x_k, not from the look-ahead point as in Nesterov's own method. The first step has no momentum.
    """

    step_size: float
    momentum: float
    policy: StepPolicy = ConstantStep()

    def __post_init__(self) -> None:
        _require_step_size(self.step_size)
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {self.momentum}; the paper uses 0.3.")

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        _require_no_time(start_time)
        return torch.zeros_like(x), *self.policy.start(x)

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.momentum * state[0], progress

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, None]:
        point, _ = self.look(x, state, progress)
        x, step, policy_state = self.policy.step(self.step_size, x, point, field, state[1:], progress)
        return x + step, (step, *policy_state), None


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba, arXiv 1412.6980) on the samples, with minus the field as the gradient."""

    step_size: float
    policy: ConstantStep | DecayingStep = ConstantStep()
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _require_step_size(self.step_size)

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        _require_no_time(start_time)
        steps = torch.zeros(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device)
        return steps, torch.zeros_like(x), torch.zeros_like(x)

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        return x, progress

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, None]:
        steps, first, second = state
        steps = steps + 1
        first = torch.lerp(field, first, self.betas[0])
        second = torch.lerp(field.square(), second, self.betas[1])
        mean, square = (
            moment / per_sample(1 - beta**steps, x).to(x.dtype)
            for moment, beta in zip((first, second), self.betas, strict=True)
        )
        x, step, _ = self.policy.step(self.step_size, x, x, mean / (square.sqrt() + self.eps), (), progress)
        return x + step, (steps, first, second), None


def field_norm(field: Tensor) -> Tensor:
    """Root mean square [B] of a field [B, ...] over the dimensions of a sample, in at least float32.

    That is ||field||_2 / sqrt(dimensions), so that a threshold means the same for latents of any size.
    """
    wide = field.flatten(1).to(torch.promote_types(field.dtype, torch.float32))
    return wide.square().mean(1).sqrt()


def _require_step_size(step_size: float, name: str = "step_size") -> None:
    if not 0 < step_size < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {step_size}; the paper uses 0.0017 to 0.003.")


def _require_no_time(start_time: float) -> None:
    if start_time:
        raise ConfigError(
            f"start_time={start_time} has no effect on a descent, which knows no time; leave it out and start from"
            " partly noised samples."
        )
