"""A plan as people read it: one run, or a table over numbers of GPUs."""

from collections.abc import Sequence

from eqm_dist.errors import ConfigError
from eqm_dist.planner.hardware import PRICES, Gpu
from eqm_dist.planner.model import Work
from eqm_dist.planner.plan import Plan, plan
from eqm_dist.text import aligned, counted, labelled

SIZES = tuple(2**power for power in range(11))
"""Numbers of GPUs of the table: 1 to 1,024."""


def one(found: Plan) -> str:
    """The plan of a run, every part on a line of its own."""
    work, gpu = found.work, found.gpu
    step_s = found.step_s
    total = sum(found.memory.values())
    lines = [
        f"{work.parameters / 1e6:,.1f} M parameters on {counted(work.gpus, gpu.name)}:"
        f" {work.batch:,} images an update, {work.images:,} on a GPU in {work.passes} pass{'es' * (work.passes > 1)},"
        f" {'plain' if work.plain else f'ZeRO {work.stage}'}, {work.precision}{', compiled' if work.compiled else ''}"
        f"{', checkpointed activations' if work.checkpointing else ''}",
        "",
        f"memory of a GPU: {total / 1e9:.1f} of {gpu.memory / 1e9:.0f} GB",
        *labelled({part: f"{size / 1e9:7.2f} GB" for part, size in found.memory.items()}, "  "),
        "",
        f"a step: {step_s * 1e3:,.1f} ms, {found.images_per_s:,.0f} images/s, MFU {found.mfu:.0%}",
        *labelled({part: f"{took * 1e3:8.2f} ms  {took / step_s:4.0%}" for part, took in found.step.items()}, "  "),
        "",
        *labelled(
            {
                "sampling": f"{found.sampling / 1e9:.1f} GB for {work.sampling_batch:,} images at once;"
                            f" a VAE's decoder {found.decoding / 1e9:.1f} GB for 8",
                "data": f"{found.images_per_s * work.moment_bytes / 1e6:,.1f} MB/s of shards for all,"
                        f" {found.images_per_s * work.moment_bytes / work.nodes / 1e6:,.1f} MB/s for a node",
                "checkpoint": f"{work.checkpoint_bytes / 1e9:.1f} GB every {work.save_every * step_s / 60:,.1f}"
                              f" minutes, whole after {found.save_s:.0f} s; training waits {found.stall_s:.2f} s",
                "FID-50K": f"{found.fid_hours:,.1f} GPU-hours at {work.nfe} evaluations"
                           f"{', each twice for guidance' if work.guided else ''}",
                "goodput": f"{found.goodput:.1%} with a failure of a GPU in {found.failure_hours:,.0f} hours:"
                           f" one in {found.failure_hours / work.gpus:,.1f} hours of the run",
                "takes": f"{found.days:,.2f} days, {found.gpu_hours:,.0f} GPU-hours",
                "costs": _dollars(found.cost),
            }
        ),
    ]  # fmt: skip
    said = found.sentences()
    return "\n".join(
        [*lines, *([""] if said else []), *said, "", "No part of this was timed on a GPU (docs/scaling.md)."]
    )


def table(works: Sequence[Work], gpu: Gpu, failure_hours: float, price: tuple[float, float] | None) -> list[Plan]:
    """The plans of a sweep, without those that cannot be."""
    found: list[Plan] = []
    for work in works:
        try:
            work.check()
        except ConfigError:
            continue
        found.append(plan(work, gpu, failure_hours, price))
    return found


def as_table(plans: Sequence[Plan]) -> str:
    """Plans in Markdown."""
    head = ["GPUs", "batch", "GB a GPU", "ms a step", "images/s", "MFU", "longest part", "data MB/s", "save s",
            "goodput", "days", "GPU-hours", "$"]  # fmt: skip
    rows = [
        [f"{each.work.gpus:,}", f"{each.work.batch:,}", _gigabytes(each), f"{each.step_s * 1e3:,.1f}",
         f"{each.images_per_s:,.0f}", f"{each.mfu:.0%}", each.bottleneck,
         f"{each.images_per_s * each.work.moment_bytes / 1e6:,.0f}", f"{each.save_s:.0f}", f"{each.goodput:.1%}",
         f"{each.days:,.2f}", f"{each.gpu_hours:,.0f}", _dollars(each.cost, short=True)]
        for each in plans
    ]  # fmt: skip
    body = [f"| {line.replace(SEPARATOR, '|')} |" for line in aligned([_with_bars(row) for row in (head, *rows)])]
    return "\n".join([body[0], "|---" * len(head) + "|", *body[1:]])


SEPARATOR = "\0"


def _with_bars(row: Sequence[str]) -> list[str]:
    return [cell for each in row for cell in (each, SEPARATOR)][:-1]


def _gigabytes(found: Plan) -> str:
    return f"{sum(found.memory.values()) / 1e9:.1f}" + ("" if found.fits else " (too much)")


def _dollars(cost: tuple[float, float] | None, short: bool = False) -> str:
    if cost is None:
        return "" if short else "unknown: no price of this GPU was found; give one with --price"
    low, high = (f"{each:,.0f}" for each in cost)
    if short:
        return low if low == high else f"{low} to {high}"
    return f"${low}" if low == high else f"${low} to ${high} (prices {PRICES})"
