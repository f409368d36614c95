"""How fast a training step is: images per second, MFU, peak memory, and where the time goes.

python -m benchmarks.bench_step [--sizes S] [--batches 16] [--cases fp32,fp32+compile] [--rounds 3] [--steps 5]
python -m benchmarks.bench_step --official PATH     also the step of the official code, from a checkout of it
python -m benchmarks.bench_step --count-only        kernels and bytes of a block and of the draws, on any machine

SiT at patch size 2 on 4x32x32 latents with 1,000 classes, EqM's loss with the truncated c(gamma), AdamW and one EMA, on
one device. The batch lies on the device already, so that no loader is timed. Cases take turns, round by round, so that
what disturbs the machine disturbs all of them; a case is told by ``PRECISION[+compile][+deepspeed]``.

MFU: 2 FLOP for each multiplication with its addition, three times the forward pass (a block that is computed again does
not count), over what the device's data sheet promises for dense matrix products in that precision. Parts are timed apart
from the whole, with a synchronisation after each, so their sum is an upper bound of it.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.record import write_record
from eqm_dist.config import SIZES
from eqm_dist.core.corruption import constant_pace
from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.objective import eqm_loss
from eqm_dist.data.loader import Batch
from eqm_dist.models.sit import SiT
from eqm_dist.models.sizes import forward_macs, training_flops_per_image
from eqm_dist.train.compiled import compile_blocks, compiled_draw, require_compiler
from eqm_dist.train.engine import Engine, Precision, TorchEngine
from eqm_dist.train.meters import peak_flops
from eqm_dist.train.optimizer import EmaAdamW
from eqm_dist.train.step import BatchLoss, ModelWithLoss, draw_batch

SIDE, CHANNELS, PATCH, CLASSES = 32, 4, 2, 1000
LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999


@dataclass(frozen=True)
class Case:
    """One way to make a step."""

    size: str
    batch: int
    precision: Precision
    compiled: bool
    deepspeed: bool

    @property
    def name(self) -> str:
        """``B/2 x32 bf16+compile``."""
        return f"{self.size}/{PATCH} x{self.batch} {self.precision}" + "+compile" * self.compiled + (
            "+deepspeed" * self.deepspeed
        )


def cases(sizes: Sequence[str], batches: Sequence[int], kinds: Sequence[str]) -> list[Case]:
    """All of them, in order."""
    made = []
    for size in sizes:
        for batch in batches:
            for kind in kinds:
                precision, *words = kind.split("+")
                made.append(Case(size, batch, cast("Precision", precision), "compile" in words, "deepspeed" in words))
    return made


def build_model(size: str, **options: Any) -> SiT:
    """A model of one of the published sizes."""
    return SiT(SIDE, PATCH, CHANNELS, **SIZES[size]._asdict(), num_classes=CLASSES, **options)


def flops_per_image(size: str) -> float:
    """Of a training step."""
    shape = SIZES[size]
    macs = forward_macs(
        input_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, hidden_size=shape.hidden_size, depth=shape.depth
    )
    return training_flops_per_image(macs)


def build_engine(case: Case, device: torch.device) -> Engine:
    """The engine of a case, as ``build_run`` would make it."""
    # TF32 where it is asked for, and nowhere else.
    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    with torch.device(device):
        model = build_model(case.size)
    if case.compiled:
        compile_blocks(model.blocks)
    loss = BatchLoss(
        partial(eqm_loss, decay=TruncatedDecay(0.8, 4.0), path=constant_pace),
        seed=0,
        latent_scale=0.18215,
        latent_shift=0.0,
        label_dropout=0.1,
        null_label=CLASSES,
        flip=False,
        draw=compiled_draw() if case.compiled else draw_batch,
    )
    module = ModelWithLoss(model, loss)
    optimizer = EmaAdamW(module.trained_parameters().values(), lr=LEARNING_RATE, ema_decays=[EMA_DECAY])
    if not case.deepspeed:
        return TorchEngine(module, optimizer, device=device, precision=case.precision)
    from eqm_dist.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        module, optimizer, device=device, zero_stage=1, precision=case.precision, micro_batch=case.batch
    )


def random_batch(size: int, device: torch.device, step: int = 0) -> Batch:
    """Moments [size, 1, 2C, H, W] with their labels and positions."""
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(size, 1, 2 * CHANNELS, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(step * size + torch.arange(size), moments, labels).to(device)


def measure(case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """One round of one case: build it, warm it up, time whole steps, then their parts."""
    engine, batch = build_engine(case, device), random_batch(case.batch, device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step() -> None:
        engine.backward(engine.losses(batch).mean(), last=True)
        engine.step(LEARNING_RATE, lambda norm: norm == norm)  # with the guard's look at the norm, as in training

    began = time.perf_counter()
    step()
    synchronize()
    first_s = time.perf_counter() - began
    step()
    synchronize()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    step_s = (time.perf_counter() - began) / steps
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    parts: dict[str, list[float]] = {"forward": [], "backward": [], "update": []}
    for _ in range(steps):
        loss = _timed(parts["forward"], synchronize, lambda: engine.losses(batch).mean())
        _timed(parts["backward"], synchronize, partial(engine.backward, loss, last=True))
        _timed(parts["update"], synchronize, partial(engine.step, LEARNING_RATE, lambda norm: norm == norm))
    draws: list[float] = []
    draw = compiled_draw() if case.compiled else draw_batch
    for _ in range(steps + 1):
        _timed(draws, synchronize, lambda: draw(0, batch.positions, (CHANNELS, SIDE, SIDE), 0.1, False))
    del engine
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "first_step_s": first_s,
        "step_s": step_s,
        "peak_bytes": peak,
        "parts_s": {name: statistics.median(times) for name, times in {**parts, "draws": draws[1:]}.items()},
    }


def _timed(times: list[float], synchronize: Callable[[], None], work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    done = work()
    synchronize()
    times.append(time.perf_counter() - began)
    return done


# --- the official step ---


def measure_official(path: Path, case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """The step of the official training script: its model, its loss, AdamW and its EMA, in its precision.

    Args:
        path: a checkout of the official code; its ``models`` and ``transport`` are imported.
        case: size, batch and precision.
        device: where to train.
        steps: to time.
    """
    sys.path.insert(0, str(path))
    from models import EqM_models  # pyright: ignore[reportMissingImports]
    from transport import create_transport  # pyright: ignore[reportMissingImports]

    torch.set_float32_matmul_precision("high" if case.precision == "tf32" else "highest")
    model = EqM_models[f"EqM-{case.size}/{PATCH}"](input_size=SIDE, num_classes=CLASSES).to(device)
    average = {name: param.detach().clone() for name, param in model.named_parameters()}
    transport = create_transport("Linear", "velocity", None, None, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(case.batch, CHANNELS, SIDE, SIDE, generator=generator).to(device)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator).to(device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = transport.training_losses(model, latents, {"y": labels})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, param in model.named_parameters():
                average[name].mul_(EMA_DECAY).add_(param, alpha=1 - EMA_DECAY)

    for _ in range(2):
        step()
    synchronize()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"step_s": (time.perf_counter() - began) / steps, "peak_bytes": peak, "parts_s": {}}


# --- counts, without a device that could time anything ---

_VIEWS = tuple(
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "unbind", "split", "select",
                 "slice.", "unsqueeze", "t.", "detach", "alias", "as_strided", "squeeze", "chunk")
)  # fmt: skip
_PRODUCTS = ("mm", "bmm", "attention", "flash")


class Counter(TorchDispatchMode):
    """Counts operations that would be kernels, and the bytes that they read and write.

    Attributes:
        kernels: how many.
        elementwise_bytes: of those that are no matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.elementwise_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("aten.") and not name.startswith(_VIEWS) and "empty" not in name:
            self.kernels += 1
            if not any(product in name for product in _PRODUCTS):
                leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
                self.elementwise_bytes += sum(t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor))
        return out


def counts(size: str, batch: int) -> dict[str, Any]:
    """Kernels and elementwise bytes of a block and of the draws, eager, in bf16 autocast, on tensors without values."""
    width, depth = SIZES[size].hidden_size, SIZES[size].depth
    with FakeTensorMode():
        block: Any = build_model(size).blocks[0]
        tokens = torch.empty(batch, (SIDE // PATCH) ** 2, width, requires_grad=True)
        condition = torch.empty(batch, width, requires_grad=True)
        with Counter() as forward, torch.autocast("cpu", torch.bfloat16):
            out = block(tokens, condition)
        with Counter() as backward:
            out.backward(torch.empty_like(out))
    with Counter() as draws:
        draw_batch(0, torch.arange(batch), (CHANNELS, SIDE, SIDE), 0.1, True)
    return {
        "size": size,
        "batch": batch,
        "block": {
            "forward_kernels": forward.kernels,
            "backward_kernels": backward.kernels,
            "forward_elementwise_mb": round(forward.elementwise_bytes / 1e6),
            "backward_elementwise_mb": round(backward.elementwise_bytes / 1e6),
        },
        "blocks": depth,
        "draws_kernels_eager": draws.kernels,
        "gflop_per_image": round(flops_per_image(size) / 1e9, 1),
    }


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="S", help="of S, B, L, XL, separated by commas (default: %(default)s)")
    parser.add_argument("--batches", default="16", help="images of a step (default: %(default)s)")
    parser.add_argument("--cases", default="fp32,fp32+compile", metavar="CASE,...", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed in a round (default: %(default)s)")
    parser.add_argument("--official", type=Path, metavar="PATH", help="a checkout of the official code")
    parser.add_argument("--count-only", action="store_true", help="count kernels and bytes, time nothing")
    arguments = parser.parse_args()
    sizes, batches = arguments.sizes.split(","), [int(batch) for batch in arguments.batches.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.count_only:
        found = [counts(size, batch) for size in sizes for batch in batches]
        print(*found, f"wrote {write_record('step_counts', device, {'counted': found})}", sep="\n")
        return
    all_cases = cases(sizes, batches, arguments.cases.split(","))
    if any(case.compiled for case in all_cases):
        require_compiler(device)
    if any(case.deepspeed for case in all_cases):
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    work: dict[str, Callable[[], dict[str, Any]]] = {
        case.name: partial(measure, case, device, arguments.steps) for case in all_cases
    }
    flops = {case.name: (case, flops_per_image(case.size)) for case in all_cases}
    if arguments.official:
        for case in {(case.size, case.batch, case.precision): case for case in all_cases}.values():
            name = f"official {case.size}/{PATCH} x{case.batch} {case.precision}"
            work[name] = partial(measure_official, arguments.official, case, device, arguments.steps)
            flops[name] = case, flops_per_image(case.size)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in work}
    for number in range(arguments.rounds):
        for name, measured in work.items():
            rounds[name].append(measured())
            print(f"round {number + 1}/{arguments.rounds} {name}: {rounds[name][-1]['step_s'] * 1e3:.0f} ms", flush=True)
    table = {name: _summary(*flops[name], found, device) for name, found in rounds.items()}
    print(f"\n| step on {device.type} | ms | images/s | MFU | peak GiB | forward, backward, update, draws ms |")
    print("|---" * 6 + "|")
    for name, row in table.items():
        parts = ", ".join(f"{1e3 * seconds:.1f}" for seconds in row["parts_s"].values()) or "-"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-"
        print(f"| {name} | {1e3 * row['step_s']:.1f} | {row['images_per_s']:.1f} | {mfu} | {peak} | {parts} |")
    print(f"\nwrote {write_record('step', device, {'steps': table, 'rounds': rounds})}")


def _summary(case: Case, flops: float, rounds: Sequence[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    step_s = statistics.median(found["step_s"] for found in rounds)
    peak = peak_flops(device, case.precision, 1)
    return {
        "step_s": step_s,
        "step_s_range": [min(found["step_s"] for found in rounds), max(found["step_s"] for found in rounds)],
        "images_per_s": case.batch / step_s,
        "flops_per_image": flops,
        "mfu": case.batch / step_s * flops / peak if peak else None,
        "peak_bytes": rounds[-1]["peak_bytes"],
        "parts_s": rounds[-1]["parts_s"],
    }


if __name__ == "__main__":
    main()
