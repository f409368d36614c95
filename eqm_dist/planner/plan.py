"""A plan: memory, speed, traffic, days and money of a run, and the sentences for what does not fit."""

import math
from dataclasses import dataclass
from typing import Any

from eqm_dist.models.sizes import training_flops_per_image
from eqm_dist.planner import speed
from eqm_dist.planner.hardware import HOST_COPY, Gpu
from eqm_dist.planner.memory import decoding_memory, memory, remedy, sampling_memory
from eqm_dist.planner.model import Work

RESTART_S = 60.0
"""From a failure to the next step. Measured with tiny models: 17 s after a killed process, 36 to 57 s after a host
(benchmarks/results/chaos.json). On GPUs the compilation and a larger state come on top."""
WRITE = 314e6
"""Bytes a rank hashes and writes in a second of a CPU's time: two ranks, benchmarks/results/save_*.json."""


@dataclass(frozen=True)
class Plan:
    """What is expected of a run on some GPUs; times in seconds, sizes in bytes."""

    work: Work
    gpu: Gpu
    memory: dict[str, float]
    sampling: float
    decoding: float
    step: dict[str, float]
    save_s: float
    stall_s: float
    fid_hours: float
    goodput: float
    best_interval_s: float
    failure_hours: float
    price: tuple[float, float] | None

    @property
    def step_s(self) -> float:
        """Seconds of an update."""
        return sum(self.step.values())

    @property
    def images_per_s(self) -> float:
        """Of all GPUs together."""
        return self.work.batch / self.step_s

    @property
    def mfu(self) -> float:
        """The part of the bf16 peak that the model's own operations are; what is computed again does not count."""
        return self.images_per_s * training_flops_per_image(self.work.macs) / (self.gpu.peak * self.work.gpus)

    @property
    def bottleneck(self) -> str:
        """The part of a step that takes longest, the products apart, which is what the time is for."""
        rest = {part: seconds for part, seconds in self.step.items() if part != "matrix products"}
        longest = max(rest, key=lambda part: rest[part])
        return "matrix products" if rest[longest] < self.step["matrix products"] / 2 else longest

    @property
    def days(self) -> float:
        """From the first step to the last, failures included."""
        return self.work.steps * self.step_s / self.goodput / 86400 if self.goodput else math.inf

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return self.days * 24 * self.work.gpus

    @property
    def cost(self) -> tuple[float, float] | None:
        """Dollars, from and to."""
        return None if self.price is None else (self.price[0] * self.gpu_hours, self.price[1] * self.gpu_hours)

    @property
    def fits(self) -> bool:
        """Whether a step fits into a GPU."""
        return sum(self.memory.values()) <= self.gpu.memory

    def sentences(self) -> list[str]:
        """What does not fit and what would, and what is worth knowing."""
        said: list[str] = []
        size = f"a {self.gpu.name}'s {self.gpu.memory / 1e9:.0f} GB"
        if not self.fits:
            need = f"A step takes {sum(self.memory.values()) / 1e9:.1f} GB and does not fit into {size}"
            found = remedy(self.work, self.gpu)
            if found is None:
                said.append(f"{need}; no ZeRO stage, micro-batch or offload makes it fit.")
            else:
                said.append(f"{need}; with {found[0]} it takes {sum(memory(found[1]).values()) / 1e9:.1f} GB.")
        if self.sampling > self.gpu.memory:
            said.append(
                f"Drawing {self.work.sampling_batch:,} images at once takes {self.sampling / 1e9:.1f} GB and does not"
                f" fit into {size}; lower --evaluation.batch."
            )
        if self.goodput < 0.8:
            said.append(
                f"Of the time {1 - self.goodput:.0%} is lost to failures; save every"
                f" {max(1, round(self.best_interval_s / self.step_s)):,} steps (--checkpoint.every)."
            )
        if self.work.energy:
            said.append(
                "An explicit energy is trained by a double backward, whose time and memory are not in this plan: expect"
                " more than twice (benchmarks/bench_energy.py)."
            )
        if self.work.gpus % 8 and self.work.gpus > 8:
            said.append(f"{self.work.gpus:,} GPUs are no whole number of nodes of 8.")
        if self.work.batch % self.work.gpus:
            said.append(
                f"{self.work.batch:,} images do not divide by {self.work.gpus:,} GPUs: some wait for those with more."
            )
        return said

    def record(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            "gpu": self.gpu.name, "gpus": self.work.gpus, "global_batch": self.work.batch, "passes": self.work.passes,
            "images_per_pass": self.work.per_pass, "parameters": self.work.parameters, "memory_bytes": self.memory,
            "memory_total_bytes": sum(self.memory.values()), "fits": self.fits, "sampling_bytes": self.sampling,
            "decoding_bytes": self.decoding, "step_seconds": self.step, "step_total_seconds": self.step_s,
            "images_per_second": self.images_per_s, "mfu": self.mfu, "bottleneck": self.bottleneck,
            "data_bytes_per_second": self.images_per_s * self.work.moment_bytes,
            "checkpoint_bytes": self.work.checkpoint_bytes, "save_seconds": self.save_s,
            "save_stall_seconds": self.stall_s, "fid50k_gpu_hours": self.fid_hours,
            "failure_hours_per_gpu": self.failure_hours, "goodput": self.goodput,
            "best_save_interval_seconds": self.best_interval_s, "days": self.days, "gpu_hours": self.gpu_hours,
            "dollars": self.cost, "sentences": self.sentences(),
        }  # fmt: skip


def plan(work: Work, gpu: Gpu, failure_hours: float, price: tuple[float, float] | None) -> Plan:
    """What to expect of a run.

    Args:
        work: the run.
        gpu: on which it runs.
        failure_hours: between failures of one GPU; infinite for none.
        price: dollars for an hour of a GPU, from and to.
    """
    times = speed.step(work, gpu)
    step_s = sum(times.values())
    states = 4 * (3 + work.emas) * work.trained
    share = states / (work.gpus if work.stage else 1)
    # The copy to the host overlaps with the next passes; the rest is written by all ranks at once, the EMA by one.
    passes_s = sum(times[part] for part in ("matrix products", "attention", "elementwise"))
    stall_s = max(0.0, share / HOST_COPY - passes_s)
    save_s = share / HOST_COPY + (share + 4 * work.parameters) / WRITE
    between = failure_hours * 3600 / work.gpus
    interval = work.save_every * step_s
    return Plan(
        work=work, gpu=gpu, memory=memory(work), sampling=sampling_memory(work), decoding=decoding_memory(), step=times,
        save_s=save_s, stall_s=stall_s, fid_hours=speed.fid_hours(work, gpu),
        goodput=goodput(interval, stall_s, save_s, RESTART_S, between),
        best_interval_s=max(young(stall_s, between), save_s), failure_hours=failure_hours, price=price,
    )  # fmt: skip


def goodput(interval_s: float, stall_s: float, save_s: float, restart_s: float, between_s: float) -> float:
    """The part of the time that goes into steps that count.

    Failures come at random (exponential). Every ``interval_s`` of steps the run stalls for ``stall_s``; that save is
    whole ``save_s`` later, while steps go on. A failure costs ``restart_s``, in which another may come, and all steps
    since the newest whole save. Exact; with ``save_s`` of 0 it is Daly's form of 2006.

    Args:
        interval_s: of steps between two saves.
        stall_s: in which training waits for a save.
        save_s: from a save's begin until it is whole; the next one waits for it.
        restart_s: from a failure to the next step.
        between_s: mean time between failures of the whole run.
    """
    segment = max(interval_s + stall_s, save_s)
    if math.isinf(between_s):
        return interval_s / segment
    if segment / between_s > 500:
        return 0.0
    return interval_s * math.exp(-(save_s + restart_s) / between_s) / (between_s * math.expm1(segment / between_s))


def young(stall_s: float, between_s: float) -> float:
    """Young's interval between saves (1974), the first order of what goodput is largest at."""
    return math.sqrt(2 * stall_s * between_s)


def daly(stall_s: float, between_s: float) -> float:
    """Daly's interval (2006), of a higher order."""
    if stall_s >= 2 * between_s:
        return between_s
    root = stall_s / (2 * between_s)
    return math.sqrt(2 * stall_s * between_s) * (1 + math.sqrt(root) / 3 + root / 9) - stall_s
