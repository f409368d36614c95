"""Sampling: descend the field from a start, and count what that cost."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eqm_dist.core.samplers import Field, Sampler
from eqm_dist.errors import ConfigError


@dataclass(frozen=True)
class SampleResult:
    """Samples [B, ...] and the number of evaluations of the field that each took, ``nfe`` [B] int64."""

    samples: Tensor
    nfe: Tensor


@torch.no_grad()
def sample(field: Field, start: Tensor, sampler: Sampler[Any], evaluations: int) -> SampleResult:
    """Descend from ``start`` for a number of evaluations of the field.

    The official "250 steps" are 249 evaluations. A guided field counts once, though its model sees two batches.

    Args:
        field: x [B, ...] -> field [B, ...], pointing downhill.
        start: [B, ...]: noise, or a partly noised sample; left as it is.
        sampler: the descent method.
        evaluations: at least 1.

    Raises:
        ConfigError: evaluations is less than 1.
    """
    if evaluations < 1:
        raise ConfigError(f"evaluations must be at least 1, got {evaluations}.")
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return field(x)

    x, state = start, sampler.init(start)
    for _ in range(evaluations):
        x, state = sampler.step(counted, x, state)
    return SampleResult(x, torch.full(start.shape[:1], calls, dtype=torch.int64, device=start.device))
