"""The cache: fetched once by any number of processes, within its limit, never wrong, safe to kill."""

import hashlib
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from eqm_dist.data.cache import FileCache
from eqm_dist.data.manifest import FileRecord
from eqm_dist.errors import ConfigError, DataError, StorageError
from eqm_dist.storage.folder import LocalFolder
from eqm_dist.storage.open import open_folder
from tests import s3
from tests.processes import forked, wait_for
from tests.s3 import FaultyProxy


class CountingFolder(LocalFolder):
    """Counts what is fetched from it."""

    fetched = 0

    def download(self, name: str, file: BinaryIO) -> None:
        self.fetched += 1
        super().download(name, file)


def put(folder: LocalFolder, name: str, content: bytes) -> FileRecord:
    folder.write(name, content)
    return FileRecord(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def source(tmp_path: Path) -> CountingFolder:
    return CountingFolder(tmp_path / "source")


def contents(number: int) -> bytes:
    return bytes([number]) * 1000


def whole_files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.suffix}


def test_a_file_is_fetched_once_and_kept(tmp_path: Path, source: CountingFolder) -> None:
    record = put(source, "a.tar", contents(1))
    for _ in range(3):
        with FileCache(tmp_path / "cache", 10_000).open(source, record) as file:
            assert file.read() == contents(1)
    assert source.fetched == 1


def test_names_of_two_data_sets_do_not_collide(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    for number in (1, 2):
        folder = LocalFolder(tmp_path / f"set-{number}")
        record = put(folder, "train-000000.tar", contents(number))
        with cache.open(folder, record) as file:
            assert file.read() == contents(number)


def test_what_was_used_longest_ago_goes_first_and_the_limit_holds(tmp_path: Path, source: CountingFolder) -> None:
    cache = FileCache(tmp_path / "cache", 3500)
    records = [put(source, f"{number}", contents(number)) for number in range(4)]
    for number in (0, 1, 2, 0, 3):  # 0 is used again, so 1 is the oldest when there is no room
        cache.open(source, records[number]).close()
        time.sleep(0.01)  # file times may be as coarse as a kernel tick
    assert whole_files(tmp_path / "cache") == {records[number].sha256 for number in (0, 2, 3)}
    assert source.fetched == 4
    with cache.open(source, records[1]) as file:
        assert file.read() == contents(1)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 3500


def test_a_reader_keeps_what_is_evicted_under_it(tmp_path: Path, source: CountingFolder) -> None:
    cache = FileCache(tmp_path / "cache", 1500)
    first, second = put(source, "0", contents(7)), put(source, "1", contents(8))
    file = cache.open(source, first)
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cache.open(source, second).close()
    assert whole_files(tmp_path / "cache") == {second.sha256}
    assert file.read() == mapped[:] == contents(7)
    file.close()
    assert mapped[500] == 7


def test_a_file_that_is_not_what_the_manifest_records_is_refused(tmp_path: Path, source: CountingFolder) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    record = put(source, "a.tar", contents(1))
    for changed in (contents(2), contents(1)[:-1], contents(1) + b"x"):
        source.write("a.tar", changed)
        with pytest.raises(DataError, match=r"source/a\.tar must have the sha256 .* it was changed or damaged"):
            cache.open(source, record)
    assert whole_files(tmp_path / "cache") == set()
    source.write("a.tar", contents(1))
    with cache.open(source, record) as file:
        assert file.read() == contents(1)


def test_a_file_truncated_in_the_cache_is_fetched_again(tmp_path: Path, source: CountingFolder) -> None:
    cache = FileCache(tmp_path / "cache", 10_000)
    record = put(source, "a.tar", contents(1))
    cache.open(source, record).close()
    os.truncate(tmp_path / "cache" / record.sha256, 10)
    with cache.open(source, record) as file:
        assert file.read() == contents(1)


def test_a_limit_below_one_file_is_refused(tmp_path: Path, source: CountingFolder) -> None:
    record = put(source, "a.tar", contents(1))
    with pytest.raises(ConfigError, match=r"may hold 999 bytes, and .*a\.tar alone has 1,000; raise data\.cache_gib"):
        FileCache(tmp_path / "cache", 999).open(source, record)


def test_a_missing_file_is_named(tmp_path: Path, source: CountingFolder) -> None:
    record = put(source, "a.tar", contents(1))
    (tmp_path / "source" / "a.tar").unlink()
    with pytest.raises(StorageError, match=r"source/a\.tar: No such file"):
        FileCache(tmp_path / "cache", 10_000).open(source, record)
    assert list((tmp_path / "cache").glob("*.tmp")) == []


def test_many_threads_under_a_small_limit_always_read_the_right_bytes(tmp_path: Path, source: CountingFolder) -> None:
    records = [put(source, f"{number}", contents(number)) for number in range(8)]

    def read(start: int) -> None:
        cache = FileCache(tmp_path / "cache", 3000)
        for number in [(start * 3 + step * 5) % 8 for step in range(20)]:
            with cache.open(source, records[number]) as file:
                assert file.read() == contents(number)

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(read, start) for start in range(4)]:
            result.result()
    assert len(whole_files(tmp_path / "cache")) <= 3
    assert list((tmp_path / "cache").glob("*.tmp")) == []


# --- several processes, over S3 ---


def read_all(cache: Path, environment: dict[str, str], records: list[FileRecord], sizes: Any) -> None:
    os.environ |= environment
    for record in records:
        with FileCache(cache, 10**8).open(open_folder("s3://bucket/data"), record) as file:
            sizes.put(len(file.read()))


def start_reader(cache: Path, endpoint: str, records: list[FileRecord]) -> tuple[Any, Any]:
    """A process that reads the files, and the queue into which it puts their sizes."""
    sizes = forked().SimpleQueue()
    reader = forked().Process(target=read_all, args=(cache, s3.environment(endpoint), records, sizes))
    reader.start()
    return reader, sizes


def assert_read(reader: Any, sizes: Any, expected: list[int]) -> None:
    reader.join(timeout=120)
    assert reader.exitcode == 0
    assert [sizes.get() for _ in expected] == expected
    assert sizes.empty()


def put_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str, count: int) -> list[FileRecord]:
    s3.use(monkeypatch, endpoint)
    records = []
    for number in range(count):
        content = os.urandom(300_000)
        open_folder("s3://bucket/data").write(f"{number}.tar", content)
        records.append(FileRecord(name=f"{number}.tar", bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))
    return records


def test_processes_of_a_machine_fetch_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    records = put_s3(monkeypatch, endpoint, 5)
    with FaultyProxy(endpoint) as proxy:
        readers = [start_reader(tmp_path / "cache", proxy.endpoint, records) for _ in range(3)]
        for reader in readers:
            assert_read(*reader, [300_000] * 5)
        assert proxy.requests == {f"GET /bucket/data/{number}.tar": 1 for number in range(5)}


def test_a_killed_process_holds_nobody_up_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    records = put_s3(monkeypatch, endpoint, 1)
    cache = tmp_path / "cache"
    temporary = cache / f"{records[0].sha256}.tmp"
    with FaultyProxy(endpoint, stalling=1.0) as silent:
        killed, _ = start_reader(cache, silent.endpoint, records)
        wait_for(temporary.exists)
        waiting = start_reader(cache, endpoint, records)
        killed.kill()
        killed.join()
    assert_read(*waiting, [300_000])
    assert whole_files(cache) == {records[0].sha256}
    assert not temporary.exists()


def test_room_taken_by_the_dead_is_given_back_and_that_of_the_living_is_not(
    tmp_path: Path, source: CountingFolder, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    records = put_s3(monkeypatch, endpoint, 1)
    cache = tmp_path / "cache"
    temporary = cache / f"{records[0].sha256}.tmp"
    small = put(source, "small", contents(1))
    with FaultyProxy(endpoint, stalling=1.0) as silent:
        fetching, _ = start_reader(cache, silent.endpoint, records)
        wait_for(lambda: temporary.exists() and temporary.stat().st_size)
        FileCache(cache, 2000).open(source, small).close()
        assert temporary.exists()
        fetching.kill()
        fetching.join()
    (cache / small.sha256).unlink()
    FileCache(cache, 2000).open(source, small).close()
    assert not temporary.exists()
