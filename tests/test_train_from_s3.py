"""Training from S3: the numbers of a clean local run through any fault that passes, and a clear end where none does."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eqm_dist.data.cache import FileCache
from eqm_dist.data.loader import Loader, ShardReader
from eqm_dist.data.order import SampleOrder
from eqm_dist.data.shards import write_shards
from eqm_dist.errors import DataError, StorageError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from tests import s3, tiny
from tests.s3 import FaultyProxy


@pytest.fixture(scope="module")
def url(endpoint: str, shards: Path) -> str:
    return s3.upload(endpoint, shards, "blots")


def train(root: Path, shards: Any, **others: Any) -> tuple[int, str]:
    outcome = tiny.train(*tiny.flags(tiny.overrides(root, shards, **others)))
    return outcome.code, outcome.err


def losses(root: Path) -> list[float]:
    lines = map(json.loads, (root / "tiny" / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_a_reader_over_s3_reads_what_the_local_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, shards: Path, url: str
) -> None:
    s3.use(monkeypatch, endpoint)
    remote = ShardReader(url, cache=FileCache(tmp_path, 10**8), deadline_s=5)
    indices = np.random.default_rng(0).integers(0, 48, 100)
    for found, expected in zip(remote.read(indices), ShardReader(shards).read(indices), strict=True):
        assert np.array_equal(found.numpy(), expected.numpy())
    with pytest.raises(DataError, match="read through a cache"):
        ShardReader(url)


def test_files_missing_or_truncated_on_s3_are_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, shards: Path
) -> None:
    s3.use(monkeypatch, endpoint)
    url = s3.upload(endpoint, shards, "broken")
    plain = s3.client(endpoint)
    plain.put_object(Bucket=s3.BUCKET, Key="broken/blots-000001.tar", Body=b"short")
    with pytest.raises(DataError, match=r"s3://bucket/broken/blots-000001\.tar must have .* bytes .*, found 5;"):
        ShardReader(url, cache=FileCache(tmp_path, 10**8))
    plain.delete_object(Bucket=s3.BUCKET, Key="broken/blots-000001.tar")
    with pytest.raises(DataError, match=r"s3://bucket/broken/blots-000001\.tar must be there"):
        ShardReader(url, cache=FileCache(tmp_path, 10**8))
    with pytest.raises(DataError, match=r"s3://bucket/nothing holds none"):
        ShardReader("s3://bucket/nothing", cache=FileCache(tmp_path, 10**8))


def test_the_next_window_is_fetched_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, url: str
) -> None:
    with FaultyProxy(endpoint) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        reader = ShardReader(url, cache=FileCache(tmp_path, 10**8))
        order = SampleOrder(reader.shard_sizes, seed=1, window_shards=1)
        batches = Loader(reader, order, global_batch=2, rank=0, world=1, workers=1).batches(0, 24)
        next(batches)  # of the first window
        until = time.monotonic() + 30
        while sum(key.endswith(".tar") for key in proxy.requests) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        second = order.upcoming_shards(0)[1]
        assert f"GET /bucket/blots/blots-{second:06d}.tar" in proxy.requests
        assert sum(key.endswith(".tar") for key in proxy.requests) == 2
        assert len(list(batches)) == 23
        # Each shard came once, for three epochs and a half.
        assert {count for key, count in proxy.requests.items() if key.endswith(".tar")} == {1}


def test_a_shard_that_stays_unreadable_ends_the_batches_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, shards: Path
) -> None:
    s3.use(monkeypatch, endpoint)
    url = s3.upload(endpoint, shards, "vanishing")
    reader = ShardReader(url, cache=FileCache(tmp_path, 10**8), deadline_s=2)
    order = SampleOrder(reader.shard_sizes, seed=1, window_shards=1)
    lost = order.upcoming_shards(16)[1]  # the third window, from batch 4 on
    s3.client(endpoint).delete_object(Bucket=s3.BUCKET, Key=f"vanishing/blots-{lost:06d}.tar")
    for workers in (0, 2):
        batches = Loader(reader, order, global_batch=8, rank=0, world=1, workers=workers).batches(0, 6)
        for _ in range(4):
            next(batches)
        with pytest.raises(StorageError, match=rf"s3://bucket/vanishing/blots-{lost:06d}\.tar"):
            next(batches)


def test_a_run_over_a_bad_network_gives_the_losses_of_a_clean_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, shards: Path, url: str
) -> None:
    """A run of three shards makes a dozen requests, so more of them fail here than on a bad day."""
    steps, constant = "train.steps", {"optimizer.schedule": "constant"}
    assert train(tmp_path / "clean", shards, **constant, **{steps: 24})[0] == 0
    with FaultyProxy(endpoint, failing=0.3, stalling=0.05, seed=29) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        # Resumed with an empty cache and other workers, as on another machine.
        for reached, workers in ((12, 1), (24, 3)):
            here = {"data.cache_dir": str(tmp_path / f"cache-{reached}"), "data.deadline_s": 4}
            code, err = train(tmp_path / "faulty", url, **constant, **here, **{steps: reached, "data.workers": workers})
            assert (code, err) == (0, err)
        assert sum(count for kind, count in proxy.faults.items() if kind != "none") >= 3
    assert losses(tmp_path / "faulty") == losses(tmp_path / "clean")
    assert len(losses(tmp_path / "clean")) == 24


@pytest.mark.slow
def test_a_run_through_a_tenth_of_failures_and_a_fiftieth_of_stalls_is_the_clean_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """The rates of a bad day, over enough requests to meet every kind: 48 shards, fetched three times."""
    shards = tmp_path / "shards"
    write_shards(shards, "blots", tiny.Blots(), IdentityAutoencoder(), samples_per_shard=1, dtype="float16")
    url = s3.upload(endpoint, shards, "many")
    options = {"optimizer.schedule": "constant", "data.window_shards": 8}
    assert train(tmp_path / "clean", shards, **options, **{"train.steps": 60})[0] == 0
    with FaultyProxy(endpoint, failing=0.1, stalling=0.02, seed=3) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        for reached in (20, 40, 60):
            here = {"data.cache_dir": str(tmp_path / f"cache-{reached}"), "data.deadline_s": 8}
            code, err = train(tmp_path / "faulty", url, **options, **here, **{"train.steps": reached})
            assert (code, err) == (0, err)
        assert proxy.faults.keys() == {"none", "500", "reset", "cut", "stall"}
        assert sum(proxy.requests.values()) > 150
    assert losses(tmp_path / "faulty") == losses(tmp_path / "clean")


def test_a_dead_endpoint_ends_the_command_within_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, s3.unused_endpoint())
    began = time.monotonic()
    code, err = train(tmp_path, "s3://bucket/blots", **{"data.deadline_s": 2})
    assert code == 1
    assert "Cannot read s3://bucket/blots/manifest.json: " in err
    assert "within the deadline of 2 s" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 20  # the deadline, and what a busy machine takes on top


def test_options_of_s3_are_refused_for_local_shards(tmp_path: Path, shards: Path) -> None:
    for option in ({"data.cache_dir": "x"}, {"data.cache_gib": 1}, {"data.deadline_s": 1}):
        code, err = train(tmp_path, shards, **option)
        assert code == 2
        assert "has no effect without shards on s3://" in err


def test_a_cache_too_small_for_two_windows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, url: str
) -> None:
    s3.use(monkeypatch, endpoint)
    code, err = train(tmp_path, url, **{"data.cache_gib": 1e-6, "data.cache_dir": str(tmp_path / "cache")})
    assert code in (1, 2)
    assert "raise data.cache_gib" in err or "raise it or lower data.window_shards" in err


def test_a_mixture_trains_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, shards: Path, url: str
) -> None:
    """A local and a remote data set; the run goes on with the same numbers after the data sets moved."""
    s3.use(monkeypatch, endpoint)

    def run(name: str, steps: int, places: list[str], weights: tuple[float, float] = (1, 3)) -> tuple[int, str]:
        values = tiny.overrides(tmp_path / name, shards, **{"train.steps": steps, "optimizer.schedule": "constant"})
        del values["data.shards"]
        values["data.mix"] = [{"shards": at, "weight": w} for at, w in zip(places, weights, strict=True)]
        remote = any(at.startswith("s3://") for at in places)
        cache = {"data.cache_dir": str(tmp_path / "cache")} if remote else {}
        outcome = tiny.train(*tiny.flags(values | cache))
        return outcome.code, outcome.err

    code, err = run("whole", 12, [str(shards), str(shards)])
    assert (code, err) == (0, err)
    assert run("parts", 6, [url, str(shards)])[0] == 0
    assert run("parts", 12, [str(shards), url])[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    code, err = run("parts", 12, [str(shards), url], weights=(1, 1))
    assert code == 2
    assert "data.mix was [1.0, 3.0]" in err
    code, err = train(tmp_path / "both", shards, **{"data.mix": [{"shards": str(shards)}]})
    assert code == 2
    assert "shards has no effect beside mix" in err
