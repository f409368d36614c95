"""Files on this machine: whole or not at all, durable, and every fault of the disk one sentence."""

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from eqm_dist.errors import StorageError

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def storage_errors(action: str, path: str | Path) -> Iterator[None]:
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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which readers see whole when the block has ended well, and not before; replaces an old one.

    Raises:
        StorageError: it cannot be written. After any error nothing is left behind and an old file stays as it was.
    """
    # The name is unique, so that two processes writing one path never mix their bytes.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with storage_errors("write", path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def atomic_write(path: Path, content: bytes | memoryview) -> None:
    """Write a file that readers see whole or not at all, now and after a power cut; replaces an old one.

    Raises:
        StorageError: the content cannot be written; nothing is left behind and an old file stays as it was.
    """
    with whole_file(path) as file:
        file.write(content)


def make_writable(directory: Path) -> None:
    """Make a directory if there is none, and try that a file can be written there: before work that ends with that.

    Raises:
        StorageError: it cannot.
    """
    with storage_errors("write to", directory):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def try_append(path: Path) -> None:
    """Try that a file can be appended to, and leave no trace of that.

    Raises:
        StorageError: it cannot.
    """
    with storage_errors("append to", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        # A pipe would wait for a reader.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666))
        if not existed:
            path.unlink()


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of writers that were killed. Only for who holds ``directory`` alone.

    Raises:
        StorageError: a file cannot be removed.
    """
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with storage_errors("remove", leftover):
            leftover.unlink()
