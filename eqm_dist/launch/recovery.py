"""What becomes of a run whose workers fail: it goes on, and the log says what happened, until it gets nowhere.

Ray counts failures for ever, so that a run of weeks would end with its hundredth lost node, and a limit of -1 would
let a broken one crash for weeks. Here only failures in a row count, those with no newer checkpoint in between. Ray's
own limits are off, and an exception raised in its controller, where this runs, ends the run.

The controller starts before the workers, which wait for it: what it imports with this file must be little, so no torch.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    RestartingState,
    RunningState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus

from eqm_dist.errors import EqmDistError, LaunchError
from eqm_dist.launch.ray_cluster import Offer
from eqm_dist.logs import setup_logging
from eqm_dist.run_directory import CHECKPOINTS, LOGS, whole_checkpoints
from eqm_dist.storage.location import Location

logger = logging.getLogger(__name__)

_PATIENCE_S, _REMINDER_S = 30, 300
"""How long a run waits for room before it says so, and before it says so again."""


class Setbacks:
    """Failures in a row.

    Args:
        directory: of the run; a newer checkpoint in it ends a row.
        limit: failures in a row that are borne; -1 any number.
        steps: the steps of its whole checkpoints; None: those on a file system.
    """

    def __init__(self, directory: Location, limit: int, steps: Callable[[], Iterable[int]] | None = None) -> None:
        self._directory, self._limit = directory, limit
        if steps is None:
            assert isinstance(directory, Path)
            steps = partial(whole_checkpoints, directory / CHECKPOINTS)
        self._steps = steps
        self._count, self._step = 0, -1

    def another(self, what: str) -> str:
        """Count a failure; returns the sentence for the log.

        Raises:
            LaunchError: it was one too many.
        """
        step = max(self._steps(), default=0)
        self._count = 1 if step > self._step else self._count + 1
        self._step = max(step, self._step)
        if 0 <= self._limit < self._count:
            raise LaunchError(
                f"The run failed {self._count} times in a row without a newer checkpoint than step {step:,}, and"
                f" launch.max_failures={self._limit}; the last time: {what}. The workers' logs are in"
                f" {self._directory / LOGS}; run the same command again to resume."
            )
        borne = f" of {self._limit}" if self._limit >= 0 else ""
        return f"warning: {what}; failure {self._count}{borne} in a row, restarting from step {step:,}"


class Recovery(WorkerGroupCallback, ControllerCallback):
    """Ray's controller calls it when workers have failed, and when it starts them again.

    Args:
        file: the log.
        setbacks: counts the failures.
        offered: what the run asks of the cluster.
    """

    def __init__(self, file: Path, setbacks: Setbacks, offered: Offer) -> None:
        self._file, self._setbacks, self._offered = file, setbacks, offered
        self._places: dict[int, tuple[str, str]] = {}
        self._failed = False
        self._waits_from: float | None = None
        self._said_at = float("-inf")

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Remember where each rank is."""
        self._failed = False
        self._places = {
            at: (worker.metadata.node_id, f"{worker.metadata.hostname} ({worker.metadata.node_ip})")
            for at, worker in enumerate(worker_group.get_workers())
        }

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Report and count a failure of workers.

        Raises:
            EqmDistError: what a worker raised, where trying again cannot help; or there were too many failures.
        """
        errors = worker_group_status.errors
        if not errors or self._failed:  # Ray asks again and again while it waits for the end of a preempted node
            return
        self._failed = True
        for error in errors.values():
            if isinstance(error, EqmDistError):
                raise error
        what = self._what_failed(errors)
        preempted = worker_group_status.get_preemption_info() is not None or worker_group_status.has_preempted_worker()
        if not preempted:  # which is announced, and nobody's fault
            self._log(self._setbacks.another(what))

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Say that a machine is gone that was to be taken away, and what a run waits for that finds no room."""
        now = time.monotonic()
        if isinstance(previous_state, PreemptingState) and isinstance(current_state, RestartingState):
            self._log("warning: the machine is gone; restarting without it from the last checkpoint")
        if isinstance(current_state, RunningState):
            self._waits_from = None
        elif self._waits_from is None:
            self._waits_from = now
        elif now - self._waits_from > _PATIENCE_S and now - self._said_at > _REMINDER_S:
            self._said_at = now
            self._log(f"waiting for room for {_needs(self._offered)}: the cluster has {_has()}")

    def _what_failed(self, errors: Mapping[int, Exception]) -> str:
        """In a few words; what other workers raised because of a dead one is left out."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        dead: list[str] = []
        raised: list[str] = []
        for at, (node, place) in self._places.items():
            error = errors.get(at)
            if isinstance(error, WorkerHealthCheckFailedError):
                error = error.health_check_failure
            if node not in alive:
                dead.append(f"worker {at} on {place} was lost with its node")
            elif isinstance(error, ActorDiedError):
                dead.append(f"worker {at} on {place} was killed or crashed")
            elif isinstance(error, RayActorError):  # Ray learns of a dead node later than of a broken connection
                dead.append(f"worker {at} on {place} does not answer (killed, or its node lost)")
            elif error is not None:
                reason = "".join(f": {line}" for line in str(error).strip().splitlines()[:1])
                raised.append(f"worker {at} on {place} failed ({type(error).__name__}{reason})")
        return ", ".join(dead or raised)

    def _log(self, sentence: str) -> None:
        setup_logging(self._file, console=False)  # in the controller's process nobody did
        logger.warning(sentence)


def _needs(offered: Offer) -> str:
    at_least = "at least " if isinstance(offered.workers, tuple) else ""
    gpu = " and a GPU" if offered.use_gpu else ""
    return f"{at_least}{offered.sizes[0]} workers with {offered.cpus_per_worker} CPUs{gpu} each"


def _has() -> str:
    resources: dict[str, Any] = ray.cluster_resources()
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
