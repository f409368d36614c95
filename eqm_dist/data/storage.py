"""Where files live: which locations are allowed, and how a file comes to be whole or not at all.

A leaf that shards, checkpoints and reports share. Only local paths for now; S3 belongs here and nowhere else.
"""

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eqm_dist.errors import DataError, StorageError

TEMPORARY_SUFFIX = ".tmp"


def local_path(location: str | Path) -> Path:
    """The absolute local path that ``location`` names; ``~`` is expanded.

    Raises:
        DataError: ``location`` is a URL. ``pipe:`` URLs stay refused for good: they run a shell.
    """
    if match := re.match(r"(pipe|[A-Za-z][A-Za-z0-9+.-]*(?=:/)):", str(location)):
        raise DataError(
            f"A location must be a local path, received the {match[1]}: URL {location}; "
            "use a local or mounted directory."
        )
    return Path(location).expanduser().absolute()


@contextmanager
def storage_errors(action: str, path: Path) -> Iterator[None]:
    """Turn a machine's fault into one sentence: "Cannot ``action`` ``path``: No space left on device ..."

    Raises:
        StorageError: an OSError happened inside.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space or choose another directory" if full else "check the disk, the mount and the permissions"
        raise StorageError(f"Cannot {action} {path}: {error.strerror or error}; {remedy}.") from error


def fsync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable: a rename survives a power cut only after this.

    Raises:
        StorageError: the directory cannot be synced.
    """
    with storage_errors("write", directory):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write a file that readers see whole or not at all, now and after a power cut; replaces an old one.

    Raises:
        StorageError: the content cannot be written; nothing is left behind and an old file stays as it was.
    """
    # The name is unique, so that two processes writing one path never mix their bytes.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with storage_errors("write", path):
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of writers that were killed. Only for who holds ``directory`` alone.

    Raises:
        StorageError: a file cannot be removed.
    """
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with storage_errors("remove", leftover):
            leftover.unlink()
