"""Locations and whole files."""

import resource
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from eqm_dist.data.storage import atomic_write, fsync_directory, local_path, remove_leftovers
from eqm_dist.errors import DataError, StorageError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond ``size`` bytes: the kernel refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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
    with largest_file(10_000), pytest.raises(StorageError, match=r"Cannot write .*checkpoint: .*free space"):
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
