"""Locations, whole files, and folders on this machine and on S3."""

import io
import pickle
import random
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eqm_dist.errors import DataError, StorageError
from eqm_dist.storage import s3 as storage_s3
from eqm_dist.storage.files import atomic_write, fsync_directory, remove_leftovers
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import local_path
from eqm_dist.storage.open import open_folder
from tests import s3
from tests.disk import no_file_larger_than
from tests.s3 import FaultyProxy


@pytest.mark.parametrize("location", ["s3://bucket/shards", Path("s3://bucket/shards"), "pipe:cat x", "file:///x"])
def test_urls_are_refused(location: str | Path) -> None:
    with pytest.raises(DataError, match=r"must be a local path, received the (s3|pipe|file): URL"):
        local_path(location)


def test_local_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert local_path("data/a:b") == tmp_path / "data/a:b"
    assert local_path("~/data") == Path("/home/someone/data")


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    atomic_write(path, b"old")
    atomic_write(path, memoryview(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_full_disk_is_one_sentence_and_the_old_file_survives(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    atomic_write(path, b"old")
    with no_file_larger_than(10_000), pytest.raises(StorageError, match=r"Cannot write .*checkpoint: .*free space"):
        atomic_write(path, b"x" * 100_000)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_impossible_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Cannot write .*file/result: Not a directory"):
        atomic_write(tmp_path / "file" / "result", b"")
    with pytest.raises(StorageError, match="absent"):
        fsync_directory(tmp_path / "absent")


def test_a_reader_sees_only_whole_files_while_several_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([letter]) * 50_000 for letter in b"abcd"]
    atomic_write(path, contents[0])
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(lambda c: [atomic_write(path, c) for _ in range(20)], content) for content in contents]
        while not all(writer.done() for writer in writers):
            assert path.read_bytes() in contents
        for writer in writers:
            writer.result()
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".a.tar.123.tmp").touch()
    kept = {tmp_path / name for name in ("a.tar", ".lock", "notes.tmp")}
    for path in kept:
        path.touch()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == kept


# --- folders: local directories and S3 alike ---


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> Folder:
    if request.param == "local":
        return open_folder(tmp_path / "folder")
    s3.use(monkeypatch, endpoint)
    return open_folder(f"s3://{s3.BUCKET}/{tmp_path.name}/", deadline_s=5)


def test_both_folders_behave_alike(folder: Folder, tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than one chunk
    assert folder.list() == {}
    assert folder.size("b.tar") is None
    folder.write("b.tar", b"old")
    folder.write("b.tar", memoryview(content))
    folder.write("a", b"")
    assert folder.list() == {"a": 0, "b.tar": len(content)}
    assert folder.size("b.tar") == len(content)
    assert folder.read("b.tar") == content
    for start, stop in ((0, 10), (250, 260), (5, 5), (9, 4), (len(content) - 3, None)):
        assert folder.read("b.tar", start, stop) == content[start:stop]
    with (tmp_path / "copy").open("wb") as file:
        folder.download("b.tar", file)
    assert (tmp_path / "copy").read_bytes() == content
    for read in (lambda: folder.read("absent"), lambda: folder.download("absent", io.BytesIO())):
        with pytest.raises(StorageError, match=re.escape(f"Cannot read {folder.url}/absent: ")):
            read()


def test_both_folders_read_from_any_place(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(0).randbytes(100_000)
    folder.write("deep/er/file", content)
    monkeypatch.setattr(
        storage_s3, "READ_AHEAD_BYTES", 1000
    )  # so that reads end within, at and after a request's bytes
    with pickle.loads(pickle.dumps(folder)).open("deep/er/file") as file:
        for start, length in ((0, 10), (5, 1500), (99_990, 100), (3000, 3000), (100_000, 1), (7, 0)):
            file.seek(start)
            assert file.read(length) == content[start : start + length]
        file.seek(-10, io.SEEK_END)
        assert file.read() == content[-10:]
    with pytest.raises(StorageError, match=re.escape(f"Cannot read {folder.url}/absent: ")):
        folder.open("absent")


def test_reading_forward_takes_few_requests(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    with FaultyProxy(endpoint) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        folder = open_folder("s3://bucket/forward", deadline_s=5)
        folder.write("file", bytes(10_000))
        monkeypatch.setattr(storage_s3, "READ_AHEAD_BYTES", 4000)
        with folder.open("file") as file:
            for _ in range(100):
                file.seek(90, io.SEEK_CUR)
                assert len(file.read(10)) == 10
        assert proxy.requests["GET /bucket/forward/file"] == 3


def test_both_folders_tell_a_changed_file(folder: Folder) -> None:
    for name in ("a", "b/c"):
        folder.write(name, b"one")
    before = list(folder.versions(["a", "b/c"]))
    assert list(folder.versions(["a", "b/c"])) == before
    folder.write("b/c", b"two")
    after = list(folder.versions(["a", "b/c"]))
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    with pytest.raises(StorageError, match="absent"):
        folder.versions(["absent"])


def test_both_folders_read_nothing_past_the_end(folder: Folder) -> None:
    folder.write("empty", b"")
    folder.write("short", b"abc")
    assert [folder.read(name, 0, 10) for name in ("empty", "short")] == [b"", b"abc"]
    assert folder.read("short", 3, 10) == b""


def test_both_folders_see_what_lies_deeper(folder: Folder) -> None:
    assert (list(folder.walk()), list(folder.folders())) == ([], [])
    for name in ("b/2", "b/1", "a-b/x", "a/c/d", "top"):
        folder.write(name, b"")
    assert list(folder.walk()) == ["a-b/x", "a/c/d", "b/1", "b/2", "top"]
    assert list(folder.folders()) == ["a", "a-b", "b"]
    assert list(folder.list()) == ["top"]
    for name in ("a/c/d", "b/1", "absent"):
        folder.remove(name)
    assert list(folder.walk()) == ["a-b/x", "b/2", "top"]
    assert list(folder.folders()) == ["a-b", "b"]


@pytest.mark.parametrize("size", [0, 5 << 20, (11 << 20) + 1])
def test_both_folders_take_and_copy_files_of_any_size(
    size: int, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 << 20)  # the least that S3 takes
    content = random.Random(size).randbytes(size)
    folder.upload("up/loaded", io.BytesIO(content))
    assert folder.read("up/loaded") == content
    local = open_folder(tmp_path / "local")
    local.copy(folder, "up/loaded", "a")
    folder.copy(local, "a", "b")
    folder.copy(folder, "b", "c")
    assert folder.read("c") == content
    assert list(folder.walk()) == ["b", "c", "up/loaded"]


def test_an_upload_in_parts_survives_a_bad_network(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 << 20)
    content = random.Random(0).randbytes(11 << 20)
    with FaultyProxy(endpoint, failing=0.4, seed=2) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        for number in range(4):
            open_folder("s3://bucket/parts", deadline_s=10).upload(f"{number}", io.BytesIO(content))
        assert {"500", "reset", "cut"} <= proxy.faults.keys()
    s3.use(monkeypatch, endpoint)
    assert all(open_folder("s3://bucket/parts").read(f"{number}") == content for number in range(4))
    assert "Uploads" not in s3.client(endpoint).list_multipart_uploads(Bucket=s3.BUCKET)


def test_an_upload_that_ends_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 5 << 20:
                raise OSError("the disk is gone")
            return super().read(size)

    monkeypatch.setattr(storage_s3, "PART_BYTES", 5 << 20)
    s3.use(monkeypatch, endpoint)
    with pytest.raises(OSError, match="the disk is gone"):
        open_folder("s3://bucket/half").upload("file", Broken(bytes(11 << 20)))
    assert list(open_folder("s3://bucket/half").walk()) == []
    assert "Uploads" not in s3.client(endpoint).list_multipart_uploads(Bucket=s3.BUCKET)


def test_an_s3_folder_lists_pages_and_not_what_lies_deeper(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    s3.use(monkeypatch, endpoint)
    plain = s3.client(endpoint)
    monkeypatch.setattr(storage_s3, "LIST_PAGE", 4)
    names = [f"{number:04d}" for number in range(10)]
    for name in [*names, "deeper/file"]:
        plain.put_object(Bucket=s3.BUCKET, Key=f"pages/{name}", Body=b"x")
    plain.put_object(Bucket=s3.BUCKET, Key="pages-of-another/file", Body=b"x")
    folder = open_folder("s3://bucket/pages")
    assert list(folder.list()) == names
    assert list(folder.walk()) == [*names, "deeper/file"]
    assert list(folder.folders()) == ["deeper"]


@pytest.mark.parametrize("location", ["pipe:cat x", "http://host/x", "gs://bucket/x", "s3:///x", "s3://", "file:///x"])
def test_other_locations_are_refused(location: str) -> None:
    with pytest.raises(DataError, match=r"must be (a local path|s3://BUCKET/PREFIX), received"):
        open_folder(location)


def test_a_bad_network_is_survived(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    with FaultyProxy(endpoint, failing=0.3, stalling=0.05, seed=29) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        folder = open_folder("s3://bucket/faulty", deadline_s=4)
        content = random.Random(0).randbytes(3_000_000)
        for number in range(5):
            folder.write(f"{number}", content[number:])
            file = io.BytesIO()
            folder.download(f"{number}", file)
            assert file.getvalue() == content[number:]
            assert folder.size(f"{number}") == len(content) - number
        assert {"500", "reset", "cut", "stall"} <= proxy.faults.keys()


def test_a_cut_download_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Half of the rest is answered each time: 20 cuts leave 3 of 3,000,000 bytes, which nothing else could fetch."""
    s3.use(monkeypatch, endpoint)
    content = random.Random(0).randbytes(3_000_000)
    open_folder("s3://bucket/cut").write("file", content)
    with FaultyProxy(endpoint, failing=1.0) as proxy:
        monkeypatch.setattr(proxy._random, "choice", lambda kinds: "cut" if proxy.faults["cut"] < 5 else "none")
        s3.use(monkeypatch, proxy.endpoint)
        file = io.BytesIO()
        open_folder("s3://bucket/cut", deadline_s=4).download("file", file)
        assert file.getvalue() == content
        assert proxy.faults["cut"] == 5


def test_a_dead_endpoint_is_given_up_within_the_deadline(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    def seconds_until_given_up() -> float:
        began = time.monotonic()
        with pytest.raises(
            StorageError, match=r"Cannot read s3://bucket/dead/file: .*; tried \d+ times within .* 1\.5 s"
        ):
            open_folder("s3://bucket/dead", deadline_s=1.5).read("file")
        return time.monotonic() - began

    s3.use(monkeypatch, s3.unused_endpoint())
    assert seconds_until_given_up() < 2.5  # and a second to make the client on a busy machine
    with FaultyProxy(endpoint, stalling=1.0) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        assert seconds_until_given_up() < 2.5
        assert sum(proxy.requests.values()) > 1


def test_what_cannot_help_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    with FaultyProxy(endpoint) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        with pytest.raises(StorageError, match=r"Cannot read s3://no-such-bucket/a/file: .*NoSuchBucket.*credentials"):
            open_folder("s3://no-such-bucket/a").read("file")
        assert sum(proxy.requests.values()) == 1
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="Unable to locate credentials"):
        open_folder("s3://bucket/a").read("file")
