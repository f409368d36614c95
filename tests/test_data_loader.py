"""Reader and loader: each sample read once, by any number of ranks, from anywhere; or a sentence that says why not."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from webdataset.writer import TarWriter

import eqm_dist.data.loader as loader_module
from eqm_dist.data.index import index_shard, write_index
from eqm_dist.data.loader import PREFETCH, Batch, JoinedReader, Loader, ShardReader
from eqm_dist.data.manifest import Manifest, ShardRecord, file_record, write_manifest
from eqm_dist.data.order import MixedOrder, SampleOrder
from eqm_dist.data.shards import digits_shards, write_shards
from eqm_dist.data.sources import Digits, LabelledImage
from eqm_dist.data.verify import verify_shards
from eqm_dist.errors import DataError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.storage.open import open_folder


class Ramp:
    """113 images [2, 2, 1], each filled with its number; an index is read off a sample."""

    id = "ramp"
    num_classes = 5

    def __len__(self) -> int:
        return 113

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        for index in range(start, stop):
            yield LabelledImage(f"{index:03d}", np.full((2, 2, 1), index, dtype=np.uint8), index % 5)


def write_ramp(directory: Path) -> Path:
    write_shards(directory, "ramp", Ramp(), IdentityAutoencoder(), samples_per_shard=10, dtype="float16")
    return directory


@pytest.fixture(scope="module")
def ramp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ramp(tmp_path_factory.mktemp("ramp"))


def ramp_loader(directory: Path, global_batch: int, rank: int = 0, world: int = 1) -> Loader:
    reader = ShardReader(directory)
    order = SampleOrder(reader.shard_sizes, seed=5, window_shards=3)
    return Loader(reader, order, global_batch=global_batch, rank=rank, world=world)


def numbers(moments: Tensor) -> list[int]:
    """The numbers of the ramp's images."""
    return IdentityAutoencoder().decode(moments[:, 0, :1])[:, 0, 0, 0].tolist()


# --- reader ---


def test_reader_reads_any_samples_in_any_order(tmp_path: Path) -> None:
    digits_shards(tmp_path)
    reader = ShardReader(str(tmp_path))
    assert (reader.latent_shape, reader.num_classes) == ((1, 8, 8), 10)
    samples = list(Digits().read(0, 1797))
    expected = IdentityAutoencoder().encode(torch.from_numpy(np.stack([sample.image for sample in samples])))
    labels = torch.tensor([sample.label for sample in samples])
    for indices in (np.arange(1797), np.random.default_rng(0).integers(0, 1797, 500), np.array([1796]), np.arange(0)):
        moments, found = reader.read(indices)
        assert torch.equal(moments[:, 0], expected[indices])
        assert moments.dtype == torch.float32
        assert torch.equal(found, labels[indices])
        assert found.dtype == torch.int64


def test_reader_reads_samples_at_uneven_distances(tmp_path: Path) -> None:
    """Tars with captions of different lengths have no constant stride."""
    arrays = np.random.default_rng(0).normal(size=(20, 2, 4, 3, 5)).astype(np.float32)
    shards = []
    records = []
    for number in range(2):
        path = tmp_path / f"captioned-{number}.tar"
        with path.open("wb") as file, TarWriter(file) as tar:
            for index in range(number * 10, number * 10 + 10):
                caption = {"caption": "word " * (index * 101 % 400)}
                tar.write({"__key__": f"{index:02d}", "moments.npy": arrays[index], "cls": index % 2, "json": caption})
        shards.append(ShardRecord(**file_record(path).model_dump(), samples=10))
        records.append(index_shard(path).records)
    assert len(np.unique(np.diff(records[0]["offset"].astype(np.int64)))) > 1
    write_manifest(
        open_folder(tmp_path),
        Manifest(
            name="captioned",
            source="made up",
            autoencoder="none",
            latent_scale=1.0,
            latent_shift=0.0,
            dtype="float32",
            moments_shape=(2, 4, 3, 5),
            num_classes=2,
            label_histogram=(10, 10),
            shards=tuple(shards),
            index=write_index(open_folder(tmp_path), np.concatenate(records)),
        ),
    )
    indices = np.array([19, 3, 3, 0, 10, 11])
    moments, labels = ShardReader(tmp_path).read(indices)
    assert np.array_equal(moments.numpy(), arrays[indices])
    assert labels.tolist() == [1, 1, 1, 0, 0, 1]


def test_reader_opens_a_bounded_number_of_shards(ramp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    monkeypatch.setattr(loader_module, "OPEN_SHARDS", 2)
    reader = ShardReader(ramp)
    before = open_files()
    for _ in range(3):
        assert numbers(reader.read(np.arange(113))[0]) == list(range(113))
        assert open_files() - before <= 2


def test_missing_and_truncated_files_are_named_at_once(tmp_path: Path) -> None:
    write_ramp(tmp_path)
    for name in ("ramp-000004.tar", "index.npy"):
        path = tmp_path / name
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        with pytest.raises(
            DataError, match=rf"{name} must have {len(content):,} bytes .*, found {len(content) - 100:,}"
        ):
            ShardReader(tmp_path)
        path.unlink()
        with pytest.raises(DataError, match=f"{name} must be there, for the manifest lists it"):
            ShardReader(tmp_path)
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"does not exist; prepare one with `python pipelines/prepare_shards.py"):
        ShardReader(tmp_path / "absent")


def test_an_edited_shard_is_named_when_it_is_first_read(tmp_path: Path) -> None:
    write_ramp(tmp_path)
    path = tmp_path / "ramp-000004.tar"
    content = bytearray(path.read_bytes())
    offset = int(index_shard(path).records["offset"][7])
    content[offset] ^= 1
    path.write_bytes(content)

    reader = ShardReader(tmp_path)
    assert numbers(reader.read(np.arange(40))[0]) == list(range(40))
    for _ in range(2):  # the failure must not count as having been checked
        with pytest.raises(DataError, match=r"ramp-000004\.tar must have the sha256 .* it was changed or damaged"):
            reader.read(np.array([40]))

    trusting = ShardReader(tmp_path, verify_checksums=False)
    moments, _ = trusting.read(np.array([46, 47, 48]))
    expected, _ = ShardReader(write_ramp(tmp_path / "whole")).read(np.array([46, 47, 48]))
    assert (moments != expected).flatten(1).any(dim=1).tolist() == [False, True, False]


def test_an_edited_index_is_refused(tmp_path: Path) -> None:
    write_ramp(tmp_path)
    path = tmp_path / "index.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"index\.npy must have the sha256"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (np.zeros(3), r"must hold 113 records of .*, found \(3,\) of float64"),
        (np.array([{"pickle": 1}]), "must be an npy file .*Python objects"),
    ],
)
def test_an_index_of_something_else_is_refused(tmp_path: Path, records: np.ndarray, reason: str) -> None:
    write_ramp(tmp_path)
    np.save(tmp_path / "index.npy", records)
    register_index(tmp_path)
    with pytest.raises(DataError, match=reason):
        ShardReader(tmp_path)


@pytest.mark.parametrize("offset", [10**6, 2**63, 2**63 - 16, 2**64 - 16, 2**64 - 1])
def test_an_index_that_points_past_its_shard_is_refused(tmp_path: Path, offset: int) -> None:
    write_ramp(tmp_path)
    records = np.load(tmp_path / "index.npy")
    records["offset"][25] = offset
    np.save(tmp_path / "index.npy", records)
    register_index(tmp_path)
    with pytest.raises(DataError, match=r"ramp-000002\.tar, but points past its end"):
        ShardReader(tmp_path)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (-1, r"must lie in \[0, 5\) .* found -1 to 4"),
        (5, r"must lie in \[0, 5\) .* found 0 to 5"),  # the null label
        (2**31 - 1, r"must lie in \[0, 5\)"),
        (4, "must add up to the manifest's histogram"),
    ],
)
def test_an_index_with_other_classes_than_the_manifest_is_refused(tmp_path: Path, label: int, reason: str) -> None:
    write_ramp(tmp_path)
    records = np.load(tmp_path / "index.npy")
    records["label"][0] = label
    np.save(tmp_path / "index.npy", records)
    register_index(tmp_path)
    for read in (ShardReader, verify_shards):
        with pytest.raises(DataError, match=reason):
            read(tmp_path)


def test_an_index_that_ends_early_is_refused(tmp_path: Path) -> None:
    write_ramp(tmp_path)
    (tmp_path / "index.npy").write_bytes((tmp_path / "index.npy").read_bytes()[:-12])
    register_index(tmp_path)
    with pytest.raises(DataError, match=r"index\.npy must hold 113 records, but ends before"):
        ShardReader(tmp_path)


def register_index(directory: Path) -> None:
    """Make the manifest vouch for the index as it is."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["index"] = file_record(directory / "index.npy").model_dump()
    (directory / "manifest.json").write_text(json.dumps(manifest))


# --- loader ---


@pytest.mark.parametrize("global_batch", [30, 31, 7, 3])
def test_any_number_of_ranks_reads_the_same_global_batches(ramp: Path, global_batch: int) -> None:
    def global_batches(world: int) -> list[tuple[list[int], list[int], list[int]]]:
        loaders = [ramp_loader(ramp, global_batch, rank, world) for rank in range(world)]
        result = []
        for step in range(12):
            parts = [loader.batch(step) for loader in loaders]
            positions = [position for part in parts for position in part.positions.tolist()]
            samples = [number for part in parts for number in numbers(part.moments)]
            result.append((positions, samples, [label for part in parts for label in part.labels.tolist()]))
        return result

    alone = global_batches(1)
    assert [positions for positions, _, _ in alone] == np.arange(12 * global_batch).reshape(12, -1).tolist()
    for _, samples, labels in alone:
        assert labels == [sample % 5 for sample in samples]
    for world in (2, 3, 5):
        assert global_batches(world) == alone


def test_every_epoch_reads_every_sample_once_whatever_the_batch(ramp: Path) -> None:
    loader = ramp_loader(ramp, global_batch=20)
    samples = [number for batch in loader.batches(0, 17) for number in numbers(batch.moments)]
    for epoch in range(3):
        assert sorted(samples[epoch * 113 : (epoch + 1) * 113]) == list(range(113))


def sample_ids(directory: Path, world: int, workers: int, steps: range) -> list[int]:
    """What all ranks read together, in the order of the positions."""
    reader = ShardReader(directory)
    order = SampleOrder(reader.shard_sizes, seed=5, window_shards=3)
    ranks = [
        Loader(reader, order, global_batch=19, rank=rank, world=world, workers=workers).batches(steps.start, steps.stop)
        for rank in range(world)
    ]
    return [number for parts in zip(*ranks, strict=True) for part in parts for number in numbers(part.moments)]


def test_three_epochs_are_the_same_for_any_world_and_any_workers(ramp: Path) -> None:
    steps = range(18)  # 342 positions: three epochs of 113, and a rest
    alone = sample_ids(ramp, world=1, workers=0, steps=steps)
    for epoch in range(3):
        assert sorted(alone[epoch * 113 : (epoch + 1) * 113]) == list(range(113))
    for world in (1, 2, 3, 4, 8):
        for workers in (0, 1, 2, 5):
            assert sample_ids(ramp, world, workers, steps) == alone, (world, workers)


@given(st.integers(0, 18), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([0, 1, 2, 5]))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resumed_anywhere_with_any_world_and_workers_is_exactly_the_rest(
    ramp: Path, first: int, world: int, workers: int
) -> None:
    order = SampleOrder([10] * 11 + [3], seed=5, window_shards=3)
    rest = order.samples(np.arange(first * 19, 18 * 19))[1].tolist()
    assert sample_ids(ramp, world, workers, range(first, 18)) == rest


def test_a_window_opens_no_more_than_its_shards(ramp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original = ShardReader._map
    monkeypatch.setattr(ShardReader, "_map", lambda self, shard: opened.append(shard) or original(self, shard))
    reader = ShardReader(ramp)
    order = SampleOrder(reader.shard_sizes, seed=5, window_shards=3)
    loader = Loader(reader, order, global_batch=10, rank=0, world=1, workers=0)
    for step, _ in enumerate(loader.batches(0, 11)):
        windows_reached = step * 10 // 23 + 1  # a window holds 23 samples or more
        assert len(opened) <= 3 * (windows_reached + 1)
    assert sorted(set(opened[:12])) == list(range(12))


def test_joined_data_sets_read_as_one(tmp_path: Path, ramp: Path) -> None:
    other = tmp_path / "float32"
    write_shards(other, "ramp", Ramp(), IdentityAutoencoder(), samples_per_shard=40, dtype="float32")
    readers = [ShardReader(ramp), ShardReader(other)]
    joined = JoinedReader(readers)
    indices = np.random.default_rng(0).permutation(226)
    moments = np.empty((226, *joined.manifest.moments_shape), joined.dtype)
    labels = joined.read_into(moments, indices)
    assert numbers(torch.from_numpy(moments)) == (indices % 113).tolist()
    assert labels.tolist() == (indices % 113 % 5).tolist()
    assert joined.dtype == np.float32
    joined.prefetch([13, 0])
    digits_shards(tmp_path / "digits")
    digits = ShardReader(tmp_path / "digits")
    with pytest.raises(DataError, match=r"must have one moments_shape, received .*\(1, 2, 8, 8\)"):
        JoinedReader([readers[0], digits])


def test_data_sets_that_are_mixed_share_the_descriptors(
    tmp_path: Path, ramp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "OPEN_SHARDS", 6)
    readers = [ShardReader(ramp) for _ in range(3)]
    order = MixedOrder([SampleOrder(reader.shard_sizes, 0, 12) for reader in readers], [1.0] * 3, 0)
    loader = Loader(JoinedReader(readers), order, global_batch=100, rank=0, world=1, workers=0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in loader.batches(0, 10):
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= 6 + len(readers) * loader_module.OPENERS
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= 6
    with pytest.raises(DataError, match="At most 6 data sets can be mixed, received 7; merge some"):
        JoinedReader([ShardReader(ramp)] * 7)


def test_without_a_device_half_precision_is_cast_where_it_is_read(ramp: Path) -> None:
    batch, reader = ramp_loader(ramp, global_batch=8).batch(0), ShardReader(ramp)
    assert batch.moments.dtype == torch.float32
    assert batch.to(torch.device("cpu")).moments is batch.moments  # the training thread has nothing left to do
    stored = torch.empty(batch.moments.shape, dtype=torch.float16)
    _, indices = SampleOrder(reader.shard_sizes, seed=5, window_shards=3).samples(batch.positions.numpy())
    reader.read_into(stored.numpy(), indices)
    assert torch.equal(batch.moments, stored.float())


def equal(batches: list[Batch], others: list[Batch]) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(a.positions, b.positions) and torch.equal(a.moments, b.moments) and torch.equal(a.labels, b.labels)
        for a, b in zip(batches, others, strict=True)
    )


def test_resumed_anywhere_with_any_world_is_the_rest(ramp: Path) -> None:
    whole = list(ramp_loader(ramp, global_batch=20).batches(0, 15))
    for first in range(16):
        assert equal(list(ramp_loader(ramp, global_batch=20).batches(first, 15)), whole[first:])
        parts = [list(ramp_loader(ramp, 20, rank, world=3).batches(first, 15)) for rank in range(3)]
        assert torch.equal(
            torch.cat([part.positions for step in zip(*parts, strict=True) for part in step] or [torch.arange(0)]),
            torch.arange(first * 20, 300),
        )


def test_prefetched_batches_are_those_asked_for_directly(ramp: Path) -> None:
    loader = ramp_loader(ramp, global_batch=13)
    assert equal(list(loader.batches(4, 30)), [loader.batch(step) for step in range(4, 30)])
    assert list(loader.batches(4, 4)) == []


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_batches_are_made_ahead_and_the_thread_ends_with_the_iterator(ramp: Path) -> None:
    made: list[int] = []

    class Watched(Loader):
        def batch(self, step: int) -> Batch:
            made.append(step)
            return super().batch(step)

    reader = ShardReader(ramp)
    order = SampleOrder(reader.shard_sizes, seed=5, window_shards=3)
    batches = Watched(reader, order, global_batch=10, rank=0, world=1).batches(0, 1000)
    next(batches)
    assert loader_threads()
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert loader_threads() == []
    assert made[0] == 0
    assert len(made) <= 1 + PREFETCH


def test_a_shard_that_cannot_be_read_ends_the_batches_at_its_step(tmp_path: Path) -> None:
    loader = ramp_loader(write_ramp(tmp_path), global_batch=10)
    order = SampleOrder([10] * 11 + [3], seed=5, window_shards=3)
    last_shard = int(order.samples(np.arange(113))[1][-1]) // 10
    path = tmp_path / f"ramp-{last_shard:06d}.tar"
    bad_step = min(step for step in range(12) if last_shard in order.samples(np.arange(113))[1][step * 10 :][:10] // 10)
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    batches = loader.batches(0, 12)
    read = [next(batches) for _ in range(bad_step)]
    with pytest.raises(DataError, match=path.name):
        next(batches)
    assert len(read) > PREFETCH
    assert loader_threads() == []


@pytest.mark.gpu
def test_pinned_batches(ramp: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    reader = ShardReader(ramp)
    order = SampleOrder(reader.shard_sizes, seed=5, window_shards=3)
    loader = Loader(reader, order, global_batch=8, rank=0, world=1, pin_memory=True)
    for batch in loader.batches(0, 3):
        assert batch.positions.is_pinned()
        assert batch.moments.is_pinned()
        assert batch.labels.is_pinned()
