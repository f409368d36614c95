"""Which Ray cluster a command uses, and what it offers."""

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from eqm_dist.errors import LaunchError

_CONNECT_TIMEOUT_S = 10
_MOST_CPU_WORKERS = 4  # beyond that, exchanging gradients on a CPU costs more than it saves


@dataclass(frozen=True)
class Offer:
    """What one worker gets, and how many there are."""

    workers: int
    cpus_per_worker: int
    use_gpu: bool


@contextmanager
def cluster() -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or one that runs here; otherwise start a local one and end it after.

    Raises:
        LaunchError: RAY_ADDRESS names a cluster that does not answer.
    """
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


def offer(workers: int | None, cpus_per_worker: int | None) -> Offer:
    """Divide what the cluster has: one worker per GPU; without GPUs one per core, at most four, sharing all cores."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    workers = workers or gpus or min(cpus, _MOST_CPU_WORKERS)
    use_gpu = gpus > 0
    cpus_per_worker = cpus_per_worker or max(1, cpus // workers)
    if use_gpu and workers > gpus:
        raise LaunchError(
            f"launch.workers={workers} must be at most the {gpus} GPUs of the cluster; lower it or add nodes."
        )
    if workers * cpus_per_worker > cpus:
        raise LaunchError(
            f"launch.workers={workers} with {cpus_per_worker} CPUs each must fit the {cpus} CPUs of the cluster;"
            " lower launch.workers or launch.cpus_per_worker, or add nodes."
        )
    return Offer(workers, cpus_per_worker, use_gpu)
