"""Which Ray cluster a command uses, and what it offers."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import ray

from eqm_dist.errors import LaunchError

_CONNECT_TIMEOUT_S = 10
_MOST_CPU_WORKERS = 4  # beyond that, exchanging gradients on a CPU costs more than it saves


@dataclass(frozen=True)
class Offer:
    """What one worker gets, how many there are, and what is left for an asynchronous evaluation."""

    workers: int | tuple[int, int]
    """Their number, or the fewest and the most."""
    cpus_per_worker: int
    use_gpu: bool
    evaluation_cpus: int = 0

    @property
    def sizes(self) -> range:
        """Every number of workers that the run may come to have."""
        fewest, most = self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
        return range(fewest, most + 1)


@contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or one that runs here; otherwise start a local one and end it after.

    A process that is in a cluster stays in it.

    Raises:
        LaunchError: RAY_ADDRESS names a cluster that does not answer.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if match := re.fullmatch(r"(?P<host>[^:/]+):(?P<port>\d+)", address):
        _check_answers(address, match["host"], int(match["port"]))
    try:
        # The driver shows rank 0's own log; Ray's copies of it would only repeat the lines.
        ray.init(log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, include_dashboard=None)
    except (ConnectionError, RuntimeError) as error:
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str, host: str, port: int) -> None:
    # Ray itself goes on trying for minutes, in silence.
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> LaunchError:
    return LaunchError(
        f"RAY_ADDRESS must name a Ray cluster that answers, got {address or 'none'} ({str(error).splitlines()[0]});"
        " start it with `ray start --head`, or unset RAY_ADDRESS to use this machine."
    )


def offer(
    workers: int | tuple[int, int] | Literal["auto"],
    cpus_per_worker: int | Literal["auto"],
    evaluation_cpus: int = 0,
) -> Offer:
    """Divide what the cluster has: one worker per GPU; without GPUs one per core, at most four, sharing all cores.

    An elastic run, whose cluster changes, needs room for its fewest workers now. Its workers get one CPU each, or what
    a GPU's share is on the node where that is smallest. With ``evaluation_cpus`` so many CPUs, and a GPU if there are
    any, stay free for an asynchronous evaluation.

    Raises:
        LaunchError: the cluster has no room.
    """
    resources = ray.cluster_resources()
    all_gpus, all_cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    use_gpu = all_gpus > 0
    gpus, cpus = all_gpus - int(use_gpu and evaluation_cpus > 0), all_cpus - evaluation_cpus
    besides = f" beside the asynchronous evaluation, which takes {evaluation_cpus} CPUs" if evaluation_cpus else ""
    besides += " and a GPU" if use_gpu and evaluation_cpus else ""
    if workers == "auto":
        workers = gpus if use_gpu else min(cpus, _MOST_CPU_WORKERS)
    shown, needed = (list(workers), workers[0]) if isinstance(workers, tuple) else (workers, workers)
    if use_gpu and not 1 <= needed <= gpus:
        raise LaunchError(
            f"launch.workers={shown} must be from 1 to the {gpus} GPUs of the cluster{besides}; change it or add nodes."
        )
    if cpus_per_worker == "auto":
        if isinstance(workers, tuple):
            cpus_per_worker = _smallest_share() if use_gpu else 1
        else:
            cpus_per_worker = max(1, cpus // max(1, workers))
    if not 1 <= needed * cpus_per_worker <= cpus:
        raise LaunchError(
            f"launch.workers={shown} with {cpus_per_worker} CPUs each must fit the {cpus} CPUs of the"
            f" cluster{besides}; lower launch.workers or launch.cpus_per_worker, or add nodes."
        )
    return Offer(workers, cpus_per_worker, use_gpu, evaluation_cpus)


def _smallest_share() -> int:
    """CPUs for each GPU on the node that has the fewest."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return max(1, min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes))
