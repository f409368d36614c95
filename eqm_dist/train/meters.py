"""Sums kept on the device between two lines of progress, so that a step never waits for the host."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eqm_dist.train.distributed import all_reduce_sum

_NEVER = 2.0**53

_DENSE_PEAK_FLOPS = {
    # Dense matrix products per second of one device (vendors' data sheets; the sparse figures are twice these).
    ("H100", "bf16"): 989.5e12, ("H100", "tf32"): 494.7e12,
    ("H200", "bf16"): 989.5e12, ("H200", "tf32"): 494.7e12,
    ("A100", "bf16"): 312e12, ("A100", "tf32"): 156e12,
}  # fmt: skip


def peak_flops(device: torch.device, precision: str, world_size: int) -> float | None:
    """What all devices together could do at best, in FLOP/s; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (world_size * peak for (model, kind), peak in _DENSE_PEAK_FLOPS.items() if model in name and kind == precision),
        None,
    )


@dataclass(frozen=True)
class Interval:
    """What happened since the last report, over all ranks."""

    loss: float
    """Mean over the updates that were made; NaN if there were none. Like the gradient's norm."""
    grad_norm: float
    step_s: float
    data_wait_s: float
    first_bad_step: int | None
    """The first step whose loss was NaN or infinite, if any."""
    updates: int
    """How many were made."""
    saved: bool
    """Whether every rank has written what it was to write."""


class Meters:
    """Accumulates one interval; ``report`` reduces over ranks, returns the means and starts the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._grad_norm = torch.zeros((), dtype=torch.float64, device=self._device)
        self._bad_step = torch.full((), _NEVER, dtype=torch.float64, device=self._device)
        self._steps = 0
        self._updates = 0
        self._data_wait_s = 0.0
        self._started = time.perf_counter()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, data_wait_s: float) -> None:
        """Count step ``step`` with this rank's share of its loss and the norm of the whole gradient."""
        self.add_skipped(data_wait_s)
        self._updates += 1
        self._loss += loss.detach()
        self._grad_norm += grad_norm.detach()
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self._bad_step = torch.where(finite, self._bad_step, self._bad_step.clamp(max=step))

    def add_skipped(self, data_wait_s: float) -> None:
        """Count a step without an update."""
        self._steps += 1
        self._data_wait_s += data_wait_s

    def restart(self) -> None:
        """Forget the interval: its steps are done again."""
        self._reset()

    def restart_clock(self) -> None:
        """Leave out of the step time what came before: an evaluation, a save."""
        self._started = time.perf_counter()

    def report(self, saved: bool = True) -> Interval:
        """Means over the interval; a collective, so every rank calls it at the same steps.

        Args:
            saved: whether this rank has written what it was to write.
        """
        bad_step = self._bad_step.item()  # the gradient norm is global, so every rank sees the same first bad step
        updates = self._updates or math.nan
        loss, writing = all_reduce_sum(torch.stack([self._loss, self._loss.new_full((), float(not saved))])).tolist()
        interval = Interval(
            loss=loss / updates,
            grad_norm=self._grad_norm.item() / updates,
            step_s=(time.perf_counter() - self._started) / self._steps,
            data_wait_s=self._data_wait_s / self._steps,
            first_bad_step=int(bad_step) if bad_step < _NEVER else None,
            updates=self._updates,
            saved=writing == 0,
        )
        self._reset()
        return interval
