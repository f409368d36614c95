"""A folder as all that reads or writes files by name sees it, and the one that is a directory of this machine."""

import errno
import itertools
import os
import shutil
import stat
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from eqm_dist.storage.files import TEMPORARY_SUFFIX, atomic_write, fsync_directory, storage_errors, whole_file
from eqm_dist.storage.location import local_path

CHUNK_BYTES = 1 << 20
STAT_THREADS = 16
"""Files asked for at once: a network file system answers each after a while."""


class Folder(Protocol):
    """A local directory, or an s3:// prefix, and the files in it by name; the name of one further down has slashes.

    Pickles, so that other processes can use it.
    """

    url: str
    """Absolute path or s3:// URL, without a slash at the end."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file; by default all.

        Raises:
            StorageError: it is missing or cannot be read.
        """
        ...

    def open(self, name: str) -> BinaryIO:
        """A file to read from any place; on S3 with few requests where it is read forward.

        Raises:
            StorageError: it is missing or cannot be read; also when it is read later.
        """
        ...

    def download(self, name: str, file: BinaryIO) -> None:
        """Append a whole file to an open one.

        Raises:
            StorageError: it is missing or cannot be read.
            OSError: ``file`` cannot be written.
        """
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none.

        Raises:
            StorageError: the storage cannot tell.
        """
        ...

    def list(self) -> dict[str, int]:
        """Bytes of every file directly in here by name, in the order of the names; empty where there is no folder.

        Raises:
            StorageError: the storage cannot tell.
        """
        ...

    def folders(self) -> Sequence[str]:
        """Names of the folders directly in here, in their order; none where there is no folder.

        Raises:
            StorageError: the storage cannot tell.
        """
        ...

    def walk(self) -> Sequence[str]:
        """Names of all files in here, however far down, in their order; none where there is no folder.

        Raises:
            StorageError: the storage cannot tell.
        """
        ...

    def versions(self, names: Sequence[str]) -> Sequence[str]:
        """What tells the state of each of these files from others, without reading it: size and time of change.

        Raises:
            StorageError: one is missing, or the storage cannot tell.
        """
        ...

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file that readers see whole or not at all; replaces an old one. At most 5 GiB on S3.

        Raises:
            StorageError: it cannot be written; an old file stays as it was.
        """
        ...

    def upload(self, name: str, file: BinaryIO) -> None:
        """As ``write``, the rest of an open file of any size.

        Raises:
            StorageError: it cannot be written; an old file stays as it was.
        """
        ...

    def copy(self, source: "Folder", name: str, new_name: str) -> None:
        """As ``write``, the file ``name`` of another folder, without moving its bytes where that is possible.

        Raises:
            StorageError: it cannot be read or written; an old file stays as it was.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none.

        Raises:
            StorageError: it cannot be removed.
        """
        ...


class LocalFolder:
    """A ``Folder`` on this machine."""

    def __init__(self, location: str | Path) -> None:
        self._path = local_path(location)
        self.url = str(self._path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See ``Folder``."""
        with self.open(name) as file, storage_errors("read", self._path / name):
            file.seek(start)
            wanted = os.fstat(file.fileno()).st_size if stop is None else stop
            return file.read(max(0, min(wanted, os.fstat(file.fileno()).st_size) - start))

    def open(self, name: str) -> BinaryIO:
        """See ``Folder``."""
        path = self._path / name
        with storage_errors("read", path):
            return open(path, "rb", opener=_open_regular)

    def download(self, name: str, file: BinaryIO) -> None:
        """See ``Folder``."""
        with self.open(name) as source:
            shutil.copyfileobj(source, file, CHUNK_BYTES)

    def size(self, name: str) -> int | None:
        """See ``Folder``."""
        path = self._path / name
        with storage_errors("read", path):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return None if stat.S_ISDIR(status.st_mode) else status.st_size

    def list(self) -> dict[str, int]:
        """See ``Folder``."""
        nothing = suppress(FileNotFoundError, NotADirectoryError)
        with storage_errors("list", self._path), nothing, os.scandir(self._path) as entries:
            return dict(sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file()))
        return {}

    def folders(self) -> Sequence[str]:
        """See ``Folder``."""
        nothing = suppress(FileNotFoundError, NotADirectoryError)
        with storage_errors("list", self._path), nothing, os.scandir(self._path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
        return []

    def walk(self) -> Sequence[str]:
        """See ``Folder``. Follows symbolic links.

        Below each folder directly in here a directory is entered once, by its own name rather than by a link: links to
        a parent end, and many links to each other take no more time than there are directories.
        """
        with storage_errors("list", self._path), suppress(FileNotFoundError, NotADirectoryError):
            here = _identity(self._path)
            names: list[str] = []
            for name, kind in _entries(self._path):
                names += [name] if kind is None else _files_below(self._path, name, here)
            return sorted(names)
        return []

    def versions(self, names: Sequence[str]) -> Sequence[str]:
        """See ``Folder``."""

        def version(name: str) -> str:
            with storage_errors("read", self._path / name):
                status = os.stat(self._path / name)
            return f"{status.st_size} {status.st_mtime_ns}"

        with ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="stat") as threads:
            return list(threads.map(version, names))

    def write(self, name: str, content: bytes | memoryview) -> None:
        """See ``Folder``."""
        atomic_write(self._place_for(name), content)

    def upload(self, name: str, file: BinaryIO) -> None:
        """See ``Folder``."""
        with whole_file(self._place_for(name)) as target:
            shutil.copyfileobj(file, target, CHUNK_BYTES)

    def copy(self, source: Folder, name: str, new_name: str) -> None:
        """See ``Folder``. A hard link, where the file system has them."""
        target = self._place_for(new_name)
        if not (isinstance(source, LocalFolder) and _linked(source._path / name, target)):
            with whole_file(target) as file:
                source.download(name, file)

    def remove(self, name: str) -> None:
        """See ``Folder``. What is left empty goes too, for on S3 a folder is no more than its files."""
        path = self._path / name
        with storage_errors("remove", path):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            for parent in itertools.takewhile(lambda parent: parent != self._path, path.parents):
                parent.rmdir()

    def _place_for(self, name: str) -> Path:
        path = self._path / name
        with storage_errors("create", path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _linked(source: Path, target: Path) -> bool:
    """Make ``target`` a hard link of ``source``; False where the file system cannot."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    with storage_errors("write", target):
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                return False
            raise
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # a rename onto a link of the same file does nothing
    fsync_directory(target.parent)
    return True


def _open_regular(path: str, flags: int) -> int:
    """Open a file, and nothing else: a pipe would wait for its writer, and a device such as /dev/zero has no end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "it is a pipe or a device, and no file"
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, reason)
    return descriptor


_Kind = Literal["own", "link"] | None
"""Of an entry: a directory of its own, a link to one, or neither."""


def _files_below(root: Path, top: str, here: tuple[int, int]) -> list[str]:
    """The files below ``top``, a directory in ``root``, by their names from there."""
    found: list[str] = []
    entered = {here}
    own, links = deque([top]), deque[str]()
    while own or links:
        directory = (own or links).popleft()
        with suppress(FileNotFoundError):  # somebody removed it meanwhile
            identity = _identity(root / directory)
            if identity in entered:
                continue
            entered.add(identity)
            for name, kind in _entries(root / directory):
                {"own": own, "link": links, None: found}[kind].append(f"{directory}/{name}")
    return found


def _entries(directory: Path) -> list[tuple[str, _Kind]]:
    """Name and kind of each entry."""
    with os.scandir(directory) as entries:
        return sorted(((entry.name, _kind(entry)) for entry in entries), key=lambda found: found[0])


def _kind(entry: os.DirEntry[str]) -> _Kind:
    try:
        if entry.is_dir():
            return "link" if entry.is_symlink() else "own"
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is no directory
            raise
    return None


def _identity(directory: Path) -> tuple[int, int]:
    status = os.stat(directory)
    return status.st_dev, status.st_ino
