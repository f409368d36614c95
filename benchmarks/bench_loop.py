"""What the host does between two steps, for which a GPU would wait: the time of a step whose model is nothing.

python -m benchmarks.bench_loop [--steps 400] [--device-ms 20] [--profile]

The real loop, loader, record (metrics.jsonl, attempts, MLflow in SQLite) and saver, at batch 256 of 4x32x32 latents in
fp16; the engine computes nothing, and its step sleeps for as long as a device would work. What is left of a step is the
host's: waiting for the loader, logging, saving. On a busy machine the wall tells of the others too: the thread's own
time on a processor is given beside it. By what happens in a step: a report, a new window of the order, the begin of a
checkpoint. --profile prints what the loop's thread spends its time in, most first.
"""

import argparse
import cProfile
import pstats
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_loader import BATCH, SHARD_SAMPLES, write_data
from benchmarks.record import write_record
from eqm_dist.build import build_run
from eqm_dist.data.loader import Batch
from eqm_dist.logs import setup_logging
from eqm_dist.open_run import open_run
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits
from eqm_dist.train.engine import Accepts, Engine, Fragment, Observe
from eqm_dist.train.loop import train

WINDOW_SHARDS, SHARDS, SAVE_EVERY = 4, 16, 50
WARM_UP = 20
"""Steps that are not counted: threads and MLflow start."""


class NoEngine:
    """An engine that computes nothing for a while; what is saved is another one's state."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self.device, self.replicated, self.name = engine.device, engine.replicated, "no engine"
        self.shapes, self.frozen, self._engine, self._seconds = engine.shapes, engine.frozen, engine, seconds
        self.slept: list[float] = []

    def losses(self, batch: Batch, last: bool = True) -> Tensor:
        """Zeros [n]."""
        return torch.zeros(len(batch.labels))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Nothing."""

    def step(self, learning_rate: float, accepts: Accepts | None = None, observe: Observe | None = None) -> Tensor:
        """Sleep, as a host would that waits for its device."""
        began = time.perf_counter()
        time.sleep(self._seconds)
        self.slept.append(time.perf_counter() - began)
        return torch.ones(())

    def fragments(self) -> list[Fragment]:
        """Those of the other engine."""
        return self._engine.fragments()

    def restored(self, updates: int) -> None:
        """Nothing."""


def measure(root: Path, name: str, steps: int, log_every: int, device_ms: float, profile: bool) -> dict[str, Any]:
    """Milliseconds of the host in a step, by what happened in it."""
    config = with_overrides(
        digits(),
        {
            "run.root": str(root), "run.name": name, "data.shards": str(root / "data"),
            "data.latent_shape": [4, 32, 32], "data.num_classes": 1000, "data.flip": False,
            "data.window_shards": WINDOW_SHARDS, "model.patch_size": 8, "model.hidden_size": 32,
            "model.depth": 1, "model.num_heads": 2, "train.steps": steps,
            "train.global_batch": BATCH, "train.log_every": log_every, "checkpoint.every": SAVE_EVERY,
            "evaluation.every": 0, "launch.launcher": "local",
        },
    )  # fmt: skip
    opened = open_run(config)
    setup_logging(opened.directory / "log", console=False)
    run = build_run(opened, torch.device("cpu"))
    engine, ends = NoEngine(run.engine, device_ms / 1e3), [_now()]
    run = replace(run, engine=engine, join=lambda: ends.append(_now()))
    profiler = cProfile.Profile()
    with profiler if profile else tempfile.SpooledTemporaryFile():
        train(run)
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
    assert run.tracker is not None
    run.tracker.finish()
    # From the end of a device's step to the begin of the next, what the step in between brought with it.
    host = [
        (end[0] - begin[0] - slept, end[1] - begin[1])
        for begin, end, slept in zip(ends[1:], ends[2:], engine.slept, strict=False)
    ]
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    window = WINDOW_SHARDS * SHARD_SAMPLES
    for step, seconds in enumerate(host, start=1):
        if step < WARM_UP:
            continue
        reports, saves = step % log_every == 0, step % SAVE_EVERY == 0
        enters = step * BATCH // window != (step - 1) * BATCH // window
        kind = "a checkpoint begins" if saves else "a report" if reports else "a new window" if enters else "nothing"
        kinds["all"].append(seconds)
        kinds[kind].append(seconds)
    return {kind: summary(values) for kind, values in kinds.items()}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def summary(values: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Medians and 99th percentiles, of the wall's time and of the thread's on a processor, in ms."""
    found: dict[str, float] = {"steps": len(values)}
    for name, column in zip(("wall", "cpu"), zip(*values, strict=True), strict=True):
        ordered = sorted(1e3 * seconds for seconds in column)
        found[f"{name}_median_ms"] = statistics.median(ordered)
        found[f"{name}_p99_ms"] = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return found


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="(default: %(default)s)")
    parser.add_argument("--device-ms", type=float, default=20.0, help="of a step (default: %(default)s)")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "data").mkdir()
        write_data(root / "data", SHARDS * SHARD_SAMPLES)
        for log_every in (1, 50):
            found = measure(
                root, f"every-{log_every}", arguments.steps, log_every, arguments.device_ms, arguments.profile
            )
            results[f"log_every={log_every}"] = found
    print("| host, in a step with | steps | median | 99th percentile | of it computing | 99th percentile |")
    print("|---" * 6 + "|")
    for case, kinds in results.items():
        for kind, row in kinds.items():
            steps, *times = row.values()
            print(f"| {case}, {kind} | {steps} | " + " | ".join(f"{each:.2f} ms" for each in times) + " |")
    record = {"device_ms": arguments.device_ms, "batch": BATCH, "steps": arguments.steps, "host_ms": results}
    print(f"\nwrote {write_record('loop', torch.device('cpu'), record)}")


if __name__ == "__main__":
    main()
