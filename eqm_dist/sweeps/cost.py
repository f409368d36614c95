"""What work costs on this machine, for the plan that a dry run prints."""

import time
from collections.abc import Callable

import torch


def measured_seconds(work: Callable[[], torch.Tensor], device: torch.device) -> float:
    """What work takes: on a GPU, or on one core in its own time, whatever else runs on this machine.

    Args:
        work: computes a scalar on the device; done twice, for the first time warms up.
        device: where.
    """
    now = time.perf_counter if device.type == "cuda" else time.process_time
    threads, started = torch.get_num_threads(), 0.0
    torch.set_num_threads(1)
    try:
        for _ in range(2):
            started = now()
            work().item()
        return now() - started
    finally:
        torch.set_num_threads(threads)
