"""Many training runs at once, as trials of Ray Tune.

A trial is a run like any other: its directory is the truth, and it resumes from there. With launcher=local it trains
in its own process, on the CPUs and GPUs that Tune reserved for it. With launcher=ray its process only waits for a Ray
Train run, whose workers reserve their resources together, all or none; it takes no CPU itself, so trials may wait for
each other but never hold what another one needs. Figures reach Tune from ``metrics.jsonl``, whoever trains.
"""

import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from eqm_dist.config import Config
from eqm_dist.errors import EqmDistError, LaunchError
from eqm_dist.launch import local, ray_train
from eqm_dist.launch.fork import fork_run
from eqm_dist.launch.ray_cluster import check_share, cluster, offer
from eqm_dist.launch.ray_quiet import quiet
from eqm_dist.logs import log_file, setup_logging
from eqm_dist.open_run import hold_run, open_run
from eqm_dist.options import dump, parse
from eqm_dist.run_directory import METRICS_FILE
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.track.mlflow import nest
from eqm_dist.train.evaluations import SCORE

logger = logging.getLogger(__name__)

POLL_S = 0.3
TRIES = 3
"""Times that a trial is begun when its process or machine dies."""


@dataclass(frozen=True)
class Trial:
    """A training run of a sweep.

    Attributes:
        config: of the run; its name names the trial.
        origin: run directory and step of the checkpoint that it starts from, or None for initial weights.
    """

    config: Config
    origin: tuple[Path, int] | None = None

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def directory(self) -> Path:
        assert self.config.run.root is not None
        return Path(self.config.run.root) / self.name


@dataclass(frozen=True)
class Ending:
    """How a trial ended: ``complete``, ``stopped`` for its FID, ``failed`` as it would again, ``lost`` as it died."""

    trial: Trial
    how: str
    reason: str | None = None


@dataclass(frozen=True)
class EarlyStop:
    """Asynchronous successive halving (arXiv 1810.05934) on the FID of the evaluations.

    Attributes:
        grace: steps before a trial may be stopped.
        reduction: one of so many trials goes on from each rung, at ``grace`` times its powers.
        past: by name the trials of an earlier attempt, each with its (step, FID).
    """

    grace: int
    reduction: int
    past: Mapping[str, Sequence[tuple[int, float]]]


def run_trials(
    trials: Sequence[Trial],
    *,
    workspace: Path,
    cpus: int,
    gpus: float,
    parent: str | None,
    early_stop: EarlyStop | None,
    hours: float | None,
    on_result: Callable[[Trial, int, float], None],
    on_end: Callable[[Ending], None],
) -> None:
    """Train all trials, as many at once as there is room for.

    Args:
        trials: in the order in which they are begun.
        workspace: directory for what Tune writes, which is removed.
        cpus, gpus: of each trial with launcher=local.
        parent: MLflow run under which the trials are nested, or None.
        early_stop: stops trials that are worse than others at the same step.
        hours: no longer than that; what is not done then has no end, and goes on another time.
        on_result: called with a trial, its step and its FID.
        on_end: called when a trial is over.

    Raises:
        LaunchError: there is no cluster, or it has no room for a trial.
    """
    shutil.rmtree(workspace, ignore_errors=True)  # what a killed attempt left: the run directories have it all
    steps = max(trial.config.train.steps for trial in trials)
    scheduler = FIFOScheduler() if early_stop is None else _Asha(early_stop, steps)
    packed = [
        {
            "config": dump(trial.config),
            "origin": [str(trial.origin[0]), trial.origin[1]] if trial.origin else None,
            "parent": parent,
            "threads": cpus,
        }
        for trial in trials
    ]
    nested = trials[0].config.launch.launcher == "ray"
    # Tune wants every trial to reserve something: of a trial that only waits, a byte.
    resources: dict[str, float] = {"CPU": 0, "memory": 1} if nested else {"CPU": cpus, "GPU": gpus}
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one prints tables, at any verbosity
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Tune's own would end the sweep as if its work were done
    with quiet(), cluster():
        _check_room(trials[0].config, cpus, gpus)
        Tuner(
            tune.with_resources(_train, resources),
            param_space={"trial": tune.grid_search(packed)},
            tune_config=TuneConfig(
                scheduler=scheduler,
                max_concurrent_trials=max(1, _room(trials[0].config)) if nested else None,
                time_budget_s=None if hours is None else 3600 * hours,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=RunConfig(
                name="tune",
                storage_path=str(workspace),
                failure_config=FailureConfig(max_failures=TRIES - 1),
                callbacks=[_Watch({trial.name: trial for trial in trials}, scheduler, on_result, on_end)],
                verbose=0,
            ),
        ).fit()
    shutil.rmtree(workspace, ignore_errors=True)


def history(directory: Path) -> list[tuple[int, float]]:
    """Step and FID of every evaluation of a run."""
    return [(line["step"], line[SCORE]) for line in read_metrics(directory / METRICS_FILE) if SCORE in line]


def _name(trial: Any) -> str:
    return trial.config["trial"]["config"]["run"]["name"]


def _check_room(config: Config, cpus: int, gpus: float) -> None:
    """Refuse trials that no machine has room for.

    Raises:
        LaunchError: Tune would wait for ever.
    """
    if config.launch.launcher != "ray":
        check_share({"--cpus-per-trial": cpus, "--gpus-per-trial": gpus})
        return
    have = ray.cluster_resources().get("GPU", 0.0)
    if gpus > have:
        raise LaunchError(
            f"--gpus-per-trial must be at most the {have:g} GPUs of the cluster, got {gpus:g}; lower it, or add nodes."
        )
    workers, each = config.launch.workers, config.launch.cpus_per_worker
    assert isinstance(workers, int)  # the command sees to it
    assert isinstance(each, int)
    offer(workers, each)


def _room(config: Config) -> int:
    """How many Ray Train runs fit the cluster at once: more would only wait."""
    have, launch = ray.cluster_resources(), config.launch
    workers, cpus = launch.workers, launch.cpus_per_worker
    assert isinstance(workers, int)  # the command sees to it
    assert isinstance(cpus, int)
    return int(min(have.get("CPU", 1) // (workers * cpus), have["GPU"] // workers if have.get("GPU") else 1 << 20))


def _train(param: dict[str, Any]) -> None:
    """The trainable: trains in a thread of its own and reports every evaluation; goes on where the run was."""
    packed = param["trial"]
    config = parse(Config, packed["config"])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.set_num_threads(packed["threads"])
            # Before all that can fail: whoever is told of a dead trial is told of this file.
            setup_logging(log_file(Trial(config).directory, 0), console=False)
            logger.info("the trial begins in process %d on %s", os.getpid(), socket.gethostname())
            if packed["origin"]:
                source, step = packed["origin"]
                fork_run(Path(source), step, Trial(config).directory)
            with hold_run(config):
                opened = open_run(config)
                if packed["parent"] and opened.mlflow:
                    nest(opened.mlflow, packed["parent"])
                (ray_train if config.launch.launcher == "ray" else local).train(opened)
        except BaseException as error:
            if not isinstance(error, EqmDistError):  # an own one says all in its sentence
                logger.exception("the trial failed")
            failure.append(error)

    thread = threading.Thread(target=work, name="training", daemon=True)
    thread.start()
    reported, alive = packed["origin"][1] if packed["origin"] else 0, True
    while alive:  # once more after the end, which may come while a report waits for the driver
        thread.join(POLL_S)
        # The last step is reported after all is written: a scheduler that hears of it may end this process.
        alive = thread.is_alive()
        for step, fid in history(Trial(config).directory):
            if step > reported and (step < config.train.steps or not alive):
                tune.report({"step": step, "fid": fid})
                reported = step
    if failure and isinstance(failure[0], EqmDistError):  # trying again would not help
        tune.report({"failure": str(failure[0])})
    elif failure:
        raise failure[0]


class _Asha(ASHAScheduler):
    """Ray's, told of an earlier attempt, and with a list of what it stopped."""

    def __init__(self, early_stop: EarlyStop, steps: int) -> None:
        super().__init__(
            time_attr="step", metric="fid", mode="min", max_t=steps + 1, grace_period=early_stop.grace,
            reduction_factor=early_stop.reduction,
        )  # fmt: skip
        self.stopped: set[str] = set()
        for name, points in early_stop.past.items():
            past: Any = SimpleNamespace(trial_id=f"earlier {name}")
            self.on_trial_add(None, past)  # pyright: ignore[reportArgumentType] (of a trial only the id is used)
            for step, fid in points:
                super().on_trial_result(None, past, {"step": step, "fid": fid})  # pyright: ignore[reportArgumentType]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.STOP:
            self.stopped.add(trial.trial_id)
        return decision


class _Watch(Callback):
    """Tells of Tune's trials in our words."""

    def __init__(
        self,
        trials: Mapping[str, Trial],
        scheduler: TrialScheduler,
        on_result: Callable[[Trial, int, float], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        self._trials, self._scheduler, self._on_result, self._on_end = trials, scheduler, on_result, on_end

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "fid" in result:
            self._on_result(self._trials[_name(trial)], result["step"], result["fid"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours, last = self._trials[_name(trial)], trial.last_result or {}
        if last.get("failure"):
            self._on_end(Ending(ours, "failed", last["failure"]))
        elif last.get("step", 0) >= ours.config.train.steps:
            self._on_end(Ending(ours, "complete"))
        elif trial.trial_id in getattr(self._scheduler, "stopped", ()):
            self._on_end(Ending(ours, "stopped"))
        # Otherwise the time was up.

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._on_end(Ending(self._trials[_name(trial)], "lost", _why(trial.get_error())))


def _why(error: Exception | None) -> str:
    """What an attempt after the other ended with, in a line."""
    last = (str(error or "").strip().splitlines() or [""])[-1]
    if not last or isinstance(error, RayActorError) or "worker process has died" in last:
        return f"its process died {TRIES} times, as one does that has not enough memory or loses its machine"
    return last[:300]
