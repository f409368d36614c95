"""Seconds of a step, part by part, and of what else a run does.

A roofline: operations at a share of the peak, bytes at one of the bandwidth, and no faster than kernels are launched.
"""

from eqm_dist.planner.hardware import (
    ATTENTION_SHARE,
    GEMM_SHARE,
    HOST_COPY,
    LAUNCH_S,
    MEMORY_SHARE,
    NETWORK_SHARE,
    Gpu,
)
from eqm_dist.planner.memory import BUCKET_VALUES
from eqm_dist.planner.model import Work

# Bytes that elementwise kernels move, by the value of the tokens in a block, forward and backward: 983 and 1,949 MB of
# XL/2 at 32 images, counted (benchmarks/results/counts_*.json) less the casts of the weights, 6 bytes a weight and
# pass. Compiled: 1.42 GB in all, derived, in the same proportion.
EAGER, COMPILED = (104.2, 206.5), (40.3, 79.9)
CAST = 6
KERNELS, KERNELS_COMPILED = (33, 57), (12, 20)
"""Of a block, forward and backward: counted, and assumed of compiled ones."""
DRAWS, DRAWS_COMPILED = 606, 20
"""Kernels that draw a batch: counted (docs/training.md)."""
UPDATE = 28 + 4
"""Bytes a parameter: AdamW and the norm; an EMA has 12 more. Derived from what they read and write."""
COPIES_PASS, COPIES_STEP = 21, 40
"""Bytes a parameter that ZeRO copies in a pass, and for the worker's part in a step. Derived from DeepSpeed's code."""
PRECISIONS = {"bf16": 1.0, "tf32": 0.5, "fp32": 1 / 16}
"""Of the peak of bf16, by the data sheets: fp32 does without tensor cores."""
TILE = 128, 256
"""Of the result of a matrix product, which one unit computes. Assumed."""
COLLECTIVE_S, HOP_S = 10e-6, 3e-6
"""A collective takes at least the first, and the second for every doubling of its ranks. Assumed."""
DECODER_MACS = 310e9
"""Of Stable Diffusion's decoder for 256x256. Published counts differ; assumed."""

Times = dict[str, float]


def step(work: Work, gpu: Gpu) -> Times:
    """Seconds of an update by part."""
    times = passes(work, gpu)
    computing = sum(times.values())
    P, N = work.trained, work.gpus
    bandwidth = gpu.bandwidth * MEMORY_SHARE
    update = (UPDATE + 12 * work.emas) * P / (N if work.stage else 1)
    copies = (COPIES_PASS * P * work.passes + COPIES_STEP * P / N) if work.stage else 0
    if work.offload:
        # A gradient goes to the host and comes back as a weight, over PCIe; how long the CPU updates is not known.
        times["to the host and back"] = 8 * P / N / HOST_COPY
    times["update and copies"] = (update + copies) / bandwidth
    if N > 1:
        reduce, gather, last = traffic(work, gpu)
        # Gradients are sent while the rest of the backward pass runs; the last bucket has nothing to hide behind.
        hidden = 2 / 3 * computing
        times["reduce, not hidden"] = max(last, reduce - hidden)
        if gather:
            times["gather"] = gather
    kernels = KERNELS_COMPILED if work.compiled else KERNELS
    launched = work.depth * (sum(kernels) + (kernels[0] if work.checkpointing else 0))
    launched += DRAWS_COMPILED if work.compiled else DRAWS
    waiting = launched * work.passes * LAUNCH_S - computing
    if waiting > 0:
        times["waiting for launches"] = waiting
    return times


def passes(work: Work, gpu: Gpu) -> Times:
    """Seconds of the forward and backward passes of an update, by part."""
    again = 1 if work.checkpointing else 0
    images = work.images
    arithmetic = gpu.peak * PRECISIONS[work.precision]
    attention = 2 * work.tokens**2 * work.width * work.depth
    products = 2 * (work.macs - attention) * images
    used = filled(work, gpu)
    # The gradients of weights fill the GPU whatever the batch.
    products_s = products * ((1 + again) / used + 1 / used + 1) / (arithmetic * GEMM_SHARE)
    # Flash attention's backward pass computes the forward pass again: 2.5 of it, not 2.
    attention_s = 2 * attention * images * (3.5 + again) / (arithmetic * ATTENTION_SHARE)
    moved = elementwise(work, images, work.passes, again)
    draws = DRAWS_COMPILED if work.compiled else DRAWS
    return {
        "matrix products": products_s,
        "attention": attention_s,
        "elementwise": moved / (gpu.bandwidth * MEMORY_SHARE),
        "draws": draws * work.passes * LAUNCH_S,
    }


def elementwise(work: Work, images: int, times: int, again: int = 0) -> float:
    """Bytes that all blocks' elementwise kernels move, and the casts of their weights."""
    forward, backward = COMPILED if work.compiled else EAGER
    values = images * work.tokens * work.width * work.depth
    weights = 18 * work.width**2 * work.depth
    casts = CAST * weights * (2 + again) * times if work.bf16 else 0
    return values * (forward * (1 + again) + backward) + casts


def filled(work: Work, gpu: Gpu) -> float:
    """The part of a GPU that the tiles of a pass's matrix products fill, weighted by their operations."""
    rows = -(-work.per_pass * work.tokens // TILE[0])
    busy = 0.0
    for columns, share in ((3, 3), (1, 1), (4, 4), (1, 4)):  # of the width: qkv, projection, MLP in and out
        tiles = rows * -(-columns * work.width // TILE[1])
        waves = -(-tiles // gpu.units)
        busy += share / 12 * waves * gpu.units / tiles
    return 1 / busy


def traffic(work: Work, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds to reduce an update's gradients, to gather its weights, and of the last bucket alone."""
    P, N = work.trained, work.gpus
    bus = gpu.bus if work.nodes == 1 else min(gpu.bus, gpu.network * NETWORK_SHARE)
    latency = COLLECTIVE_S + HOP_S * (N - 1).bit_length()
    buckets = -(-P // BUCKET_VALUES)
    sent = 4 * P * (N - 1) / N / bus
    times = work.passes if work.stage in (2, 3) else 1
    if work.stage == 0:  # an all-reduce, which is both
        return 2 * sent + buckets * latency, 0.0, 2 * sent / buckets
    # Each part of a bucket goes to the rank that keeps it: no fewer reduces than there are ranks.
    reduces = max(buckets, N)
    gather = (sent + buckets * latency) * (work.passes * 2 if work.stage == 3 else 1)
    return (sent + reduces * latency) * times, gather, sent / buckets + latency


def model_evaluations_s(work: Work, gpu: Gpu, images: int) -> float:
    """Seconds of one forward pass of so many images in bf16, as in sampling."""
    attention = 2 * work.tokens**2 * work.width * work.depth
    products = 2 * (work.macs - attention) * images / (gpu.peak * GEMM_SHARE)
    mixing = 2 * attention * images / (gpu.peak * ATTENTION_SHARE)
    forward, _ = COMPILED if work.compiled else EAGER
    moved = forward * images * work.tokens * work.width * work.depth
    return products + mixing + moved / (gpu.bandwidth * MEMORY_SHARE)


def fid_hours(work: Work, gpu: Gpu, images: int = 50_000) -> float:
    """GPU-hours to draw and decode images for an FID."""
    drawn = model_evaluations_s(work, gpu, images) * work.nfe * (2 if work.guided else 1)
    decoded = 2 * DECODER_MACS * images / (gpu.peak * GEMM_SHARE / 2)
    return (drawn + decoded) / 3600
