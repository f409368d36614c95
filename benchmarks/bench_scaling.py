"""What a second worker gives: images per second of the engines on one, two and more ranks, each with its own batch.

python -m benchmarks.bench_scaling [--size S] [--batch 4] [--ranks 1,2] [--engines plain,zero1] [--rounds 3]

The step of ``bench_step`` in one process a rank, each with one thread on a CPU or with its own GPU; they meet over gloo
or NCCL. The batch is that of a rank, so that a perfect machine gives twice the images with twice the ranks; what is
missing is the reduction, and whatever the ranks share: on one host memory, caches and cores.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.record import RESULTS, write_record
from benchmarks.step_cases import LEARNING_RATE, Case, build_engine, random_batch
from eqm_dist.config import SIZES

WARM_UP = 2


def measure(case: Case, ranks: int, steps: int) -> float:
    """Images per second over all ranks."""
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.start_processes(_rank, (ranks, directory, case, steps), nprocs=ranks, start_method="spawn")
        slowest = max(json.loads(file.read_text()) for file in Path(directory).glob("*.json"))
    return ranks * case.batch / slowest


def _rank(rank: int, ranks: int, directory: str, case: Case, steps: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    meet = f"file://{directory}/rendezvous"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=meet, rank=rank, world_size=ranks)
    engine, batch = build_engine(case, device), random_batch(case.batch, device, step=rank)
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            dist.barrier()
            began = time.perf_counter()
        engine.backward(engine.losses(batch).mean() / ranks, last=True)
        engine.step(LEARNING_RATE, lambda norm: norm == norm)
    if on_gpu:
        torch.cuda.synchronize()
    (Path(directory) / f"{rank}.json").write_text(json.dumps((time.perf_counter() - began) / steps))
    dist.destroy_process_group()


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images of a rank (default: %(default)s)")
    parser.add_argument("--ranks", default="1,2", help="(default: %(default)s)")
    parser.add_argument("--engines", default="plain,zero1", help="of plain and zero1 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed in a round (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the record goes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision: Any = "bf16" if device.type == "cuda" else "fp32"
    counts = [int(count) for count in arguments.ranks.split(",")]
    rounds: dict[str, list[float]] = {
        f"{engine} x{count}": [] for engine in arguments.engines.split(",") for count in counts
    }
    for number in range(arguments.rounds):
        for name, found in rounds.items():
            engine, _, count = name.partition(" x")
            case = Case(arguments.size, arguments.batch, precision, compiled=False, deepspeed=engine != "plain")
            found.append(measure(case, int(count), arguments.steps))
            print(f"round {number + 1}/{arguments.rounds} {name}: {found[-1]:.2f} images/s", flush=True)
    table = {name: statistics.median(found) for name, found in rounds.items()}
    print(
        f"\n| {arguments.size}/2 x{arguments.batch} a rank | images/s | of {counts[0]} rank's, a rank |\n|---|---|---|"
    )
    efficiency = {}
    for name, speed in table.items():
        engine, _, count = name.partition(" x")
        efficiency[name] = speed / int(count) / (table[f"{engine} x{counts[0]}"] / counts[0])
        print(f"| {name} | {speed:.2f} | {efficiency[name]:.2f} |")
    setting = {"size": arguments.size, "batch_per_rank": arguments.batch, "precision": precision}
    results = {**setting, "images_per_s": table, "efficiency": efficiency, "rounds": rounds}
    print(f"\nwrote {write_record('scaling', device, results, arguments.out)}")


if __name__ == "__main__":
    main()
