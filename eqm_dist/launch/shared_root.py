"""Whether a run directory is the same on every host: the driver leaves a sign there, and each worker looks for it."""

import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

from eqm_dist.errors import LaunchError
from eqm_dist.run_directory import SIGN_FILE
from eqm_dist.storage.files import atomic_write

WAIT_S = 10.0
"""A network file system shows what another host wrote after a while."""


def sign(directory: Path) -> str:
    """Leave a sign in a run directory; returns what workers look for: the sign, and who left it."""
    found = f"{uuid.uuid4().hex} {socket.gethostname()}"
    atomic_write(directory / SIGN_FILE, found.encode())
    return found


def check_signed(directory: Path, expected: str, wait_s: float = WAIT_S) -> None:
    """Whether this host sees the sign.

    Raises:
        LaunchError: it does not, so that its files would lie where nobody looks for them.
    """
    ends = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            if (directory / SIGN_FILE).read_bytes() == expected.encode():
                return
        if time.monotonic() > ends:
            break
        time.sleep(0.2)
    raise LaunchError(
        f"run.root must be the same directory on every host, and {directory.parent} on {socket.gethostname()} is not"
        f" that of {expected.split()[-1]}; use a directory that all hosts share, or run.root=s3://BUCKET/PREFIX."
    )
