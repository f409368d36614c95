"""How long a run takes to its first step and to its end, and what Ray adds to a step.

python -m benchmarks.bench_startup [--steps 300] [--repeats 2] [--threads 1]

The digits of ``make train``, whole commands in processes of their own, in a directory that has the shards already; no
evaluation. With Ray (one worker, so that both have as many threads), with Ray and the plain engine, and without Ray,
taking turns. A step's time is the median over the lines of progress, so that neither the start nor a save counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import write_record

ROOT = Path(__file__).parents[1]
WAYS = {
    "plain, without Ray": {"launch.launcher": "local"},
    "plain, with Ray": {"engine.kind": "torch", "launch.workers": 1, "launch.cpus_per_worker": 1},
    "DeepSpeed, with Ray": {"engine.kind": "deepspeed", "launch.workers": 1, "launch.cpus_per_worker": 1},
}


def run(root: Path, way: str, steps: int, threads: int) -> dict[str, float]:
    """One command: seconds to its first step, from its last step to its end, and of a step."""
    name = f"run-{time.time_ns()}"
    flags = {"run.root": root, "run.name": name, "train.steps": steps, "train.log_every": 10, "evaluation.every": 0,
             "checkpoint.every": steps, **WAYS[way]}  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAY_ADDRESS": "local"}
    metrics = root / name / "metrics.jsonl"
    began = time.monotonic()
    with (root / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "pipelines/train.py", *words],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        seen: dict[int, float] = {}
        while process.poll() is None:
            for step in _steps(metrics):
                seen.setdefault(step, time.monotonic() - began)
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{way}: exit code {process.returncode}\n{(root / 'output').read_text()[-2000:]}")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [line["throughput/images_per_s"] for line in lines if "throughput/images_per_s" in line]
    return {
        "to_step_10_s": seen[10],
        "after_last_step_s": time.monotonic() - began - max(seen.values()),
        "whole_s": time.monotonic() - began,
        "images_per_s": statistics.median(speeds[1:]),
    }


def _steps(metrics: Path) -> list[int]:
    if not metrics.exists():
        return []
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a worker (default: %(default)s)")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), "plain, without Ray", 20, arguments.threads)  # prepares the shards and MLflow's database
        for number in range(arguments.repeats):
            for way, measured in runs.items():
                measured.append(run(Path(directory), way, arguments.steps, arguments.threads))
                print(f"{number + 1}/{arguments.repeats} {way}: {measured[-1]['whole_s']:.1f} s", flush=True)
    table: dict[str, Any] = {
        way: {key: statistics.median(each[key] for each in measured) for key in measured[0]}
        for way, measured in runs.items()
    }
    plain = table["plain, without Ray"]["images_per_s"]
    print(f"\n| {arguments.steps} steps of the digits | to step 10 | after the last | whole | a step, of plain |")
    print("|---" * 5 + "|")
    for way, row in table.items():
        row["step_of_plain"] = plain / row["images_per_s"]
        print(
            f"| {way} | {row['to_step_10_s']:.1f} s | {row['after_last_step_s']:.1f} s | {row['whole_s']:.1f} s"
            f" | {row['step_of_plain']:.2f} |"
        )
    results = {"steps": arguments.steps, "threads": arguments.threads, "medians": table, "runs": runs}
    print(f"\nwrote {write_record('startup', torch.device('cpu'), results)}")


if __name__ == "__main__":
    main()
