"""From positions to batches: reads samples by their byte offsets and keeps a few batches ready."""

import math
import mmap
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from eqm_dist.data.index import read_index
from eqm_dist.data.manifest import check_checksum, check_size, read_manifest
from eqm_dist.data.order import SampleOrder, rank_range
from eqm_dist.data.storage import local_path, storage_errors
from eqm_dist.errors import DataError

OPEN_SHARDS = 256
"""Shards mapped at once. Each holds a file descriptor, of which a process may often have only 1,024."""
PREFETCH = 3
"""Batches made ahead of the one in use."""


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one step."""

    positions: Tensor
    """[n], int64: the positions in the order, which key all randomness of a sample."""
    moments: Tensor
    """[n, V, 2C, H, W], float32."""
    labels: Tensor
    """[n], int64."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``; the copy overlaps with computation if the batch is in page-locked memory."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def split(self, parts: int) -> list["Batch"]:
        """``parts`` consecutive batches whose sizes differ by at most one."""
        return [Batch(*tensors) for tensors in zip(*(t.tensor_split(parts) for t in self._tensors()), strict=True)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.positions, self.moments, self.labels


class ShardReader:
    """Reads samples of a data set by their indices. Safe to use from several threads.

    Args:
        directory: of a manifest, its index and its shards.
        verify_checksums: compare the index now, and each shard when it is first opened, with the manifest.

    Raises:
        DataError: the data set, its index or a shard is missing, truncated or damaged.
        StorageError: the machine cannot read it.
    """

    def __init__(self, directory: str | Path, *, verify_checksums: bool = True) -> None:
        self._directory = local_path(directory)
        self._verify_checksums = verify_checksums
        self.manifest = read_manifest(self._directory)
        for record in self.manifest.shards:
            check_size(self._directory / record.name, record)
        self._index = read_index(self._directory, self.manifest, verify_checksum=verify_checksums)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._first_sample = np.cumsum([0, *self.shard_sizes])
        self._verified: set[int] = set()
        self._opening = Lock()
        self._mapped = lru_cache(maxsize=OPEN_SHARDS)(self._map)

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

    def read(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Sample indices [n], int64, in any order -> moments [n, V, 2C, H, W], float32, and labels [n], int64.

        Raises:
            DataError: a shard was changed after its manifest was written.
            StorageError: a shard cannot be read.
        """
        moments = np.empty((len(indices), *self.manifest.moments_shape), np.float32)
        shards = np.searchsorted(self._first_sample, indices, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            moments[rows] = self._open(int(shard)).gather(indices[rows] - self._first_sample[shard])
        return torch.from_numpy(moments), torch.from_numpy(self._index["label"][indices].astype(np.int64))

    def _open(self, shard: int) -> "_MappedShard":
        with self._opening:
            return self._mapped(shard)

    def _map(self, shard: int) -> "_MappedShard":
        record = self.manifest.shards[shard]
        path = self._directory / record.name
        check_size(path, record)
        with storage_errors("read", path), open(path, "rb") as file:
            if self._verify_checksums and shard not in self._verified:
                check_checksum(file, path, record)
                self._verified.add(shard)
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = self._index["offset"][self._first_sample[shard] : self._first_sample[shard + 1]].astype(np.int64)
        record_bytes = math.prod(self.manifest.moments_shape) * self._dtype.itemsize
        if offsets.min() < 0 or offsets.max() + record_bytes > len(content):
            raise DataError(f"The index must point into {path}, but points past its end; prepare the data set again.")
        return _MappedShard(content, offsets, self.manifest.moments_shape, self._dtype)


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
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.
    """

    def __init__(
        self,
        reader: ShardReader,
        order: SampleOrder,
        *,
        global_batch: int,
        rank: int,
        world: int,
        pin_memory: bool = False,
    ) -> None:
        self._reader = reader
        self._order = order
        self._global_batch = global_batch
        self._rank = rank
        self._world = world
        self._pin_memory = pin_memory

    def batch(self, step: int) -> Batch:
        """This rank's samples of step ``step``.

        Raises:
            DataError, StorageError: see ``ShardReader.read``.
        """
        start = step * self._global_batch
        positions = np.arange(*rank_range(start, start + self._global_batch, self._rank, self._world), dtype=np.int64)
        _, indices = self._order.samples(positions)
        tensors = (torch.from_numpy(positions), *self._reader.read(indices))
        return Batch(*(tensor.pin_memory() if self._pin_memory else tensor for tensor in tensors))

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """The batches of the steps [first_step, last_step), made ahead of need in a background thread.

        Closing the iterator ends the thread.

        Raises:
            DataError, StorageError: see ``ShardReader.read``; at the step that cannot be read.
        """
        steps = iter(range(first_step, last_step))
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        try:
            pending = deque(thread.submit(self.batch, step) for step in islice(steps, PREFETCH))
            while pending:
                batch = pending.popleft().result()
                pending.extend(thread.submit(self.batch, step) for step in islice(steps, 1))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)
