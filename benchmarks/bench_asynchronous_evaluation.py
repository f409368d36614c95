"""What asynchronous evaluation costs the training: images per second with and without one in flight, in turns.

python -m benchmarks.bench_asynchronous_evaluation --out benchmarks/results/asynchronous_evaluation_....json [--pairs 3]

One worker on one core, the evaluation on another, the digits model. The evaluation has more to do than the training
lasts, so that one is always in flight from the first checkpoint on; throughput is the median over the intervals after
it. A third case keeps the second core as busy with a process that has nothing to do with the run: what the machine's
cores take from each other, whoever uses them.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.bench_loader import commit, cpu_name
from eqm_dist.run_directory import METRICS_FILE, RESULT_FILE
from eqm_dist.track.jsonl import read_metrics

STEPS, FIRST = 200, 40
FLAGS = {
    "train.steps": STEPS, "train.log_every": 10, "checkpoint.every": 20, "launch.workers": 1,
    "launch.cpus_per_worker": 1, "track.mlflow": "false", "evaluation.every": 0,
}  # fmt: skip
CASES: dict[str, dict[str, object]] = {
    "alone": {},
    "asynchronous evaluation": {
        "evaluation.asynchronous": "true", "evaluation.every": 20, "evaluation.samples": 20_000,
        "sampler.nfe": 240,
    },
    "busy neighbour": {},
}  # fmt: skip
NEIGHBOUR = """
import torch
from eqm_dist.models import SiT
torch.set_num_threads(1)
model, x = SiT(8, 2, 1, hidden_size=96, depth=4, num_heads=4, num_classes=10), torch.randn(256, 1, 8, 8)
with torch.no_grad():
    while True:
        model(x, torch.zeros(256, dtype=torch.int64))
"""


def measure(case: str) -> dict[str, Any]:
    """Median images per second of a run after its first steps; the run is ended after its last step."""
    with tempfile.TemporaryDirectory() as directory:
        flags = {**FLAGS, **CASES[case], "run.root": directory, "run.name": "bench"}
        texts = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
        environment = {**os.environ, "RAY_ADDRESS": "local"}
        neighbour = None
        if case == "busy neighbour":
            # As polite as Ray's processes are.
            neighbour = subprocess.Popen(["nice", "-n", "15", sys.executable, "-c", NEIGHBOUR])
        run = subprocess.Popen(
            [sys.executable, "pipelines/train.py", *texts], env=environment, stdout=subprocess.DEVNULL
        )
        result = Path(directory) / "bench" / RESULT_FILE
        in_flight = 0
        try:
            while not result.exists():
                run_ended = run.poll()
                if run_ended is not None and not result.exists():
                    raise RuntimeError(f"the run ended with code {run_ended}")
                children = psutil.Process(run.pid).children(recursive=True)
                in_flight += any("ray::_evaluate" in name for name in map(_name, children))
                time.sleep(0.5)
        finally:
            for process in filter(None, (neighbour, run)):
                process.send_signal(signal.SIGKILL)
                process.wait()
            psutil.wait_procs(psutil.Process().children(recursive=True), timeout=20)
        lines = [line for line in read_metrics(result.parent / METRICS_FILE) if line["step"] > FIRST]
    speeds = [line["throughput/images_per_s"] for line in lines if "throughput/images_per_s" in line]
    return {"images_per_s": statistics.median(speeds), "intervals": len(speeds), "seen_in_flight": in_flight}


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rounds = []
    for _ in range(options.pairs):
        rounds.append({case: measure(case) for case in CASES})
        print({case: round(found["images_per_s"]) for case, found in rounds[-1].items()}, flush=True)
    ratios = {
        case: statistics.median(found[case]["images_per_s"] / found["alone"]["images_per_s"] for found in rounds)
        for case in CASES
    }
    record = {
        "command": f"python -m benchmarks.bench_asynchronous_evaluation --pairs {options.pairs}",
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "ray")}},
        "median_ratio_to_alone": ratios,
        "rounds": rounds,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(f"{case:18} {ratio:6.3f} of the throughput alone" for case, ratio in ratios.items()))


if __name__ == "__main__":
    main()
