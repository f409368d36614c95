"""Bytes of GPU memory, part by part.

States are the closed form that benchmarks/bench_memory.py meets; activations are what autograd keeps, operation by
operation, held against the same record in tests/test_plan.py.
"""

from dataclasses import replace

from eqm_dist.planner.hardware import Gpu
from eqm_dist.planner.model import Work
from eqm_dist.train.memory import model_state_bytes

FIXED = 1.5e9
"""CUDA's context, NCCL's channels and cuBLAS's workspaces. Assumed."""
FRAGMENTATION = 0.05
"""What the allocator holds beside what is used. Assumed."""
BUCKET_VALUES = 50_000_000
"""Values of a bucket of gradients (deepspeed_engine.py); DeepSpeed fills one while the other is sent."""

# Bytes that autograd keeps of each value of the tokens in a block: inputs of the two norms and their outputs, of the
# four products, of attention (queries, keys, values, output), of the two gates, and GELU's two of four times the width.
# In autocast the residual stream and the norms stay fp32, and all else is bf16. Derived; measured: 20 and 12 values.
KEPT_FP32, KEPT_BF16 = 80, 48
FINAL_FP32, FINAL_BF16 = 12, 10
TRANSIENT = 24
"""The same of gradients of activations in a block's backward pass: GELU's two, and two of the stream. Derived."""
DECODER = 270e6
"""Of an image of 256x256 in the VAE's decoder, fp32: four tensors of 256 channels. Derived."""


def activation_bytes(work: Work, images: int) -> float:
    """What one pass keeps for its backward pass."""
    values = images * work.tokens * work.width
    final = values * (FINAL_BF16 if work.bf16 else FINAL_FP32)
    if work.checkpointing:
        return work.depth * 4 * values + final  # the blocks' inputs, fp32
    casts = 2 * work.trained if work.bf16 else 0  # autocast's copies of the weights
    return work.depth * block_bytes(work, images) + final + casts


def block_bytes(work: Work, images: int) -> float:
    """The same of one block."""
    return (KEPT_BF16 if work.bf16 else KEPT_FP32) * images * work.tokens * work.width


def memory(work: Work) -> dict[str, float]:
    """Bytes of a GPU by part, at the worst moment of a step; offload's part is the host's and left out.

    Without accumulation the gradient grows as activations are freed: the larger of the two counts.
    """
    P, N = work.trained, work.gpus
    state = model_state_bytes(P, work.emas, work.stage, N)
    gradient = 4 * P // (N if work.stage else 1) * (2 if work.stage == 3 else 1)
    parts: dict[str, float] = {"weights, moments, EMAs": state - gradient}
    # Until the update ZeRO 1 keeps the whole gradient (docs/training.md).
    whole = 4 * P if work.stage == 1 else 0
    kept = activation_bytes(work, work.per_pass)
    working = (TRANSIENT * work.per_pass * work.tokens * work.width
               + (block_bytes(work, work.per_pass) if work.checkpointing else 0))  # fmt: skip
    if work.offload:
        parts["weights, moments, EMAs"] = 4 * P // (N if work.stage == 3 else 1)
        gradient = 0
    if work.passes > 1:
        parts["gradient"] = gradient + whole
        parts["activations"] = kept + working
    else:
        parts["gradient, then activations"] = max(gradient + whole, kept + working)
    if work.stage:
        parts["buckets"] = 2 * 4 * min(P, BUCKET_VALUES)
    parts["CUDA, NCCL"] = FIXED
    parts["fragmentation"] = FRAGMENTATION * sum(parts.values())
    return parts


def sampling_memory(work: Work) -> float:
    """Bytes to draw images: the EMA, its bf16 copy, and a forward pass that keeps nothing but a block's tensors."""
    images = work.sampling_batch * (2 if work.guided else 1)
    return 6 * work.parameters + block_bytes(replace(work, precision="bf16"), images) + FIXED


def decoding_memory() -> float:
    """Bytes to decode eight images at a time with a VAE of 84 million parameters."""
    return 8 * DECODER + 4 * 84e6


def fits(work: Work, gpu: Gpu) -> bool:
    """Whether a step fits into a GPU."""
    return sum(memory(work).values()) <= gpu.memory


def remedy(work: Work, gpu: Gpu) -> tuple[str, Work] | None:
    """The cheapest change after which a step fits, as flags; None if nothing does.

    In order of what they cost: more passes, a third more arithmetic, more traffic, the host's memory. The plain engine
    of one process can do the first two.
    """
    stages = [work.stage] if work.plain else sorted({work.stage, 1, 2, 3} - set(range(work.stage)))
    for offload in [work.offload] if work.plain else sorted({work.offload, True}):
        for stage in stages:
            for checkpointing in sorted({work.checkpointing, True}):
                micro = work.per_pass
                while micro and not (offload and not stage):
                    tried = replace(work, stage=stage, micro=micro, checkpointing=checkpointing, offload=offload)
                    if fits(tried, gpu):
                        return _flags(work, tried), tried
                    micro //= 2
    return None


def _flags(work: Work, tried: Work) -> str:
    changes = {
        f"--train.micro_batch {tried.micro}": work.per_pass != tried.micro,
        "--train.activation_checkpointing true": work.checkpointing != tried.checkpointing,
        f"--engine.zero_stage {tried.stage}": work.stage != tried.stage,
        "--engine.offload cpu": work.offload != tried.offload,
    }
    return " ".join(flag for flag, changed in changes.items() if changed)
