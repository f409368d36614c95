"""A trace of a few training steps, to be looked at in https://ui.perfetto.dev, and the kernels that take longest.

python -m benchmarks.trace_step [--size S] [--batch 4] [--compile] [--out trace.json.gz]
"""

import argparse
import math
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.step_cases import LEARNING_RATE, Case, build_engine, random_batch
from eqm_dist.config import SIZES

WARM_UP, TRACED = 3, 2


def main() -> None:
    """Trace and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks and the draws")
    parser.add_argument("--out", type=Path, default=Path("trace.json.gz"), help="(default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = build_engine(Case(arguments.size, arguments.batch, "bf16", arguments.compile, deepspeed=False), device)
    batch = random_batch(arguments.batch, device)

    def step() -> None:
        engine.backward(engine.losses(batch).mean(), last=True)
        engine.step(LEARNING_RATE, math.isfinite)

    for _ in range(WARM_UP):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(TRACED):
            step()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(arguments.out))
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=30))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
