"""Writing shards: images in, a directory of plain WebDataset tars with index and manifest out.

Shard k holds the images [k * samples_per_shard, (k + 1) * samples_per_shard) of the source, and nothing else decides
its bytes. So a shard is either there and whole or is written again, and a preparation that was killed goes on where
it was: the request comes first, then the tars, each whole at once, then the index, the manifest last.
"""

import fcntl
import io
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.writer import TarWriter

from eqm_dist.data.index import ShardIndex, index_shard, write_index
from eqm_dist.data.manifest import (
    MANIFEST_NAME,
    VERSION,
    Manifest,
    MomentsDtype,
    ShardRecord,
    check_checksum,
    file_record,
    read_manifest,
    write_manifest,
)
from eqm_dist.data.sources import Digits, ImageSource, LabelledImage
from eqm_dist.data.storage import atomic_write, local_path, remove_leftovers, storage_errors
from eqm_dist.errors import DataError
from eqm_dist.models.autoencoder import Autoencoder, IdentityAutoencoder

REQUEST_NAME = "preparation.json"
ENCODE_BATCH = 64
"""Images encoded at once. Part of what decides a shard's bytes: sums on a GPU may depend on it."""

logger = logging.getLogger(__name__)


def digits_shards(directory: str | Path) -> Manifest:
    """The embedded data set as shards, written at first use: 1,797 digits in 8 shards, the last of them short.

    Any number of processes may ask at once: one writes, the others wait for it.

    Raises:
        DataError: ``directory`` holds another data set.
        StorageError: the shards cannot be written.
    """
    return write_shards(directory, "digits", Digits(), IdentityAutoencoder(), samples_per_shard=256, dtype="float32")


def write_shards(
    directory: str | Path,
    name: str,
    source: ImageSource,
    autoencoder: Autoencoder,
    *,
    samples_per_shard: int,
    dtype: MomentsDtype,
    mirror: bool = False,
) -> Manifest:
    """Encode all images of ``source`` into the shards DIR/NAME-000000.tar, ...; goes on where a killed one stopped.

    Args:
        directory: made if absent. It belongs to one data set.
        name: first part of the shards' names.
        source: the images.
        autoencoder: images -> moments [2C, H, W].
        samples_per_shard: of all shards but the last.
        dtype: in which moments are stored.
        mirror: store the moments of the mirrored image too (V = 2).

    Returns:
        The manifest; at once if all is there already.

    Raises:
        DataError: ``directory`` holds another data set or a damaged shard, or a moment does not fit into ``dtype``.
        StorageError: the shards cannot be written. What was finished stays.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard must be at least 1, received {samples_per_shard}.")
    directory = local_path(directory)
    request = {
        "version": VERSION,
        "name": name,
        "source": source.id,
        "samples": len(source),
        "autoencoder": autoencoder.id,
        "latent_scale": autoencoder.latent_scale,
        "latent_shift": autoencoder.latent_shift,
        "samples_per_shard": samples_per_shard,
        "dtype": dtype,
        "mirror": mirror,
    }
    with storage_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    if _finished(directory, request):
        return read_manifest(directory)
    with _alone_in(directory):
        if _finished(directory, request):  # by another process, while this one waited
            return read_manifest(directory)
        _claim(directory, request)
        remove_leftovers(directory)
        _check_recorded(directory)
        parts = {
            directory / f"{name}-{number:06d}.tar": (start, min(start + samples_per_shard, len(source)))
            for number, start in enumerate(range(0, len(source), samples_per_shard))
        }
        progress = _Progress(len(source))
        for path, (start, stop) in parts.items():
            if not path.exists():
                atomic_write(path, _encode_shard(source, start, stop, autoencoder, dtype, mirror))
                progress.log(path, start, stop)
        shards = [(path, _index_part(path, stop - start, dtype)) for path, (start, stop) in parts.items()]
        return _write_manifest(directory, request, source.num_classes, shards)


def _finished(directory: Path, request: dict[str, Any]) -> bool:
    """Whether the requested data set is there with all its files; what is missing is written again."""
    if not (directory / MANIFEST_NAME).exists():
        return False
    _check_request(directory, request)
    manifest = read_manifest(directory)
    return all((directory / record.name).exists() for record in (*manifest.shards, manifest.index))


def _claim(directory: Path, request: dict[str, Any]) -> None:
    """Write down what this directory is for, or see that it is for this.

    Raises:
        DataError: it holds another data set.
    """
    if (directory / REQUEST_NAME).exists():
        _check_request(directory, request)
    elif any(directory.glob("*.tar")):
        raise DataError(f"Shards must go into a directory of their own, but {directory} holds tars; choose another.")
    else:
        atomic_write(directory / REQUEST_NAME, (json.dumps(request, indent=1) + "\n").encode())


def _check_request(directory: Path, request: dict[str, Any]) -> None:
    path = directory / REQUEST_NAME
    try:
        with storage_errors("read", path):
            found = json.loads(path.read_bytes() if path.exists() else b"{}")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete {directory} and prepare the data set again.") from error
    different = [
        f"{field}={found.get(field)!r}, not {value!r}" for field, value in request.items() if found.get(field) != value
    ]
    if different:
        raise DataError(
            f"A directory holds one data set, but {directory} holds another, with {'; '.join(different)}; "
            "choose another directory or delete this one."
        )


def _check_recorded(directory: Path) -> None:
    """See that what is left of a finished data set was not changed, or the new manifest would vouch for the change.

    Raises:
        DataError: names the changed shard.
    """
    if not (directory / MANIFEST_NAME).exists():
        return
    for record in read_manifest(directory).shards:
        path = directory / record.name
        if path.exists():
            with storage_errors("read", path), open(path, "rb") as file:
                check_checksum(file, path, record)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Hold a directory for one writer; the lock goes when its process does, however it ends."""
    path = directory / ".lock"
    with storage_errors("lock", path):
        file = open(path, "ab")  # noqa: SIM115
    with file:
        with storage_errors("lock", path):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("Waiting for another process that prepares %s.", directory)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Progress:
    """One line a shard: how much is done, how fast, how long it will take."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._written = 0
        self._started = time.monotonic()

    def log(self, path: Path, start: int, stop: int) -> None:
        self._written += stop - start
        speed = self._written / (time.monotonic() - self._started)
        left_s = (self._images - stop) / speed
        images = f"{stop:,} of {self._images:,} images, {speed:,.0f} images/s, {left_s:,.0f} s left"
        logger.info("Wrote %s: %s", path.name, images)


def _encode_shard(
    source: ImageSource, start: int, stop: int, autoencoder: Autoencoder, dtype: MomentsDtype, mirror: bool
) -> memoryview:
    """The bytes of the tar with the images [start, stop); equal input gives equal bytes."""
    content = io.BytesIO()
    with TarWriter(content, user="", group="", mtime=0) as tar:
        for first in range(start, stop, ENCODE_BATCH):
            samples = list(source.read(first, min(first + ENCODE_BATCH, stop)))
            images = torch.from_numpy(np.stack([sample.image for sample in samples]))
            views = [images, images.flip(2)] if mirror else [images]
            moments = torch.stack([autoencoder.encode(view) for view in views], dim=1).cpu().numpy()
            for sample, stored in zip(samples, _store(moments, samples, dtype), strict=True):
                tar.write({"__key__": sample.key, "moments.npy": stored, "cls": sample.label})
    return content.getbuffer()


def _store(moments: np.ndarray, samples: list[LabelledImage], dtype: MomentsDtype) -> np.ndarray:
    """Moments [B, V, 2C, H, W] in the stored dtype.

    Raises:
        DataError: a mean is not finite there, or a log-variance is NaN or +inf (-inf is a point).
    """
    with np.errstate(over="ignore"):
        stored = moments.astype(dtype)
    mean, log_variance = np.split(stored, 2, axis=2)
    good = np.isfinite(mean) & (log_variance < np.inf)
    if not good.all():
        sample = samples[int(np.argmin(good.all(axis=(1, 2, 3, 4))))]
        raise DataError(f"Moments must be finite in {dtype}, but those of {sample.key} are not; store them in float32.")
    return stored


def _index_part(path: Path, samples: int, dtype: MomentsDtype) -> ShardIndex:
    index = index_shard(path)
    if len(index.records) != samples or index.dtype != np.dtype(dtype):
        raise DataError(
            f"{path} must hold {samples} samples of {dtype}, found {len(index.records)} of {index.dtype}; "
            "delete it and prepare the data set again."
        )
    return index


def _write_manifest(
    directory: Path, request: dict[str, Any], num_classes: int, shards: list[tuple[Path, ShardIndex]]
) -> Manifest:
    layouts = {(index.moments_shape, index.dtype) for _, index in shards}
    if len(layouts) != 1:
        raise DataError(f"All shards of {directory} must hold moments of one shape, found {sorted(map(str, layouts))}.")
    records = np.concatenate([index.records for _, index in shards])
    low, high = int(records["label"].min()), int(records["label"].max())
    if low < 0 or high >= num_classes:
        raise DataError(f"Labels must lie in [0, {num_classes}), found {low} to {high} in {directory}.")
    manifest = Manifest(
        name=request["name"],
        source=request["source"],
        autoencoder=request["autoencoder"],
        latent_scale=request["latent_scale"],
        latent_shift=request["latent_shift"],
        dtype=request["dtype"],
        moments_shape=shards[0][1].moments_shape,
        num_classes=num_classes,
        label_histogram=tuple(np.bincount(records["label"], minlength=num_classes).tolist()),
        shards=tuple(
            ShardRecord(**file_record(path).model_dump(), samples=len(index.records)) for path, index in shards
        ),
        index=write_index(directory, records),
    )
    write_manifest(directory, manifest)
    return manifest
