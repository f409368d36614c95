"""Asynchronous evaluation: a Ray task measures each checkpoint that is due, while training goes on.

Ray Train starts it for a report with ``validation=True``, one at a time, and waits for the last one at the end of a
run. Where the process of such a task dies, Ray 2.60 ends the training, so the task only waits for another one that
does the work, and turns whatever becomes of that into a record.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, ValidationConfig, ValidationTaskConfig
from safetensors.torch import load_file

from eqm_dist.build import (
    OpenRun,
    build_data,
    build_evaluator,
    open_tracker,
)
from eqm_dist.data.loader import ShardReader
from eqm_dist.launch.packed import pack, unpack
from eqm_dist.launch.ray_cluster import Offer
from eqm_dist.run_directory import EVALUATIONS, METRICS_FILE
from eqm_dist.track.jsonl import last_values
from eqm_dist.track.result import read_result, write_result
from eqm_dist.train.checkpoint import EMA_FILE, step_of
from eqm_dist.train.loop import log_evaluations

TRIES = 3
"""Times that an evaluation is begun when the machine or the process under it dies."""


def asynchronous_evaluation(opened: OpenRun, offered: Offer) -> ValidationConfig | None:
    """What Ray Train needs to evaluate checkpoints asynchronously; None where the workers do it, or nobody."""
    if not opened.config.evaluation.asynchronous:
        return None
    resources = {"num_cpus": offered.evaluation_cpus, "num_gpus": int(offered.use_gpu)}
    task = ValidationTaskConfig(fn_kwargs={"packed": pack(opened), "resources": resources})
    return ValidationConfig(_guarded, task_config=task, ray_remote_kwargs={"num_cpus": 0, "max_retries": TRIES})


def finish_evaluations(opened: OpenRun) -> None:
    """Bring the evaluations that ended after the last step into the record and the result, and keep the best."""
    tracker = open_tracker(opened, opened.config.train.steps)
    log_evaluations(opened.evaluations, tracker)
    tracker.finish()
    opened.checkpoints.retire()
    result = read_result(opened.directory)
    assert result is not None
    write_result(opened.directory, {**result, "metrics": last_values(opened.directory / METRICS_FILE)})


def _guarded(checkpoint: Checkpoint, **task: Any) -> dict[str, float]:
    """Never raises, and does nothing by which its own process could die."""
    opened, step = unpack(task["packed"]), step_of(Path(checkpoint.path).name)
    try:
        return ray.get(_evaluate.options(**task["resources"], max_retries=TRIES - 1).remote(task["packed"], step))
    except Exception as error:  # whatever it is, the training is worth more
        reason = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
        opened.evaluations.fail(step, reason)
        return {"failed": 1.0}


def let_training_go_first(device: torch.device) -> None:
    """Take the cores that training leaves, where it has more threads than cores; on a GPU the work is not theirs.

    There an idle process would launch its kernels only when no other wants a core, and the GPU would stand still.
    """
    if sys.platform == "linux" and device.type == "cpu":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@ray.remote(max_calls=1)  # then its process ends, for it would stay idle
def _evaluate(packed: dict[str, Any], step: int) -> dict[str, float]:
    opened = unpack(packed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    let_training_go_first(device)
    started = time.perf_counter()
    reader, _ = build_data(opened.config)
    assert isinstance(reader, ShardReader)  # a mixture is not evaluated
    cache = str(opened.directory / EVALUATIONS)  # the real images are measured once, and not by every task
    evaluator = build_evaluator(opened.config, opened.directory, reader, device, cache)
    metrics, pictures = evaluator(load_file(opened.checkpoints.path(step) / EMA_FILE), step)
    seconds = time.perf_counter() - started
    opened.evaluations.write(step, metrics, pictures, seconds, evaluator.precision)
    return metrics
