"""How fast a training step is: images per second, MFU, peak memory, and where the time goes.

python -m benchmarks.bench_step [--sizes S] [--batches 16] [--cases fp32,fp32+compile] [--rounds 3] [--steps 5]
python -m benchmarks.bench_step --official PATH     also the step of the official code, from a checkout of it
python -m benchmarks.bench_step --count-only        kernels and bytes of a block and of the draws, on any machine

SiT at patch size 2 on 4x32x32 latents with 1,000 classes, EqM's loss with the truncated c(gamma), AdamW and one EMA, on
one device. The batch lies on the device already, so that no loader is timed. Cases take turns, round by round, so that
what disturbs the machine disturbs all of them; a case is told by ``PRECISION[+compile][+deepspeed]``.

MFU: 2 FLOP for each multiplication with its addition, three times the forward pass (a block that is computed again
does not count), over what the device's data sheet promises for dense matrix products in that precision. Parts are
timed apart from the whole, with a synchronisation after each, so their sum is an upper bound of it.
"""

import argparse
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, write_record
from benchmarks.step_cases import (
    CHANNELS,
    CLASSES,
    EMA_DECAY,
    LEARNING_RATE,
    PATCH,
    SIDE,
    Case,
    build_engine,
    cases,
    flops_per_image,
    random_batch,
)
from benchmarks.step_counts import counts
from eqm_dist.compiled import compiled, require_compiler
from eqm_dist.precision import set_products
from eqm_dist.train.engine import Engine
from eqm_dist.train.meters import peak_flops
from eqm_dist.train.step import draw_batch


def measure(case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """One round of one case: build it, warm it up, time whole steps, then their parts."""
    found = _time(build_engine(case, device), case, device, steps)
    _forget(device)
    return found


def _time(engine: Engine, case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    batch = random_batch(case.batch, device)
    update = partial(engine.step, LEARNING_RATE, math.isfinite)  # with the guard's look at the norm, as in training

    def step() -> None:
        engine.backward(engine.losses(batch).mean(), last=True)
        update()

    first_s = _seconds(step, device)
    whole = _whole_steps(step, device, steps)
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "update": [], "draws": []}
    draw = compiled(draw_batch) if case.compiled else draw_batch
    for _ in range(steps):
        losses: list[Tensor] = []
        parts["forward"].append(_seconds(lambda to: to.append(engine.losses(batch).mean()), device, losses))
        parts["backward"].append(_seconds(engine.backward, device, losses[0], True))
        parts["update"].append(_seconds(update, device))
        parts["draws"].append(_seconds(draw, device, 0, batch.positions, (CHANNELS, SIDE, SIDE), 0.1, False))
    return {
        "first_step_s": first_s,
        **whole,
        "parts_s": {name: statistics.median(each) for name, each in parts.items()},
    }


def _whole_steps(step: Callable[[], None], device: torch.device, steps: int) -> dict[str, Any]:
    _seconds(step, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_s = _seconds(lambda: [step() for _ in range(steps)], device) / steps
    return {"step_s": step_s, "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None}


def _seconds(work: Callable[..., Any], device: torch.device, *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


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

    set_products(case.precision)
    model = EqM_models[f"EqM-{case.size}/{PATCH}"](input_size=SIDE, num_classes=CLASSES).to(device)
    average = {name: param.detach().clone() for name, param in model.named_parameters()}
    transport = create_transport("Linear", "velocity", None, None, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(case.batch, CHANNELS, SIDE, SIDE, generator=generator).to(device)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            loss = transport.training_losses(model, latents, {"y": labels})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, param in model.named_parameters():
                average[name].mul_(EMA_DECAY).add_(param, alpha=1 - EMA_DECAY)

    _seconds(step, device)
    found = _whole_steps(step, device, steps)
    _forget(device)
    return {**found, "parts_s": {}}


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
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the record goes")
    arguments = parser.parse_args()
    sizes, batches = arguments.sizes.split(","), [int(batch) for batch in arguments.batches.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.count_only:
        found = [counts(size, batch) for size in sizes for batch in batches]
        print(*found, f"wrote {write_record('counts', device, {'counted': found}, arguments.out)}", sep="\n")
        return
    all_cases = cases(sizes, batches, arguments.cases.split(","))
    if any(case.compiled for case in all_cases):
        require_compiler(device, "+compile")
    if any(case.deepspeed for case in all_cases):
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }
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
            print(
                f"round {number + 1}/{arguments.rounds} {name}: {rounds[name][-1]['step_s'] * 1e3:.0f} ms", flush=True
            )
    table = {name: _summary(*flops[name], found, device) for name, found in rounds.items()}
    print(f"\n| step on {device.type} | ms | images/s | MFU | peak GiB | forward, backward, update, draws ms |")
    print("|---" * 6 + "|")
    for name, row in table.items():
        parts = ", ".join(f"{1e3 * seconds:.1f}" for seconds in row["parts_s"].values()) or "-"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        peak = f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-"
        print(f"| {name} | {1e3 * row['step_s']:.1f} | {row['images_per_s']:.1f} | {mfu} | {peak} | {parts} |")
    print(f"\nwrote {write_record('step', device, {'steps': table, 'rounds': rounds}, arguments.out)}")


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
