"""One shard: a range of a source's images in, the bytes of a tar out.

The unit of work of a preparation. Who does it, where and when decides none of its bytes.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from webdataset.writer import TarWriter

from eqm_dist.data.index import SKIPPED_NAME, SOURCE_NAME, ShardIndex, are_moments, index_shard
from eqm_dist.data.manifest import MomentsDtype
from eqm_dist.data.sources.image import ImageSource, LabelledImage, SkippedImage
from eqm_dist.errors import DataError
from eqm_dist.models.autoencoder import Autoencoder
from eqm_dist.storage.files import atomic_write

ENCODE_BATCH = 64
"""Images encoded at once. Part of what decides a shard's bytes: sums on a GPU may depend on it."""


@dataclass(frozen=True)
class ShardTask:
    """A shard that is to be written: the images [start, stop) of the source, into ``path``."""

    path: Path
    start: int
    stop: int

    def __str__(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class ShardWriter:
    """Everything that decides the bytes of shards, but for their ranges. Pickles, so that others can do the work."""

    source: ImageSource
    autoencoder: Autoencoder
    dtype: MomentsDtype
    mirror: bool

    def write(self, task: ShardTask, device: torch.device) -> ShardIndex:
        """Encode on ``device`` and write the tar, whole or not at all.

        Raises:
            DataError: the images differ in size, or a moment does not fit into ``dtype``.
            StorageError: an image cannot be read or the tar cannot be written.
        """
        atomic_write(task.path, self._encode(task, device))
        return check_shard(task, self.dtype)

    def _encode(self, task: ShardTask, device: torch.device) -> memoryview:
        content = io.BytesIO()
        skipped: list[SkippedImage] = []
        digests: list[str | None] = []
        with TarWriter(content, user="", group="", mtime=0) as tar:
            first: LabelledImage | None = None
            for batch in self._batches(task):
                digests += [item.stored for item in batch]
                skipped += [item for item in batch if isinstance(item, SkippedImage)]
                samples = [item for item in batch if isinstance(item, LabelledImage)]
                if not samples:
                    continue
                first = first or samples[0]
                images = _stack(samples, first).to(device)
                views = [images, images.flip(2)] if self.mirror else [images]
                moments = torch.stack([self.autoencoder.encode(view) for view in views], dim=1).cpu().numpy()
                for sample, stored in zip(samples, _store(moments, samples, self.dtype), strict=True):
                    tar.write({"__key__": sample.key, "moments.npy": stored, "cls": sample.label})
            # Into the shard itself, so that a shard and what is said of it are there together or not at all.
            if skipped:
                listed = json.dumps([image.listed() for image in skipped])
                _add_member(tar.tarstream, SKIPPED_NAME, listed.encode())
            if (source := join_stored(digests)) is not None:
                _add_member(tar.tarstream, SOURCE_NAME, source.encode())
        return content.getbuffer()

    def _batches(self, task: ShardTask) -> Iterator[list[LabelledImage | SkippedImage]]:
        """The images of a shard; the next batch is read and decoded while one is encoded."""
        ranges = [(first, min(first + ENCODE_BATCH, task.stop)) for first in range(task.start, task.stop, ENCODE_BATCH)]
        with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:
            coming = thread.submit(self._read, *ranges[0])
            for following in [*ranges[1:], None]:
                batch = coming.result()
                if following is not None:
                    coming = thread.submit(self._read, *following)
                yield batch

    def _read(self, start: int, stop: int) -> list[LabelledImage | SkippedImage]:
        return list(self.source.read(start, stop))


def check_shard(task: ShardTask, dtype: MomentsDtype) -> ShardIndex:
    """The index of a shard that was written, now or before.

    Raises:
        DataError: it does not hold what the task asks for.
        StorageError: it cannot be read.
    """
    index = index_shard(task.path)
    samples, images = len(index.records), task.stop - task.start
    if samples + len(index.skipped) != images or (samples and index.dtype != np.dtype(dtype)):
        raise DataError(
            f"{task.path} must hold {images} samples of {dtype}, found {samples} of {index.dtype} and "
            f"{len(index.skipped)} skipped images; delete it and prepare the data set again."
        )
    return index


def _stack(samples: list[LabelledImage], first: LabelledImage) -> torch.Tensor:
    """Images [B, H, W, C], uint8, of the size of the shard's first."""
    other = next((sample for sample in samples if sample.image.shape != first.image.shape), None)
    if other is not None:
        raise DataError(
            f"All images must have one size, but {first.key} has {first.image.shape} and {other.key} "
            f"{other.image.shape}; give --resolution."
        )
    return torch.from_numpy(np.stack([sample.image for sample in samples]))


def _store(moments: np.ndarray, samples: list[LabelledImage], dtype: MomentsDtype) -> np.ndarray:
    """Moments [B, V, 2C, H, W] in the stored dtype.

    Raises:
        DataError: they are no moments there.
    """
    with np.errstate(over="ignore"):
        stored = moments.astype(dtype)
    good = are_moments(stored)
    if not good.all():
        sample = samples[int(np.argmin(good.all(axis=(1, 2, 3, 4))))]
        raise DataError(f"Moments must be finite in {dtype}, but those of {sample.key} are not; store them in float32.")
    return stored


def join_stored(stored: Iterable[str | None]) -> str | None:
    """sha256 of those of the stored images, or None where a source stores none."""
    digest = hashlib.sha256()
    for each in stored:
        if each is None:
            return None
        digest.update(each.encode())
    return digest.hexdigest()


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
