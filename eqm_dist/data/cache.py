"""Files of data sets on S3, kept on the local disk for all processes of a machine.

DIR/SHA256           a whole file, under the checksum that its manifest records: never two files under one name
DIR/SHA256.lock      held while the file is fetched, so that whoever else wants it waits instead of fetching it too
DIR/SHA256.tmp       a file that is being fetched, or was when its process died
DIR/evict.lock       held while room is made

Locks are the kernel's and go with their process, however it ends. What was used longest ago goes first when the limit
is reached; a file that is open or mapped stays readable after that, for on Unix only its name is removed.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from eqm_dist.data.manifest import FileRecord, check_checksum
from eqm_dist.errors import BusyError, ConfigError
from eqm_dist.storage.files import TEMPORARY_SUFFIX, fsync_directory, storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import local_path
from eqm_dist.storage.lock import locked

LOCK_SUFFIX = ".lock"


class FileCache:
    """Files fetched once and kept. Safe to use from several threads and processes, and to kill.

    Args:
        directory: of the cache; made if it is missing. May be shared by any data sets.
        limit_bytes: disk that the files may take together. Files that are mapped while their name is removed take their
            room until they are closed, so keep it above what is read at one time.

    Raises:
        StorageError: the directory cannot be made.
    """

    def __init__(self, directory: str | Path, limit_bytes: int) -> None:
        self._directory = local_path(directory)
        self._limit_bytes = limit_bytes
        with storage_errors("create", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)

    def open(self, folder: Folder, record: FileRecord) -> BinaryIO:
        """The file ``record.name`` of ``folder``, fetched unless it is here, and open for reading.

        It was compared with the record when it arrived.

        Raises:
            ConfigError: it is larger than the whole cache may be.
            DataError: what lies in ``folder`` is not what the manifest records.
            StorageError: it cannot be fetched, or the disk is full.
        """
        path = self._directory / record.sha256
        file = self._open_entry(path, record)
        if file is None:
            with locked(self._lock_file(record.sha256)):
                file = self._open_entry(path, record) or self._fetch(folder, record, path)
        return file

    def _open_entry(self, path: Path, record: FileRecord) -> BinaryIO | None:
        with storage_errors("read", path), suppress(FileNotFoundError):
            file = open(path, "rb")  # noqa: SIM115
            if os.fstat(file.fileno()).st_size == record.bytes:
                os.utime(file.fileno())  # the time of last use
                return file
            file.close()  # damaged from outside: fetched again
        return None

    def _fetch(self, folder: Folder, record: FileRecord, path: Path) -> BinaryIO:
        if record.bytes > self._limit_bytes:
            raise ConfigError(
                f"The cache {self._directory} may hold {self._limit_bytes:,} bytes, and {folder.url}/{record.name}"
                f" alone has {record.bytes:,}; raise data.cache_gib."
            )
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        with storage_errors("write", temporary):
            file = open(temporary, "w+b")  # noqa: SIM115
        try:
            with storage_errors("write", temporary):
                self._make_room(record, file)
                folder.download(record.name, file)
                file.flush()
                os.fsync(file.fileno())
            check_checksum(file, f"{folder.url}/{record.name}", record)
            with storage_errors("write", path):
                os.replace(temporary, path)
        except BaseException:
            file.close()
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync_directory(self._directory)
        file.seek(0)
        return file

    def _make_room(self, record: FileRecord, file: BinaryIO) -> None:
        """Remove what was used longest ago until ``record`` fits, and take its room before its bytes are there."""
        with locked(self._lock_file("evict")):
            entries: list[tuple[float, int, Path]] = []
            for path in self._directory.iterdir():
                if path.suffix != LOCK_SUFFIX:
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        entries.append((status.st_mtime, status.st_size, path))
            total = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if total + record.bytes <= self._limit_bytes:
                    break
                if path.name != record.sha256 + TEMPORARY_SUFFIX and self._remove(path):
                    total -= size
            file.truncate(record.bytes)

    def _remove(self, path: Path) -> bool:
        """Remove a whole file, or an unfinished one whose process is dead."""
        if path.suffix != TEMPORARY_SUFFIX:
            path.unlink(missing_ok=True)
            return True
        try:
            with locked(path.with_suffix(LOCK_SUFFIX), wait_s=0):
                path.unlink(missing_ok=True)
        except BusyError:
            return False
        return True

    def _lock_file(self, name: str) -> Path:
        return self._directory / (name + LOCK_SUFFIX)
