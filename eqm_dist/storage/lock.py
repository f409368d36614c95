"""Locks of the kernel on files of this machine: they go with their process, however it ends."""

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from eqm_dist.errors import BusyError
from eqm_dist.storage.files import storage_errors

_POLL_S = 0.1


@contextmanager
def locked(file: Path, *, wait_s: float = math.inf, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold a lock while the block runs; its file is made if absent, and stays, for one that is removed locks nothing.

    Args:
        file: that is locked, and holds nothing.
        wait_s: longest wait for another process that holds it.
        waiting: called once if there is one.

    Raises:
        BusyError: another process held it for so long.
        StorageError: the file cannot be made, or its file system has no locks.
    """
    with storage_errors("lock", file):
        opened = file.open("ab")
    with opened:
        deadline = time.monotonic() + wait_s
        if not (taken := _taken(opened, file)) and waiting is not None:
            waiting()
        while not (taken or _taken(opened, file, forever=wait_s == math.inf)):
            if time.monotonic() > deadline:
                raise BusyError(
                    f"{file} must be free within {wait_s:g} s, but another process holds it; wait until that ends, or"
                    " stop it."
                )
            time.sleep(_POLL_S)
        yield


def _taken(opened: BinaryIO, file: Path, *, forever: bool = False) -> bool:
    """Whether this process has the lock now; ``forever``: wait until it has."""
    with storage_errors("lock", file):
        try:
            fcntl.flock(opened, fcntl.LOCK_EX if forever else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
