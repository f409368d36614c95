"""Which Ray cluster a command uses, and what it offers."""

import logging
import os
import re
import secrets
import signal
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import ray
from ray._private import ray_constants, worker
from ray._private.node import Node
from ray._private.utils import get_ray_address_file
from ray.exceptions import RayError

from eqm_dist.errors import LaunchError
from eqm_dist.redaction import redacted

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 10
# The driver shows rank 0's own log; Ray's copies of it would only repeat the lines.
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
_REFUSALS = (OSError, RuntimeError, ValueError, RayError)
_MOST_CHARACTERS = 1000  # of an address
_LOOPBACK = "lo" if sys.platform == "linux" else "lo0"
_LISTENS = "0A"  # in /proc/net/tcp
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
    """Join the cluster that RAY_ADDRESS names, or one that this user's ``ray start`` began here; else start a local one
    and end it.

    A local cluster is nobody else's: it listens on the loopback interface, its files lie in a directory of the user's
    own, and its token is not for others to read. A process that is in a cluster stays in it.

    Raises:
        LaunchError: RAY_ADDRESS names no cluster, or one that does not answer; or a local one does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "") or _own_cluster() or "local"
    local = address == "local"
    with _private_directory() if local else nullcontext("") as private:
        try:
            with _own_signals():
                worker.print_to_stdstream = _said_by_ourselves
                _start(private) if local else _join(address)
            yield
        finally:
            ray.shutdown()


def _said_by_ourselves(*_: object, **__: object) -> None:
    """Ray's daemons tell the terminal in their words of a lost worker, which the run's log tells in ours."""


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the process's handler of SIGTERM: Ray sets one that prints the stack of its C++ and aborts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="eqm-dist-ray-", ignore_cleanup_errors=True)  # of mode 0700


def _own_cluster() -> str | None:
    """The address of a cluster that ``ray start`` began on this machine, if it was this user who did.

    Its record lies where everybody can write, and whoever owns a cluster runs what he likes in those who join it.
    """
    file = get_ray_address_file(None)
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as record:
            status, address = os.fstat(record.fileno()), record.read(_MOST_CHARACTERS).strip()
    except (OSError, ValueError):
        return None
    if not address or not stat.S_ISREG(status.st_mode):
        return None
    port = address.rpartition(":")[2]
    if {status.st_uid, *(_listeners(int(port)) if port.isdecimal() else [])} == {os.getuid()}:
        return address
    logger.info("The Ray cluster %s, recorded in %s, is another user's and not joined; RAY_ADDRESS can name it.",
                address, file)  # fmt: skip
    return None


def _listeners(port: int) -> set[int]:
    """The users whose processes listen on a port of this machine; none where the system does not say."""
    found: set[int] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text(encoding="ascii").splitlines()[1:]:
                _, local, _, state, _, _, _, user, *_ = line.split()
                if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
                    found.add(int(user))
    return found


def _join(address: str) -> None:
    if address == "auto":
        address = _own_cluster() or address
    parts = re.fullmatch(r"(ray://)?(?P<host>[^:/\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if parts is None and address == "auto":
        raise LaunchError(
            "RAY_ADDRESS=auto must find a cluster that you have started on this machine, and there is none; start it"
            " with `ray start --head`, or name one as HOST:PORT."
        )
    if parts is None:
        raise LaunchError(
            f"RAY_ADDRESS must be HOST:PORT of a cluster's head, auto or local, got {redacted(address)}; the port is"
            " 6379 unless `ray start` was told another, and `ray job submit` takes the http:// address."
        )
    try:
        # Ray itself goes on trying for minutes, in silence.
        socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), _CONNECT_TIMEOUT_S).close()
        ray.init(address, **_QUIET)
    except _REFUSALS as error:
        raise LaunchError(
            f"RAY_ADDRESS must name a Ray cluster that answers, got {address} ({_first_line(error)});"
            " start it with `ray start --head`, or unset RAY_ADDRESS to use this machine."
        ) from error


def _start(private: str) -> None:
    _keep_token_private()
    for library in ("GLOO", "NCCL"):  # otherwise they take what the machine's name stands for
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", _LOOPBACK)
    try:
        # Ray opens its own directory to everybody, so that is one within.
        with _on_loopback(), _without_idlers():
            ray.init(
                "local",
                _temp_dir=str(Path(private) / "ray"),
                include_dashboard=False,
                _system_config={"enable_metrics_collection": False, "prestart_worker_first_driver": False},
                **_QUIET,
            )
    # Ray has no class of its own for a start that takes too long.
    except Exception as error:
        raise LaunchError(
            f"Ray must start on this machine, but did not ({_first_line(error)}); end what keeps the machine busy"
            " and run the command again, or use --launch.launcher local where the command has it."
        ) from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that starts here take 127.0.0.1 for its address, as it does on macOS; on Linux it has no option."""
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _without_idlers() -> Iterator[None]:
    """Let a Ray that starts here leave out what nobody asks of a cluster that ends with its command.

    These are its dashboard, which starts for usage statistics even if it is not included, what scales the cluster, and
    what copies logs to a driver that wants none: 2.3 s of a processor, and 3 s until Ray goes on. It has no options.
    """
    with ExitStack() as patches:
        for service in ("start_api_server", "start_monitor", "start_log_monitor"):
            patches.enter_context(patch.object(Node, service, lambda *_, **__: None))
        yield


def _keep_token_private() -> None:
    """Take the token of the user's home, for nobody else to read; or make one for this process and what it starts."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    try:
        (Path.home() / ".ray" / "auth_token").chmod(0o600)  # Ray writes it for all to read
    except (OSError, RuntimeError):  # no token, no home, or not ours
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


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


def check_share(needs: Mapping[str, float]) -> None:
    """Refuse what no machine of the cluster has, for Ray would wait for it without a word and without end.

    Args:
        needs: by the flag that asks for it, what one process takes: ``--cpus-per-trial``, ``--gpus-per-trial``.

    Raises:
        LaunchError: no machine has so much, or none has all of it.
    """
    names = {"--cpus-per-trial": "CPU", "--gpus-per-trial": "GPU"}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for flag, need in needs.items():
        most = max((node.get(names[flag], 0.0) for node in nodes), default=0.0)
        if need > most:
            raise LaunchError(
                f"{flag} must be at most {most:g}, which is what the largest machine of the cluster has, got {need:g};"
                " lower it, or add a machine."
            )
    if not any(all(node.get(names[flag], 0.0) >= need for flag, need in needs.items()) for node in nodes):
        asked = " and ".join(f"{flag} {need:g}" for flag, need in needs.items())
        raise LaunchError(f"{asked} must fit one machine of the cluster together; lower one, or add a machine.")


def _smallest_share() -> int:
    """CPUs for each GPU on the node that has the fewest."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return max(1, min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes))
