"""The run on Ray Train: placement, recovery, and nothing that changes a number.

Ray's run directory is ours. Checkpoints are written there in place and only reported to Ray (docs/decisions/0006).
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from eqm_dist.build import OpenRun, build_checkpoints, build_run, plan_batch
from eqm_dist.errors import EqmDistError, LaunchError
from eqm_dist.launch.packed import pack, unpack
from eqm_dist.launch.ray_cluster import offer
from eqm_dist.launch.ray_evaluation import evaluation_apart, finish_evaluations
from eqm_dist.launch.worker import run_to_end
from eqm_dist.logs import FileFollower, log_file, setup_logging
from eqm_dist.train.distributed import from_rank_zero, rank
from eqm_dist.train.loop import Run

_COLLECTIVE_TIMEOUT_S = 1800
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


def train(opened: OpenRun) -> None:
    """Train to the last step on the cluster that this process has joined.

    Raises:
        EqmDistError: what a worker raised, as it raised it.
        LaunchError: Ray gave up.
    """
    launch = opened.config.launch
    evaluation_cpus = (opened.config.evaluation.cpus or 1) if opened.config.evaluation.apart else 0
    offered = offer(launch.workers, launch.cpus_per_worker, evaluation_cpus)
    plan_batch(opened.config, offered.workers)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=pack(opened),
        torch_config=TorchConfig(backend="nccl" if offered.use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=offered.workers,
            use_gpu=offered.use_gpu,
            resources_per_worker={"CPU": offered.cpus_per_worker, "GPU": int(offered.use_gpu)},
        ),
        run_config=RunConfig(
            name=opened.config.run.name,
            storage_path=str(opened.directory.parent),
            failure_config=FailureConfig(max_failures=launch.max_failures),
            callbacks=[_Failures(log_file(opened.directory, 0))],
        ),
        validation_config=evaluation_apart(opened, offered),
    )
    # Ray's list of an earlier job names checkpoints that were removed since, and Ray refuses to start without them.
    # What there is to resume from is decided by the markers alone.
    (opened.directory / _RAY_SNAPSHOT).unlink(missing_ok=True)
    with FileFollower(log_file(opened.directory, 0)):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) or LaunchError(
                f"Ray gave up on the run {opened.config.run.name}: {str(error).strip().splitlines()[-1]} The workers'"
                f" logs are in {opened.directory / 'logs'}; run the same command again to resume."
            ) from error
    if opened.config.evaluation.apart:
        finish_evaluations(opened)


def _worker(packed: dict[str, Any]) -> None:
    """The training function of every worker; Ray calls it anew after each failure."""
    opened = unpack(packed)
    setup_logging(log_file(opened.directory, rank()), console=False)
    run = build_run(opened, get_device(), partial(_report, opened))
    for step in from_rank_zero(_unreported(opened, run)):
        _report(opened, run.checkpoints.path(step), step)
    run_to_end(opened, run)


def _unreported(opened: OpenRun, run: Run) -> list[int]:
    """The steps whose checkpoints Ray has not heard of: of an earlier job, or whole before they could be reported."""
    registered, steps = ray.train.get_checkpoint(), run.checkpoints.steps()
    if registered is not None:
        return [step for step in steps[-1:] if run.checkpoints.path(step).name != Path(registered.path).name]
    # A new job has forgotten which are still to be evaluated.
    awaited = run.evaluations.awaited(steps) if opened.config.evaluation.apart else []
    return sorted({*awaited, *steps[-1:]})


def _report(opened: OpenRun, path: Path, step: int) -> None:
    """Enter a checkpoint that lies in the run directory already into Ray's list. A barrier."""
    evaluations = build_checkpoints(opened)[1]
    ray.train.report(
        {"step": step},
        checkpoint=Checkpoint.from_directory(str(path)),
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        validation=opened.config.evaluation.apart and evaluations.due(step),
    )


class _Failures(UserCallback):
    """Shows failures in the log; ends the run where trying again cannot help.

    Ray restarts workers after any exception. An exception raised here, in its controller, ends the run instead.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Called in Ray's controller when workers have failed."""
        causes = {at: _unwrap(error) for at, error in sorted(worker_exceptions.items())}
        for cause in causes.values():
            if isinstance(cause, EqmDistError):
                raise cause
        setup_logging(self._file, console=False)
        for at, cause in causes.items():
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
            logging.getLogger(__name__).warning(
                "worker %d failed (%s); restarting from the last checkpoint", at, reason
            )


def _cause(error: Exception) -> EqmDistError | None:
    """The error with a sentence for the user inside Ray's, if there is one."""
    inside = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None)]
    return next((cause for cause in map(_unwrap, inside) if isinstance(cause, EqmDistError)), None)


def _unwrap(error: BaseException | None) -> BaseException | None:
    return getattr(error, "_base_exc", error)
