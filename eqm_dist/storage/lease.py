"""Who works in a directory: one process at a time, and a dead one does not keep it.

The holder's name lies in a file of the directory, which it touches every few seconds. Whoever finds the file watches
it: a holder that touches it is alive, and one on this machine is asked for by its process. No clock is compared with
another, or with itself before it was set, and nothing but links, renames and times of files is needed, so that it works
on NFS too.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from eqm_dist.errors import BusyError
from eqm_dist.storage.boot import processes, started
from eqm_dist.storage.files import TEMPORARY_SUFFIX, storage_errors

LEASE_FILE = ".holder.json"
BEAT_S = 3.0
"""Seconds between two signs of life."""
LEASE_S = 45.0
"""Seconds without one after which a holder on another machine counts as dead."""
SETTLE_S = 0.5
"""Seconds after which it is clear which of several processes has taken a lease over."""
_MOST_BYTES = 64 << 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A process that holds a directory.

    Attributes:
        id: of this holding alone.
        host: name of its machine, for people.
        process: its number there.
        machine: where that number means this process.
        started: when the process started, by a count of its machine; tells apart two with one number.
        since: when it took the directory, for people.
        command: what it runs.
    """

    id: str
    host: str
    process: int
    machine: str
    started: float
    since: str
    command: str

    @classmethod
    def of_this_process(cls) -> "Holder":
        """A new holding."""
        return cls(
            uuid.uuid4().hex,
            socket.gethostname(),
            os.getpid(),
            processes(),
            started(os.getpid()) or 0.0,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        )

    @property
    def here(self) -> bool:
        """Whether this process can see whether it runs."""
        return self.machine == processes()

    @property
    def gone(self) -> bool:
        """Whether it is certain that it no longer runs."""
        return self.here and started(self.process) != self.started

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} ({self.command})"


@contextmanager
def hold(directory: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a directory, which is made if absent, while the block runs.

    Where the holder is dead, the directory is taken over: at once if it was on this machine, otherwise after
    ``LEASE_S`` without a sign of life.

    Args:
        directory: held as a whole.
        what: what it is, for the sentence: ``The run digits``.
        remedy: what else the user may do: ``choose another --run.name``.

    Raises:
        BusyError: another process holds it.
        StorageError: the directory cannot be written.
    """
    with storage_errors("create", directory):
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
    file = directory / LEASE_FILE
    own = Holder.of_this_process()
    _take(file, own, what, remedy)
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(file, own, over, what), name="lease", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        with suppress(OSError):
            if _holder(file) == own:
                file.unlink()
            for path in made:  # and nothing came of it
                path.rmdir()


def _take(file: Path, own: Holder, what: str, remedy: str) -> None:
    with storage_errors("write", file):
        if _created(file, own):
            return
        before = _holder(file)
        if before is not None and not before.gone:
            if _lives(file, before, what):
                raise BusyError(f"{what} is held by {before}; wait until it ends, stop it, or {remedy}.")
            logger.warning("warning: %s was held by %s, which gives no sign of life; it is taken over", what, before)
        temporary = _written(file, own)
        os.replace(temporary, file)
        time.sleep(SETTLE_S)  # of several that take over, the last one has it
        now = _holder(file)
    if now != own:
        raise BusyError(f"{what} is held by {now}; wait until it ends, stop it, or {remedy}.")


def _created(file: Path, own: Holder) -> bool:
    """Write the file where there is none; False where there is one."""
    temporary = _written(file, own)
    try:
        os.link(temporary, file)
        return True
    except FileExistsError:
        return False
    except PermissionError:  # a file system without links: two that start in the same instant are told apart below
        if file.exists():
            return False
        os.replace(temporary, file)
        time.sleep(SETTLE_S)
        return _holder(file) == own
    finally:
        temporary.unlink(missing_ok=True)


def _written(file: Path, own: Holder) -> Path:
    temporary = file.with_name(f".{file.name}.{own.id}{TEMPORARY_SUFFIX}")
    temporary.write_text(json.dumps(asdict(own)), encoding="utf-8")
    return temporary


def _lives(file: Path, holder: Holder, what: str) -> bool:
    """Whether the holder touches its file, or another one does; waits for that until its lease has run out."""
    if holder.here:
        return True  # its process runs, or is stopped and may run again
    first, began, said = _touched(file), time.monotonic(), False
    while time.monotonic() - began < LEASE_S:
        time.sleep(BEAT_S / 6)
        now = _touched(file)
        if now is None or holder.gone:
            return False
        if now != first:
            return True
        if not said and time.monotonic() - began > 2 * BEAT_S:
            logger.info("%s is held by %s; waiting up to %.0f s for a sign of life", what, holder, LEASE_S)
            said = True
    return False


def _touched(file: Path) -> tuple[int, int] | None:
    """What changes with every sign of life; opened, for a cache of NFS answers ``stat`` with what was."""
    with suppress(FileNotFoundError), file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        return status.st_ino, status.st_mtime_ns
    return None


def _holder(file: Path) -> Holder | None:
    """Who holds it; None where nobody does, or the file says nothing."""
    try:
        # Of a pipe nothing, for it would wait for a writer; and no more than a holder writes.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
            return Holder(**json.loads(opened.read(_MOST_BYTES)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None


def _beat(file: Path, own: Holder, over: threading.Event, what: str) -> None:
    """Touch the file again and again. A process that was frozen until another took over must not go on."""
    while not over.wait(BEAT_S):
        with suppress(OSError):  # a disk that fails for a while costs the lease only if it fails for long
            holder = _holder(file)
            if holder is not None and holder != own:
                print(
                    f"error: {what} was taken over by {holder}, for this process gave no sign of life for"
                    f" {LEASE_S:.0f} s; it ends, so that the two do not mix.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
            now = time.time_ns()
            os.utime(file, ns=(now, now))
