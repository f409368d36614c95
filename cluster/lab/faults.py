"""What can go wrong on a cluster, one function each, and its undoing."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.lab import lab, layout, network
from cluster.lab.lab import LabError

FILLER = "filler"
CHUNK_BYTES = 1 << 20
CYCLE_S = 0.2


def kill_rank(rank: int) -> None:
    """kill -9 of the worker process of a rank."""
    os.kill(rank_pid(rank), signal.SIGKILL)


def kill_raylet(host: str) -> None:
    """kill -9 of Ray's own process on a host; its workers cannot live without it."""
    os.kill(_only(host, "raylet", lambda words: words[0].endswith("/raylet")), signal.SIGKILL)


def kill_driver() -> None:
    """kill -9 of the process that ``ray job submit`` started on the head."""

    def is_driver(words: list[str]) -> bool:
        return "python" in words[0] and len(words) > 1 and words[1].startswith("pipelines/")

    os.kill(_only(layout.HEAD, "driver", is_driver), signal.SIGKILL)


def kill_host(host: str) -> None:
    """Power off: everything on the host is gone at once, and no packet says so."""
    network.plug(host, into=False)
    lab.kill_all(host)


def start_host(host: str) -> None:
    """Switch a host on, with an empty disk: one that was killed, or one that is new to the cluster."""
    if host in network.connected():
        if lab.init_pid(host):
            raise LabError(f"{host} is on already.")
        network.plug(host)
    lab.start_host(host)


def cut(host: str) -> None:
    """Pull a host's network cable."""
    network.plug(host, into=False)


def restore(host: str) -> None:
    """Put a host's network cable in again."""
    network.plug(host)


def freeze(rank: int) -> None:
    """Stop the worker process of a rank, as a debugger or a hanging device driver does."""
    os.kill(rank_pid(rank), signal.SIGSTOP)


def thaw(rank: int) -> None:
    """Let a frozen rank go on."""
    os.kill(rank_pid(rank), signal.SIGCONT)


def throttle(rank: int, share: float, seconds: float) -> None:
    """Give the worker process of a rank only this share of the time, as a busy neighbour or a hot chip does."""
    pid, end = rank_pid(rank), time.monotonic() + seconds
    with suppress(ProcessLookupError):
        try:
            while time.monotonic() < end:
                os.kill(pid, signal.SIGSTOP)
                time.sleep((1 - share) * CYCLE_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(share * CYCLE_S)
        finally:
            os.kill(pid, signal.SIGCONT)


def break_s3() -> None:
    """Every request to S3 is answered with a 500."""
    layout.S3_FAILS.touch()


def freeze_s3() -> None:
    """No request to S3 is answered at all."""
    os.kill(_only(layout.HEAD, "S3 endpoint", _is_s3), signal.SIGSTOP)


def mend_s3() -> None:
    """S3 works again, however it was broken."""
    layout.S3_FAILS.unlink(missing_ok=True)
    os.kill(_only(layout.HEAD, "S3 endpoint", _is_s3), signal.SIGCONT)


def fill_disk(host: str | None) -> None:
    """Leave no byte free on a host's local disk; without a host, on the file system that all share."""
    chunk = bytes(CHUNK_BYTES)
    with suppress(OSError), open(_disk(host) / FILLER, "ab", buffering=0) as file:
        while file.write(chunk):
            pass


def free_disk(host: str | None) -> None:
    """Undo ``fill_disk``."""
    (_disk(host) / FILLER).unlink(missing_ok=True)


def rank_pid(rank: int) -> int:
    """The worker process of a rank: the one that has the rank's log open.

    Raises:
        LabError: no such rank runs in the lab.
    """
    log = f"/logs/rank-{rank:04d}.log"
    for host in network.connected():
        for pid in lab.pids(host):
            with suppress(OSError):
                is_worker = any("TrainWorker" in word for word in _words(pid))
                if is_worker and any(os.readlink(file).endswith(log) for file in Path(f"/proc/{pid}/fd").iterdir()):
                    return pid
    raise LabError(f"No worker of rank {rank} runs in the lab now.")


def rank_runs(rank: int) -> bool:
    """Whether a rank has a worker process now."""
    try:
        return rank_pid(rank) > 0
    except LabError:
        return False


def _is_s3(words: list[str]) -> bool:
    return "cluster.lab.s3" in words


def _disk(host: str | None) -> Path:
    return layout.SHARED if host is None else lab.disk(host)


def _only(host: str, what: str, is_meant: Callable[[list[str]], bool]) -> int:
    found = [pid for pid in lab.pids(host) if (words := _words(pid)) and is_meant(words)]
    if not found:
        raise LabError(f"There is no {what} on {host} now.")
    return found[0]


def _words(pid: int) -> list[str]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    return []
