"""A folder on S3: the only place that knows it.

Endpoint, region and credentials come from where every S3 program looks: AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, ..., profiles and roles. boto3 is imported with the first such folder, so that runs without one do
not wait for it.
"""

import functools
import io
import itertools
import os
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, TypeVar

from eqm_dist.errors import DataError, StorageError
from eqm_dist.storage.folder import CHUNK_BYTES, STAT_THREADS, Folder

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 8.0
READ_AHEAD_BYTES = 4 << 20
"""What a file on S3 that is read piece by piece fetches with one request, at least."""
PART_BYTES = 64 << 20
"""Larger files go to S3 in parts of this size, each of which is tried again by itself."""
PARTS_AT_ONCE = 4
"""Parts of one file that are on their way at once, each of which is held in memory."""
LEAST_PART_BYTES = 5 << 20
"""S3 takes no smaller part but the last one."""
MOST_COPIED_BYTES = 5 << 30
"""S3 copies no more by itself in one request."""
LIST_PAGE = 1000
"""Files that S3 lists or removes in one request, at most."""

T = TypeVar("T")


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
        self._client = _s3_client(self._attempt_s, os.getpid(), *map(os.environ.get, _SETTINGS))

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
            try:
                answer = self._client.get_object(**self._key(name), **wanted)
            except self._client.exceptions.ClientError as error:
                if _status(error) == 416:  # there is nothing from ``at`` on
                    return
                raise
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

    def versions(self, names: Sequence[str]) -> Sequence[str]:
        """See ``Folder``. One request for each of a few files, one listing of all that lies in here for many."""
        if len(names) <= LIST_PAGE:
            with ThreadPoolExecutor(STAT_THREADS, thread_name_prefix="head") as threads:
                return list(threads.map(self._version, names))
        entries = (entry for page in self._pages() for entry in page.get("Contents", []))
        found = {entry["Key"].removeprefix(self._prefix): f"{entry['Size']} {entry['ETag']}" for entry in entries}
        missing = next((name for name in names if name not in found), None)
        if missing is not None:
            self._version(missing)
        return [found[name] for name in names]

    def _version(self, name: str) -> str:
        head = self._retry("read", name, lambda: self._client.head_object(**self._key(name)))
        return f"{head['ContentLength']} {head['ETag']}"

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
        with self._in_parts(name) as upload:
            for part in itertools.chain([first], iter(lambda: file.read(PART_BYTES), b"")):
                upload.send(part)

    def append(self, name: str, size: int, content: bytes) -> None:
        """Make a file longer; S3 copies what there is by itself, so that only ``content`` moves.

        Args:
            name: of the file, which readers see as it was or with all of ``content``.
            size: its bytes, at least ``LEAST_PART_BYTES``.
            content: what follows them.

        Raises:
            StorageError: it cannot be written; the file stays as it was.
        """
        assert size >= LEAST_PART_BYTES
        with self._in_parts(name) as upload:
            for start, stop in _copied_ranges(size):
                upload.copy(name, start, stop)
            for at in range(0, len(content), PART_BYTES):
                upload.send(content[at : at + PART_BYTES])

    def _in_parts(self, name: str) -> "_Upload":
        return _Upload(self, name)

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
            place, size = source._key(name), source.size(name) or 0
            if size <= MOST_COPIED_BYTES:
                copy = functools.partial(self._client.copy_object, **self._key(new_name), CopySource=place)
                self._retry("write", new_name, copy)
                return
            with self._in_parts(new_name) as upload:
                for start, stop in _copied_ranges(size):
                    upload.copy(name, start, stop, source)
            return
        with source.open(name) as file:
            self.upload(new_name, file)

    def remove(self, name: str) -> None:
        """See ``Folder``."""
        self._retry("remove", name, lambda: self._client.delete_object(**self._key(name)))

    def remove_all(self, names: Sequence[str]) -> None:
        """Remove files, a thousand with one request; nothing happens to those that there are not.

        Raises:
            StorageError: one cannot be removed.
        """
        for at in range(0, len(names), LIST_PAGE):
            keys = [{"Key": self._prefix + name} for name in names[at : at + LIST_PAGE]]
            batch = {"Objects": keys, "Quiet": True}
            answer = self._retry(
                "remove", "", lambda batch=batch: self._client.delete_objects(Bucket=self._bucket, Delete=batch)
            )
            for error in answer.get("Errors", []):
                key, reason = error["Key"], error.get("Message")
                raise StorageError(f"Cannot remove s3://{self._bucket}/{key}: {reason}; check the credentials.")

    def write_if(self, name: str, content: bytes, version: str | None) -> str | None:
        """Write a file if nobody else has since; of several that write at once one succeeds.

        Args:
            name: of the file.
            content: its bytes, never the same twice.
            version: what ``versioned`` or the last ``write_if`` gave; None where there must be no such file.

        Returns:
            Its version now; None where somebody else has written, or removed, it.

        Raises:
            StorageError: it cannot be written, or this S3 has no conditional writes.
        """
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def put() -> str | None:
            try:
                return self._client.put_object(**self._key(name), Body=content, **condition)["ETag"]
            except self._client.exceptions.ClientError as error:
                if _status(error) == 501:
                    raise StorageError(
                        f"Cannot write {self.url}/{name}: this S3 has no conditional writes (If-None-Match, If-Match),"
                        " without which two processes cannot be kept apart; use one that has them."
                    ) from error
                if _status(error) not in (404, 409, 412):
                    raise
                if _status(error) == 404 and error.response["Error"].get("Code") != "NoSuchKey":
                    raise  # no bucket
            # An answer that was lost and a request that was made again must not look like somebody else.
            found = self.versioned(name)
            return found[1] if found is not None and found[0] == content else None

        return self._retry("write", name, put)

    def versioned(self, name: str) -> tuple[bytes, str] | None:
        """The bytes of a small file, and what tells this state of it from others; None where there is none.

        Raises:
            StorageError: the storage cannot tell.
        """

        def get() -> tuple[bytes, str] | None:
            try:
                answer = self._client.get_object(**self._key(name))
            except self._client.exceptions.ClientError as error:
                if _status(error) == 404 and error.response["Error"].get("Code") == "NoSuchKey":
                    return None
                raise
            return answer["Body"].read(), answer["ETag"]

        return self._retry("read", name, get)

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


class _Upload:
    """A file that is written in parts; it is there when the block has ended well, and not before."""

    def __init__(self, folder: S3Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._threads = ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="part")
        self._sent: deque[Future[str]] = deque()
        self._parts: list[dict[str, Any]] = []
        self._total = 0

    def send(self, content: bytes) -> None:
        """The next part; waits while ``PARTS_AT_ONCE`` are on their way."""
        self._add(len(content), lambda place: self._client.upload_part(**place, Body=content)["ETag"])

    def copy(self, name: str, start: int, stop: int, source: S3Folder | None = None) -> None:
        """The bytes [start, stop) of a file that is on S3 already as the next part."""
        origin = {"CopySource": (source or self._folder)._key(name), "CopySourceRange": f"bytes={start}-{stop - 1}"}

        def copied(place: dict[str, Any]) -> str:
            return self._client.upload_part_copy(**place, **origin)["CopyPartResult"]["ETag"]

        self._add(stop - start, copied)

    def _add(self, size: int, request: Callable[[dict[str, Any]], str]) -> None:
        place = {**self._place, "PartNumber": len(self._parts) + len(self._sent) + 1}
        self._total += size
        self._sent.append(self._threads.submit(self._retry, lambda: request(place)))
        if len(self._sent) == PARTS_AT_ONCE:
            self._take()

    def _take(self) -> None:
        self._parts.append({"PartNumber": len(self._parts) + 1, "ETag": self._sent.popleft().result()})

    def __enter__(self) -> "_Upload":
        self._client = self._folder._client
        self._retry = functools.partial(self._folder._retry, "write", self._name)
        key = self._folder._key(self._name)
        self._place = {**key, "UploadId": self._retry(lambda: self._client.create_multipart_upload(**key))["UploadId"]}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                while self._sent:
                    self._take()
                self._retry(lambda: self._folder._complete(self._name, self._place, self._parts, self._total))
                return
        except BaseException:
            self._abort()
            raise
        finally:
            self._threads.shutdown(cancel_futures=True)
        self._abort()

    def _abort(self) -> None:
        """Parts that nobody completes would be stored, and paid, for ever."""
        self._threads.shutdown(cancel_futures=True)
        with suppress(StorageError):
            self._retry(lambda: self._client.abort_multipart_upload(**self._place))


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


_SETTINGS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)


@functools.lru_cache(maxsize=16)
def _s3_client(attempt_s: float, *_: object) -> Any:
    """A client, which takes a tenth of a second to make; the same for the same process and ``_SETTINGS``."""
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


def _copied_ranges(size: int) -> Iterator[tuple[int, int]]:
    """Equal parts, none of which is too large to be copied, and none too small for a part."""
    parts = -(-size // MOST_COPIED_BYTES)
    for number in range(parts):
        yield size * number // parts, size * (number + 1) // parts


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
