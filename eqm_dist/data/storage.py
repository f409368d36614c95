"""Where files live: local directories and s3:// prefixes alike, and how a file comes to be whole or not at all.

A leaf that shards, checkpoints and reports share, and the only place that knows S3. Endpoint, region and credentials
come from where every S3 program looks: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ..., profiles and roles.
"""

import errno
import io
import itertools
import os
import random
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from eqm_dist.errors import DataError, StorageError

TEMPORARY_SUFFIX = ".tmp"
DEADLINE_S = 60.0
"""Seconds without a byte of progress after which S3 is given up."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 8.0
CHUNK_BYTES = 1 << 20
READ_AHEAD_BYTES = 4 << 20
"""What a file on S3 that is read piece by piece fetches with one request, at least."""
PART_BYTES = 64 << 20
"""Larger files go to S3 in parts of this size, each of which is tried again by itself."""
LIST_PAGE = 1000
"""Files that S3 lists in one answer, at most."""

T = TypeVar("T")


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


def is_remote(location: str | Path) -> bool:
    """Whether ``location`` is an s3:// URL."""
    return str(location).startswith("s3://")


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


def open_folder(location: str | Path, *, deadline_s: float | None = None) -> Folder:
    """The local directory or s3:// prefix that ``location`` names; it need not exist.

    Args:
        location: a path, or s3://BUCKET/PREFIX.
        deadline_s: how long S3 may answer with errors, or not at all, before it is given up.

    Raises:
        DataError: any other kind of URL. ``pipe:`` URLs stay refused for good: they run a shell.
        StorageError: S3 is not configured.
    """
    return (
        S3Folder(str(location), DEADLINE_S if deadline_s is None else deadline_s)
        if is_remote(location)
        else LocalFolder(location)
    )


def open_whole(folder: Folder, name: str) -> BinaryIO:
    """A whole file, open for reading here: itself if it is local, otherwise a copy that goes when it is closed.

    Raises:
        StorageError: it is missing or cannot be read, or there is no room for the copy.
    """
    if isinstance(folder, LocalFolder):
        return folder.open(name)
    with storage_errors("keep a copy of", f"{folder.url}/{name}"):
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            folder.download(name, file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


class LocalFolder:
    """A ``Folder`` on this machine."""

    def __init__(self, location: str | Path) -> None:
        self._path = local_path(location)
        self.url = str(self._path)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See ``Folder``."""
        path = self._path / name
        with storage_errors("read", path), open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else max(0, stop - start))

    def open(self, name: str) -> BinaryIO:
        """See ``Folder``."""
        path = self._path / name
        with storage_errors("read", path):
            return open(path, "rb")

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
        with storage_errors("list", self._path), suppress(FileNotFoundError), os.scandir(self._path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
        return []

    def walk(self) -> Sequence[str]:
        """See ``Folder``. Follows symbolic links."""
        with storage_errors("list", self._path), suppress(FileNotFoundError):
            found = os.walk(self._path, followlinks=True, onerror=_raise)
            return sorted(
                (Path(directory).relative_to(self._path) / name).as_posix()
                for directory, _, names in found
                for name in names
            )
        return []

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


class S3Folder:
    """A ``Folder`` on S3 or what speaks its protocol. Safe to use from several threads.

    A request that fails for a reason that may pass (no connection, a stall, 429, 5xx) is tried again after a pause
    that doubles and is drawn at random, so that many workers do not come back at once. A download goes on from the byte
    that it had reached.
    """

    def __init__(self, url: str, deadline_s: float) -> None:
        match = re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/+(.*?))?/*", url)
        if match is None:
            raise DataError(f"An S3 location must be s3://BUCKET/PREFIX, received {url}; correct it.")
        self._bucket = match[1]
        self._prefix = f"{match[2]}/" if match[2] else ""
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self._deadline_s = deadline_s
        # Several attempts must fit into the deadline, though one may stall until its time is out.
        self._attempt_s = min(10.0, deadline_s / 4)
        self._client = _s3_client(self._attempt_s)

    def __reduce__(self) -> tuple[type["S3Folder"], tuple[str, float]]:
        return S3Folder, (self.url, self._deadline_s)  # the client has connections, which stay where they are

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See ``Folder``."""
        content = io.BytesIO()
        if stop is None or start < stop:
            self._receive(name, content, start, stop)
        return content.getvalue()

    def open(self, name: str) -> BinaryIO:
        """See ``Folder``."""
        size = self.size(name)
        if size is None:
            raise StorageError(f"Cannot read {self.url}/{name}: there is no such object; check the name.")
        return io.BufferedReader(_S3File(self, name, size), READ_AHEAD_BYTES)

    def download(self, name: str, file: BinaryIO) -> None:
        """See ``Folder``."""
        self._receive(name, file)

    def _receive(self, name: str, file: BinaryIO, start: int = 0, stop: int | None = None) -> None:
        at = start

        def receive() -> None:
            nonlocal at
            wanted = {"Range": f"bytes={at}-{'' if stop is None else stop - 1}"} if at or stop is not None else {}
            answer = self._client.get_object(**self._key(name), **wanted)
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                file.write(chunk)
                at += len(chunk)

        self._retry("read", name, receive, progress=lambda: at - start)

    def size(self, name: str) -> int | None:
        """See ``Folder``."""

        def head() -> int | None:
            try:
                return self._client.head_object(**self._key(name))["ContentLength"]
            except self._client.exceptions.ClientError as error:
                if _status(error) == 404:
                    return None
                raise

        return self._retry("read", name, head)

    def list(self) -> dict[str, int]:
        """See ``Folder``."""
        entries = (entry for page in self._pages(Delimiter="/") for entry in page.get("Contents", []))
        sizes = {entry["Key"].removeprefix(self._prefix): entry["Size"] for entry in entries}
        sizes.pop("", None)  # consoles make an empty object to show a folder without files
        return sizes

    def folders(self) -> Sequence[str]:
        """See ``Folder``."""
        entries = (entry for page in self._pages(Delimiter="/") for entry in page.get("CommonPrefixes", []))
        return sorted(entry["Prefix"].removeprefix(self._prefix).rstrip("/") for entry in entries)

    def walk(self) -> Sequence[str]:
        """See ``Folder``."""
        entries = (entry["Key"] for page in self._pages() for entry in page.get("Contents", []))
        return [key.removeprefix(self._prefix) for key in entries if not key.endswith("/")]

    def _pages(self, **query: str) -> Iterator[dict[str, Any]]:
        query = {"Bucket": self._bucket, "Prefix": self._prefix, **query}
        while True:
            page = self._retry(
                "list", "", lambda query=dict(query): self._client.list_objects_v2(**query, MaxKeys=LIST_PAGE)
            )
            yield page
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def write(self, name: str, content: bytes | memoryview) -> None:
        """See ``Folder``."""
        body = bytes(content)
        self._retry("write", name, lambda: self._client.put_object(**self._key(name), Body=body))

    def upload(self, name: str, file: BinaryIO) -> None:
        """See ``Folder``."""
        first = file.read(PART_BYTES)
        if len(first) < PART_BYTES:
            self.write(name, first)
            return
        started = self._retry("write", name, lambda: self._client.create_multipart_upload(**self._key(name)))
        place = {**self._key(name), "UploadId": started["UploadId"]}
        parts, total = [], 0
        try:
            for number, part in enumerate(itertools.chain([first], iter(lambda: file.read(PART_BYTES), b"")), 1):
                part_place = {**place, "PartNumber": number, "Body": part}
                sent = self._retry("write", name, lambda place=part_place: self._client.upload_part(**place))
                parts.append({"PartNumber": number, "ETag": sent["ETag"]})
                total += len(part)
            self._retry("write", name, lambda: self._complete(name, place, parts, total))
        except BaseException:
            with suppress(StorageError):  # parts that nobody completes would be stored, and paid, for ever
                self._retry("write", name, lambda: self._client.abort_multipart_upload(**place))
            raise

    def _complete(self, name: str, place: dict[str, str], parts: Sequence[dict[str, Any]], total: int) -> None:
        try:
            self._client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})
        except self._client.exceptions.ClientError as error:
            # Tried again, because the answer of the first time was lost: there is nothing left to complete.
            if _status(error) != 404 or self.size(name) != total:
                raise

    def copy(self, source: Folder, name: str, new_name: str) -> None:
        """See ``Folder``. Between prefixes S3 copies by itself."""
        if isinstance(source, S3Folder):
            place = source._key(name)
            self._retry("write", new_name, lambda: self._client.copy_object(**self._key(new_name), CopySource=place))
            return
        with source.open(name) as file:
            self.upload(new_name, file)

    def remove(self, name: str) -> None:
        """See ``Folder``."""
        self._retry("remove", name, lambda: self._client.delete_object(**self._key(name)))

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _retry(self, action: str, name: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """The result of the first attempt that succeeds.

        Raises:
            StorageError: names the object, when trying again cannot help or the deadline would pass.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        where = f"{self.url}/{name}" if name else self.url
        began, reached, failures = time.monotonic(), 0, 0
        for tries in itertools.count(1):
            try:
                return attempt()
            except (BotoCoreError, ClientError, ConnectionError, TimeoutError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                if not _may_pass(error):
                    raise StorageError(
                        f"Cannot {action} {where}: {reason}; check the name, the credentials and their rights."
                    ) from error
                if progress() > reached:
                    began, reached, failures = time.monotonic(), progress(), 0
                # Jitter, not secrecy.
                pause = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**failures))  # noqa: S311
                failures += 1
                if time.monotonic() - began + pause + self._attempt_s > self._deadline_s:
                    raise StorageError(
                        f"Cannot {action} {where}: {reason}; tried {tries} times within the deadline of "
                        f"{self._deadline_s:g} s; check the endpoint and the network, then run the command again."
                    ) from error
                time.sleep(pause)
        raise AssertionError


class _S3File(io.RawIOBase):
    """An object on S3 as a file to read; each read is one request, so it wants a buffer."""

    def __init__(self, folder: S3Folder, name: str, size: int) -> None:
        self._folder, self._name, self._size = folder, name, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        content = self._folder.read(self._name, self._at, stop)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _s3_client(attempt_s: float) -> Any:
    from boto3.session import Session
    from botocore.config import Config

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        connect_timeout=attempt_s,
        read_timeout=attempt_s,
        retries={"total_max_attempts": 1},  # tried again here, where the deadline is known
        max_pool_connections=32,
        # Servers other than Amazon's seldom have a host name per bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return Session().client("s3", endpoint_url=endpoint or None, region_name=region, config=config)
    except Exception as error:
        raise StorageError(
            f"S3 cannot be used: {error}; check AWS_ENDPOINT_URL, AWS_REGION and AWS_PROFILE."
        ) from error


def _status(error: Exception) -> int:
    return getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _may_pass(error: Exception) -> bool:
    """Whether a request that failed so may succeed when it is made again."""
    from botocore.exceptions import (
        ClientError,
        ConnectionError,
        HTTPClientError,
        IncompleteReadError,
        ResponseStreamingError,
    )

    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code")
        return _status(error) in (408, 429) or _status(error) >= 500 or code in ("SlowDown", "RequestTimeout")
    passing = (ConnectionError, HTTPClientError, IncompleteReadError, ResponseStreamingError)
    return isinstance(error, (*passing, OSError))


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


def _raise(error: OSError) -> None:
    raise error


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files of writers that were killed. Only for who holds ``directory`` alone.

    Raises:
        StorageError: a file cannot be removed.
    """
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with storage_errors("remove", leftover):
            leftover.unlink()
