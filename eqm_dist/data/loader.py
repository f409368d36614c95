"""From positions to batches: reads samples by their byte offsets and keeps a few batches ready."""

import mmap
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from eqm_dist.data.cache import FileCache
from eqm_dist.data.index import map_index, read_index
from eqm_dist.data.manifest import check_bytes, check_checksum, check_size, read_manifest
from eqm_dist.data.order import MixedOrder, SampleOrder, rank_range
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.location import is_remote
from eqm_dist.storage.open import open_folder

OPEN_SHARDS = 256
"""Shards that a process maps at once. Each holds a file descriptor, of which it may often have only 1,024."""
OPENERS = 4
"""Shards fetched or verified at once."""
PREFETCH = 3
"""Batches made ahead of the one in use, at least."""


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one step."""

    positions: Tensor
    """[n], int64: the positions in the order, which key all randomness of a sample."""
    moments: Tensor
    """[n, V, 2C, H, W]; in page-locked memory in the stored dtype, which ``to`` makes float32 on the device: half the
    bytes to copy. Otherwise float32 already, by the threads that read them."""
    labels: Tensor
    """[n], int64."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``; the copy overlaps with computation if the batch is in page-locked memory."""
        positions, moments, labels = (tensor.to(device, non_blocking=True) for tensor in self._tensors())
        return Batch(positions, moments.float(), labels)

    def split(self, parts: int) -> list["Batch"]:
        """``parts`` consecutive batches whose sizes differ by at most one."""
        return [Batch(*tensors) for tensors in zip(*(t.tensor_split(parts) for t in self._tensors()), strict=True)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.positions, self.moments, self.labels


class ShardReader:
    """Reads samples of a data set by their indices. Safe to use from several threads.

    Args:
        location: directory or s3:// prefix of a manifest, its index and its shards.
        verify_checksums: compare the index now, and each shard when it is first opened, with the manifest. What comes
            from S3 is always compared when it arrives.
        cache: where files from S3 are kept; needed for s3:// and unused otherwise.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: the data set, its index or a shard is missing, truncated or damaged.
        StorageError: the machine cannot read it.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        verify_checksums: bool = True,
        cache: FileCache | None = None,
        deadline_s: float | None = None,
    ) -> None:
        self._folder = open_folder(location, deadline_s=deadline_s)
        self.remote = is_remote(location)
        self._cache = cache if self.remote else None
        if self.remote and cache is None:
            raise DataError(f"Shards on S3 are read through a cache, received none for {location}; pass cache=.")
        self._verify_checksums = verify_checksums
        self.manifest = read_manifest(self._folder)
        self._index = self._open_index()
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._first_sample = np.cumsum([0, *self.shard_sizes])
        self._verified: set[int] = set()
        self._openers = ThreadPoolExecutor(OPENERS, thread_name_prefix="shards")
        self._shards: OrderedDict[int, Future[_MappedShard]] = OrderedDict()
        self._lock = Lock()
        self._open_shards: int | None = None

    def share_descriptors(self, readers: int) -> None:
        """Map no more than this reader's part of ``OPEN_SHARDS``, for there are so many readers."""
        self._open_shards = max(1, OPEN_SHARDS // readers)

    @property
    def _most_shards(self) -> int:
        return OPEN_SHARDS if self._open_shards is None else self._open_shards

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each shard, in manifest order: what ``SampleOrder`` permutes."""
        return [shard.samples for shard in self.manifest.shards]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents."""
        return self.manifest.latent_shape

    @property
    def num_classes(self) -> int:
        """Number of classes; labels lie in [0, num_classes)."""
        return self.manifest.num_classes

    @property
    def dtype(self) -> np.dtype:
        """Of the stored moments."""
        return self._dtype

    def largest_bytes(self, count: int) -> int:
        """Bytes of the ``count`` largest shards together."""
        return sum(sorted((shard.bytes for shard in self.manifest.shards), reverse=True)[:count])

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Sample indices [n], int64, in any order -> moments [n, V, 2C, H, W], float32, and labels [n], int64.

        Raises:
            DataError: a shard was changed after its manifest was written.
            StorageError: a shard cannot be read.
        """
        moments = np.empty((len(indices), *self.manifest.moments_shape), self._dtype)
        labels = self.read_into(moments, indices)
        return torch.from_numpy(moments).float(), labels

    def read_into(self, moments: np.ndarray, indices: np.ndarray) -> Tensor:
        """As ``read``, but the moments go into an array [n, V, 2C, H, W] of any dtype; returns the labels."""
        shards = np.searchsorted(self._first_sample, indices, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            moments[rows] = self._open(int(shard)).result().gather(indices[rows] - self._first_sample[shard])
        return torch.from_numpy(self._index["label"][indices].astype(np.int64))

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to fetch, verify and map shards that will be read soon, the first ones first."""
        for shard in islice(shards, self._most_shards):
            self._open(shard)

    def stop_prefetch(self) -> None:
        """Forget the shards whose turn to be fetched has not come."""
        with self._lock:
            for future in self._shards.values():
                future.cancel()

    def _open(self, shard: int) -> "Future[_MappedShard]":
        with self._lock:
            future = self._shards.get(shard)
            # A shard that failed when it was prefetched gets another chance when it is read.
            if future is None or future.cancelled() or (future.done() and future.exception()):
                future = self._shards[shard] = self._openers.submit(self._map, shard)
            self._shards.move_to_end(shard)
            while len(self._shards) > self._most_shards:
                self._shards.popitem(last=False)
            return future

    def _open_index(self) -> np.ndarray:
        manifest, folder = self.manifest, self._folder
        if self._cache is None:
            directory = Path(folder.url)
            for record in manifest.shards:
                check_size(directory / record.name, record)
            return read_index(folder, manifest, verify_checksum=self._verify_checksums)
        found = folder.list()
        for record in (*manifest.shards, manifest.index):
            check_bytes(f"{folder.url}/{record.name}", found.get(record.name), record)
        path = f"{folder.url}/{manifest.index.name}"
        with self._cache.open(folder, manifest.index) as file, storage_errors("read", path):
            return map_index(file, path, manifest)

    def _map(self, shard: int) -> "_MappedShard":
        content = self._content(shard)
        # The index was compared with the sizes of the shards when it was opened, and the map has the size of its shard.
        check_bytes(f"{self._folder.url}/{self.manifest.shards[shard].name}", len(content), self.manifest.shards[shard])
        offsets = self._index["offset"][self._first_sample[shard] : self._first_sample[shard + 1]].astype(np.int64)
        return _MappedShard(content, offsets, self.manifest.moments_shape, self._dtype)

    def _content(self, shard: int) -> mmap.mmap:
        record = self.manifest.shards[shard]
        if self._cache is not None:
            with self._cache.open(self._folder, record) as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        path = Path(self._folder.url) / record.name
        check_size(path, record)
        with storage_errors("read", path), open(path, "rb") as file:
            if self._verify_checksums and shard not in self._verified:
                check_checksum(file, path, record)
                self._verified.add(shard)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class JoinedReader:
    """Several data sets as one: samples and shards are numbered through, as in ``MixedOrder``.

    Args:
        readers: of data sets of one shape, autoencoder and set of classes; they share ``OPEN_SHARDS``.

    Raises:
        DataError: they differ in what a batch must have in common, or are too many.
    """

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self._readers = list(readers)
        if len(readers) > OPEN_SHARDS:
            raise DataError(f"At most {OPEN_SHARDS} data sets can be mixed, received {len(readers)}; merge some.")
        for reader in readers:
            reader.share_descriptors(len(readers))
        self.manifest = readers[0].manifest
        """The first one's; what it says of the moments holds for all."""
        for name in ("moments_shape", "num_classes", "autoencoder", "latent_scale", "latent_shift"):
            values = [getattr(reader.manifest, name) for reader in readers]
            if len(set(values)) > 1:
                raise DataError(
                    f"Data sets that are mixed must have one {name}, received {values}; prepare them alike."
                )
        self.dtype = np.result_type(*(reader.dtype for reader in readers))
        self._first_sample = np.cumsum([0, *(reader.manifest.num_samples for reader in readers)])
        self._first_shard = np.cumsum([0, *(len(reader.manifest.shards) for reader in readers)])

    def read_into(self, moments: np.ndarray, indices: np.ndarray) -> Tensor:
        """See ``ShardReader``."""
        labels = torch.empty(len(indices), dtype=torch.int64)
        sets = np.searchsorted(self._first_sample, indices, side="right") - 1
        for number in np.unique(sets):
            rows = np.flatnonzero(sets == number)
            part = np.empty((len(rows), *moments.shape[1:]), self._readers[number].dtype)
            labels[rows] = self._readers[number].read_into(part, indices[rows] - self._first_sample[number])
            moments[rows] = part
        return labels

    def prefetch(self, shards: Iterable[int]) -> None:
        """See ``ShardReader``."""
        numbers = np.fromiter(shards, np.int64)
        sets = np.searchsorted(self._first_shard, numbers, side="right") - 1
        for number in np.unique(sets):
            self._readers[number].prefetch((numbers[sets == number] - self._first_shard[number]).tolist())

    def stop_prefetch(self) -> None:
        """See ``ShardReader``."""
        for reader in self._readers:
            reader.stop_prefetch()


class _MappedShard:
    """A shard as a memory map. Where its samples lie at equal distances, reading any number of them is one gather."""

    def __init__(
        self, content: mmap.mmap, offsets: np.ndarray, moments_shape: tuple[int, ...], dtype: np.dtype
    ) -> None:
        self._content = content
        self._offsets = offsets
        self._shape = moments_shape
        self._dtype = dtype
        self._records: np.ndarray | None = None
        distances = np.unique(np.diff(offsets))
        if len(distances) == 1 and distances[0] > 0:
            strides = (int(distances[0]), *self._sample(0).strides)
            self._records = np.ndarray((len(offsets), *moments_shape), dtype, content, int(offsets[0]), strides)

    def gather(self, samples: np.ndarray) -> np.ndarray:
        """Sample numbers in this shard [n] -> moments [n, V, 2C, H, W] in the stored dtype."""
        if self._records is not None:
            return self._records[samples]
        return np.stack([self._sample(sample) for sample in samples])

    def _sample(self, sample: int) -> np.ndarray:
        return np.ndarray(self._shape, self._dtype, self._content, int(self._offsets[sample]))


class Loader:
    """The batches of one rank: in step k its part of the positions [k * global_batch, (k + 1) * global_batch).

    Args:
        reader: where samples are read.
        order: which sample comes at which position; of the reader's shard sizes.
        global_batch: samples of one step on all ranks together; need not be divisible.
        rank, world: this worker's number, and how many there are.
        workers: threads that make batches ahead of need; with 0 each is made when it is asked for. Changes no sample.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        reader: ShardReader | JoinedReader,
        order: SampleOrder | MixedOrder,
        *,
        global_batch: int,
        rank: int,
        world: int,
        workers: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self._reader = reader
        self._order = order
        self._global_batch = global_batch
        self._rank = rank
        self._world = world
        self._workers = workers
        self._pin_memory = pin_memory
        self._upcoming: list[int] = []

    def batch(self, step: int) -> Batch:
        """This rank's samples of step ``step``.

        Raises:
            DataError, StorageError: see ``ShardReader.read``.
        """
        positions = np.arange(*self._range(step), dtype=np.int64)
        _, indices = self._order.samples(positions)
        shape = (len(indices), *self._reader.manifest.moments_shape)
        dtype = torch.from_numpy(np.empty(0, self._reader.dtype)).dtype
        moments = torch.empty(shape, dtype=dtype, pin_memory=self._pin_memory)
        labels = self._reader.read_into(moments.numpy(), indices)
        if self._pin_memory:
            return Batch(torch.from_numpy(positions).pin_memory(), moments, labels.pin_memory())
        return Batch(torch.from_numpy(positions), moments.float(), labels)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of the steps [first_step, last_step), made ahead of need in background threads.

        Closing the iterator ends the threads.

        Raises:
            DataError, StorageError: see ``ShardReader.read``; at the step that cannot be read.
        """
        steps = iter(range(first_step, last_step))
        try:
            if self._workers == 0:
                for step in steps:
                    self._prefetch(step)
                    yield self.batch(step)
            else:
                with ThreadPoolExecutor(self._workers, thread_name_prefix="loader") as threads:
                    yield from self._ahead(threads, steps)
        finally:
            self._reader.stop_prefetch()

    def _ahead(self, threads: ThreadPoolExecutor, steps: Iterator[int]) -> Iterator[Batch]:
        pending: deque[Future[Batch]] = deque()

        def submit(count: int) -> None:
            for step in islice(steps, count):
                self._prefetch(step)
                pending.append(threads.submit(self.batch, step))

        try:
            submit(max(PREFETCH, self._workers))
            while pending:
                batch = pending.popleft().result()
                submit(1)
                yield batch
        finally:
            for future in pending:
                future.cancel()

    def _prefetch(self, step: int) -> None:
        """Have the shards of this window and the next one at hand."""
        upcoming = self._order.upcoming_shards(self._range(step)[0])
        if upcoming != self._upcoming:
            self._upcoming = upcoming
            self._reader.prefetch(upcoming)

    def _range(self, step: int) -> tuple[int, int]:
        start = step * self._global_batch
        return rank_range(start, start + self._global_batch, self._rank, self._world)
