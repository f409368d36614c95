"""Integrators of dx/dt = horizon * field(x, t) from the start time to 1, t being the part of the way.

Flow matching has horizon 1, and its t is gamma. The field of Equilibrium Matching is blind to time: there the horizon
says how long to follow it, and Euler's method with an NFE of n is gradient descent with step size horizon / n.

All are explicit Runge-Kutta methods, written so that one evaluation of the field moves every sample by one stage of its
own. Samples of one batch may be at different stages and, with ``Dopri5``, take steps of different lengths: each has
its own error control, so no sample depends on which others share its batch. (torchdiffeq, the reference in the tests,
takes one step length for the whole batch.)
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eqm_dist.core.corruption import per_sample
from eqm_dist.core.samplers import State, field_norm
from eqm_dist.errors import ConfigError


class Tableau(NamedTuple):
    """Butcher's tableau: the times of the stages, what each stage adds up, and what the step adds up."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class _FixedStep:
    """Equal steps, as many as the NFE allows."""

    horizon: float = 1.0
    tableau: ClassVar[Tableau]

    def __post_init__(self) -> None:
        _require_positive(self.horizon, "horizon")

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        _require_time(start_time)
        stages = len(self.tableau.nodes)
        if nfe % stages:
            raise ConfigError(
                f"nfe must be a multiple of {stages}, the NFE of one step, got {nfe};"
                f" use {nfe + stages - nfe % stages}."
            )
        time, stage, slopes = _first_state(self.tableau, x, start_time)
        return time, torch.full_like(time, (1 - start_time) * stages / nfe), stage, slopes

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        return _look(self.tableau, self.horizon, x, state)

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, None]:
        time, step, stage, slopes = state
        slopes = _with_slope(slopes, stage, field)
        whole = stage == len(self.tableau.nodes) - 1
        after = x + _combined(_tensor(self.tableau.weights, x).expand(len(x), -1), self.horizon * step, slopes)
        x = torch.where(per_sample(whole, x), after, x)
        return x, (torch.where(whole, time + step, time), step, torch.where(whole, 0, stage + 1), slopes), None


@dataclass(frozen=True)
class Euler(_FixedStep):
    """Euler's method, of order 1: one evaluation a step."""

    tableau: ClassVar[Tableau] = Tableau((0.0,), ((0.0,),), (1.0,))


@dataclass(frozen=True)
class Heun(_FixedStep):
    """Heun's method, of order 2: two evaluations a step."""

    tableau: ClassVar[Tableau] = Tableau((0.0, 1.0), ((0.0, 0.0), (1.0, 0.0)), (0.5, 0.5))


DORMAND_PRINCE = Tableau(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    (
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (1 / 5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        (3 / 40, 9 / 40, 0.0, 0.0, 0.0, 0.0, 0.0),
        (44 / 45, -56 / 15, 32 / 9, 0.0, 0.0, 0.0, 0.0),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0.0, 0.0, 0.0),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0.0, 0.0),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
)
"""Dormand & Prince, J. Comput. Appl. Math. 6 (1980), RK5(4)7M. The last stage is the point after the step."""

FOURTH_ORDER = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
"""Weights of its embedded method of order 4; the difference of the two estimates the error."""

DORMAND_PRINCE_ERROR = tuple(high - low for high, low in zip(DORMAND_PRINCE.weights, FOURTH_ORDER, strict=True))


@dataclass(frozen=True)
class Dopri5:
    """The method of Dormand and Prince, of order 5, each sample with steps as long as its own error allows.

    A step is repeated with a shorter length where the root mean square of error / (atol + rtol * |x|) exceeds 1. The
    first evaluation aside, a step costs six. ``nfe`` is a limit: a sample that meets it has not arrived.
    """

    horizon: float = 1.0
    rtol: float = 1e-3
    atol: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("horizon", "rtol", "atol"):
            _require_positive(getattr(self, name), name)

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        _require_time(start_time)
        time, stage, slopes = _first_state(DORMAND_PRINCE, x, start_time)
        return time, torch.zeros_like(time), stage, slopes

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        return _look(DORMAND_PRINCE, self.horizon, x, state)

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, Tensor]:
        time, step, stage, slopes = state
        slopes = _with_slope(slopes, stage, field)
        step = torch.where(stage == 0, torch.minimum(self._first_step(x, field).to(step.dtype), 1 - time), step)

        whole = stage == len(DORMAND_PRINCE.nodes) - 1
        after = x + _combined(_tensor(DORMAND_PRINCE.weights, x).expand(len(x), -1), self.horizon * step, slopes)
        error = _combined(_tensor(DORMAND_PRINCE_ERROR, x).expand(len(x), -1), self.horizon * step, slopes)
        ratio = field_norm(error / (self.atol + self.rtol * torch.maximum(x.abs(), after.abs()))).to(step.dtype)
        accepted = whole & (ratio <= 1)

        # The usual control: aim at 0.9 of the tolerance, change by a factor of 10 at most, and never shorten the step
        # after one that was good nor keep it after one that was not. What is not a number was far too long.
        change = torch.nan_to_num(0.9 * ratio**-0.2, nan=0.2).clamp(0.2, 10)
        change = torch.where(accepted, change.clamp(min=1), change)
        reached = torch.where(step >= 1 - time, torch.ones_like(time), time + step)
        time = torch.where(accepted, reached, time)
        step = torch.where(whole, torch.minimum(step * change, 1 - time), step)

        slope = torch.where(per_sample(accepted, x), slopes[:, -1], slopes[:, 0])  # known at the start of the next step
        fresh = torch.cat([slope[:, None], torch.zeros_like(slopes[:, 1:])], dim=1)
        slopes = torch.where(per_sample(whole, slopes), fresh, slopes)
        x = torch.where(per_sample(accepted, x), after, x)
        return x, (time, step, torch.where(whole, 1, stage + 1), slopes), time >= 1

    def _first_step(self, x: Tensor, slope: Tensor) -> Tensor:
        """A guess [B] from the first slope: Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, II.4.

        Without their second evaluation, for which the first slope stands in.
        """
        scale = self.atol + self.rtol * x.abs()
        size, speed = field_norm(x / scale), self.horizon * field_norm(slope / scale)
        return torch.minimum(size / speed, (0.01 / speed) ** 0.2).nan_to_num(nan=1.0)


def _first_state(tableau: Tableau, x: Tensor, start_time: float) -> tuple[Tensor, Tensor, Tensor]:
    """Time [B], stage [B] and slopes [B, stages, ...] at the start."""
    time = torch.full(x.shape[:1], start_time, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    slopes = x.new_zeros(len(x), len(tableau.nodes), *x.shape[1:])
    return time, torch.zeros(len(x), dtype=torch.int64, device=x.device), slopes


def _look(tableau: Tableau, horizon: float, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """The point and the time of each sample's own stage."""
    time, step, stage, slopes = state
    coefficients = _tensor(tableau.matrix, x)[stage]
    return x + _combined(coefficients, horizon * step, slopes), time + _tensor(tableau.nodes, time)[stage] * step


def _combined(coefficients: Tensor, step: Tensor, slopes: Tensor) -> Tensor:
    """step * sum of coefficients * slopes [B, ...], for coefficients [B, stages] and slopes [B, stages, ...]."""
    weights = (coefficients * step[:, None]).to(slopes.dtype)
    return (weights.reshape(*weights.shape, *[1] * (slopes.ndim - 2)) * slopes).sum(1)


def _with_slope(slopes: Tensor, stage: Tensor, field: Tensor) -> Tensor:
    slopes = slopes.clone()
    slopes[torch.arange(len(slopes), device=slopes.device), stage] = field.to(slopes.dtype)
    return slopes


def _tensor(numbers: tuple[object, ...], like: Tensor) -> Tensor:
    return _on_device(numbers, torch.promote_types(like.dtype, torch.float32), like.device)


@cache  # a copy to the device at every evaluation would make it wait
def _on_device(numbers: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _require_positive(value: float, name: str) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be positive and finite, got {value}.")


def _require_time(start_time: float) -> None:
    if not 0 <= start_time < 1:
        raise ConfigError(f"start_time must lie in [0, 1), got {start_time}; 0 is noise, 1 is the end of the way.")
