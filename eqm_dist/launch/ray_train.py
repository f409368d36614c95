"""The run on Ray Train: placement, recovery, and nothing that changes a number.

Ray's run directory is ours. Checkpoints are written there in place and only reported to Ray (docs/decisions/0006).
"""

import logging
import math
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, get_device
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from eqm_dist.build import OpenRun, build_run, plan_batch
from eqm_dist.errors import EqmDistError
from eqm_dist.launch.asynchronous_evaluation import asynchronous_evaluation, finish_evaluations
from eqm_dist.launch.interrupt import Interrupt
from eqm_dist.launch.one_machine import OneMachineTrainer, on_this_machine
from eqm_dist.launch.packed import pack, unpack
from eqm_dist.launch.preemption import Preemption
from eqm_dist.launch.ray_cluster import Offer, offer
from eqm_dist.launch.recovery import Recovery, Setbacks
from eqm_dist.launch.rendezvous import FileGroup
from eqm_dist.launch.shared_root import check_signed, sign
from eqm_dist.launch.stop import StopRequest
from eqm_dist.launch.watchdog import Watchdog
from eqm_dist.launch.worker import run_to_end
from eqm_dist.logs import FileFollower, log_file, setup_logging
from eqm_dist.options import required
from eqm_dist.run_directory import CHECKPOINTS, RAY_SNAPSHOT
from eqm_dist.storage.location import Location
from eqm_dist.storage.open import open_folder
from eqm_dist.train.distributed import from_rank_zero, rank
from eqm_dist.train.loop import Run
from eqm_dist.train.reports import LAG_S, LOG

logger = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT_S = 1800
_START_TIMEOUT_S = 10
_POLL_S = 0.2
_HEALTH_CHECK_S = 0.5
"""Seconds between two looks of Ray's controller at the workers: at each end of a run it costs one of them."""
_STOP_S = 120
"""Seconds within which workers that are asked to end must have saved."""


def train(opened: OpenRun) -> None:
    """Train to the last step on the cluster that this process has joined.

    Raises:
        EqmDistError: what a worker raised, as it raised it.
        LaunchError: the cluster has no room, or the run failed again and again.
        KeyboardInterrupt: the user, or the system, has ended the run, which is saved.
    """
    launch = opened.config.launch
    offered = offer(required(launch.workers), required(launch.cpus_per_worker), opened.config.evaluation.cpus or 0)
    for workers in offered.sizes:
        plan_batch(opened.config, workers)
    # The controller counts them, and what lists a directory spares it the import of torch.
    steps = opened.checkpoints.steps if opened.reports else None
    setbacks = Setbacks(opened.place, required(launch.max_failures), steps)
    stop = StopRequest()
    log = FileFollower(open_folder(opened.place), LOG, LAG_S if opened.reports else _POLL_S)
    with Interrupt() as interrupt, log:
        while (failure := _interruptibly(partial(_fit, opened, offered, setbacks, stop), interrupt, stop)) is not None:
            logger.warning(setbacks.another(failure))
    stop.forget()
    interrupt.check()
    if opened.config.evaluation.asynchronous:
        finish_evaluations(opened)


class _AskedToStop:
    """Asked by every rank alike after each report whether the user wants the run to end. A collective."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, reported: bool) -> bool:
        return reported and from_rank_zero(rank() == 0 and self._stop.made())


def _interruptibly(work: Callable[[], str | None], interrupt: Interrupt, stop: StopRequest) -> str | None:
    """Do the work, and pass an interrupt on to the workers.

    Ray's own handler of interrupts, which it sets in the main thread alone, would kill the workers where they are.

    Raises:
        KeyboardInterrupt: there was a second one, or the workers did not end in time.
    """
    outcome: Future[str | None] = Future()

    def do() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=do, name="ray-train", daemon=True).start()  # which nobody waits for if it hangs
    ends = math.inf
    while not wait([outcome], timeout=_POLL_S).done:
        if interrupt.asked and ends == math.inf:
            threading.Thread(target=stop.make, daemon=True).start()  # a second interrupt waits for no head that is gone
            ends = time.monotonic() + _STOP_S
        if time.monotonic() > ends:
            interrupt.check()
    return outcome.result()


def _fit(opened: OpenRun, offered: Offer, setbacks: Setbacks, stop: StopRequest) -> str | None:
    """Train with one controller of Ray's; what became of it if it failed, which the workers' failures do not make it.

    Ray 2.60 gives up where a worker dies while the workers are being started.
    """
    launch = opened.config.launch
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(_COLLECTIVE_TIMEOUT_S))
    if isinstance(offered.workers, tuple):  # after the loss of a node Ray tries the old number of workers for so long
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(_HEALTH_CHECK_S))
    storage = _ray_directory(opened)
    trainer_of, group = (OneMachineTrainer, FileGroup) if on_this_machine() else (DataParallelTrainer, TorchConfig)
    trainer = trainer_of(
        _worker,
        train_loop_config={
            **pack(opened),
            "stop": stop,
            "reported": str(storage / opened.config.run.name / CHECKPOINTS),
            "root": None if opened.reports else sign(opened.directory),
        },
        backend_config=group(backend="nccl" if offered.use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=offered.workers,
            use_gpu=offered.use_gpu,
            resources_per_worker={"CPU": offered.cpus_per_worker, "GPU": int(offered.use_gpu)},
            elastic_resize_monitor_interval_s=launch.resize_check_s or 0.0,  # of a fixed number nobody asks
        ),
        run_config=RunConfig(
            name=opened.config.run.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=-1),  # Recovery decides
            callbacks=cast("Any", [Recovery(log_file(opened.directory, 0), setbacks, offered)]),
        ),
        validation_config=asynchronous_evaluation(opened, offered),
    )
    try:
        trainer.fit()
    except (ray.train.TrainingFailedError, RayActorError) as error:
        cause = getattr(error, "controller_failure", error)
        if isinstance(cause, EqmDistError):
            raise cause from error
        return f"Ray's controller of the run failed ({str(error).strip().splitlines()[-1]})"
    return None


def _ray_directory(opened: OpenRun) -> Path:
    """Where Ray keeps its list of checkpoints, which covers one job: what there is to resume from the markers decide.

    Ray's list of an earlier job names checkpoints that were removed since, and Ray refuses to start without them.
    """
    if opened.reports is None:
        (opened.directory / RAY_SNAPSHOT).unlink(missing_ok=True)
        return opened.directory.parent
    # No host has that of another job, and none needs that of another host.
    shutil.rmtree(opened.directory / "ray", ignore_errors=True)
    return opened.directory / "ray" / uuid.uuid4().hex


def _worker(packed: dict[str, Any]) -> None:
    """The training function of every worker; Ray calls it anew after each failure."""
    opened = unpack(packed)
    if packed["root"] is not None:
        check_signed(opened.directory, packed["root"])
    reports = opened.reports if rank() == 0 else None
    if reports is not None:
        reports.fetch()
    setup_logging(log_file(opened.directory, rank()), console=False)
    deadline_s = opened.config.launch.hang_deadline_s
    watched = Watchdog(rank(), deadline_s, log_file(opened.directory, 0)) if deadline_s else nullcontext()
    with watched as watchdog, reports or nullcontext():
        tell_ray = partial(_report, opened, Path(packed["reported"]))
        run = build_run(opened, get_device(), tell_ray)
        run = replace(run, must_save=Preemption(), must_stop=_AskedToStop(packed["stop"]))
        if watchdog is not None:
            run = replace(run, beat=watchdog.beat, join=watchdog.join)
        for step in from_rank_zero(_unreported(opened, run)):
            tell_ray(run.checkpoints.path(step), step)
        run_to_end(opened, run)


def _unreported(opened: OpenRun, run: Run) -> list[int]:
    """The steps whose checkpoints Ray has not heard of: of an earlier job, or whole before they could be reported."""
    registered, steps = ray.train.get_checkpoint(), run.checkpoints.steps()
    if registered is not None:
        return [step for step in steps[-1:] if run.checkpoints.path(step).name != Path(registered.path).name]
    # A new job has forgotten which are still to be evaluated.
    awaited = run.evaluations.awaited(steps) if opened.config.evaluation.asynchronous else []
    return sorted({*awaited, *steps[-1:]})


def _report(opened: OpenRun, reported: Path, path: Location, step: int) -> None:
    """Enter a checkpoint that lies where it belongs already into Ray's list, as if it were in ``reported``. A barrier.

    Of one on S3 there is nothing on this machine: Ray keeps its name.
    """
    ray.train.report(
        {"step": step},
        checkpoint=Checkpoint.from_directory(str(reported / path.name)),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        validation=opened.config.evaluation.asynchronous and opened.evaluations.due(step),
    )
