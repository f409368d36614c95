"""What every worker does with its part of a run, whoever started it."""

import logging
import time
from statistics import median

import torch

from eqm_dist.build import OpenRun
from eqm_dist.options import dump
from eqm_dist.run_directory import METRICS_FILE
from eqm_dist.track.jsonl import last_values, read_metrics
from eqm_dist.track.result import write_result
from eqm_dist.train.distributed import rank, world_size
from eqm_dist.train.loop import Run, train

logger = logging.getLogger(__name__)


def run_to_end(opened: OpenRun, run: Run) -> None:
    """Train to the last step; rank 0 then writes ``result.json``, unless the run had to stop before. A collective."""
    if rank() == 0:
        device = torch.cuda.get_device_name(run.engine.device) if run.engine.device.type == "cuda" else "CPU"
        where = f"{world_size()} worker{'s' * (world_size() > 1)} on {device}"
        begin = f"resumes at step {run.state.step:,}" if run.state.step else "starts"
        logger.info(
            "run %s %s, %s steps in all, on %s with %s",
            opened.config.run.name, begin, f"{run.steps:,}", where, run.engine.name,
        )  # fmt: skip
    started = time.perf_counter()
    try:
        train(run)
    finally:
        run.beat(run.state.step, "finishing")
        if run.tracker is not None:
            run.tracker.finish()
        if run.mirror is not None:  # however the run ends, what it has saved arrives
            run.mirror.wait()
    if rank() == 0 and run.state.step < run.steps:
        logger.info("run %s stopped at step %s, which is saved", opened.config.run.name, f"{run.state.step:,}")
    elif rank() == 0:
        write_result(
            opened.directory,
            {
                "run": opened.config.run.name,
                "step": run.state.step,
                "images_seen": run.state.images_seen(run.global_batch),
                "metrics": last_values(opened.directory / METRICS_FILE),
                "images_per_s": median(
                    line["throughput/images_per_s"]
                    for line in read_metrics(opened.directory / METRICS_FILE)
                    if "throughput/images_per_s" in line
                ),
                "workers": world_size(),
                "engine": run.engine.name,
                "last_attempt_s": time.perf_counter() - started,
                "config": dump(opened.config),
            },
        )
