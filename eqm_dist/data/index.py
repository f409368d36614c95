"""The index: where in its shard each sample lies, so that any sample is read without reading what comes before it."""

import io
import math
import posixpath
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from eqm_dist.data.bounds import MAX_TEXT_BYTES
from eqm_dist.data.labels import LABEL_BYTES, check_label, parse_label
from eqm_dist.data.manifest import FileRecord, Manifest, check_bytes, check_checksum, record_of
from eqm_dist.data.npy import read_header
from eqm_dist.data.sources.image import SkippedImage
from eqm_dist.data.tar_members import TarMember, read_members
from eqm_dist.documents import from_json
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.open import open_whole

INDEX_NAME = "index.npy"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("label", "<i4")])
"""Byte in its shard at which a sample's array data begins (after the npy header), and its class: 12 bytes a sample."""


SKIPPED_NAME = "__skipped__"
"""Member of a tar that lists the images that could not be decoded, as JSON. WebDataset passes over such names."""
SOURCE_NAME = "__source__"
"""Member of a tar with the sha256 of the stored images that it was made of, broken ones too."""
MOMENTS_SUFFIX = ".moments.npy"
MOMENTS_DTYPES = ("<f2", "<f4")
"""By the order of their bytes, too: the manifest names the type alone, and the loader takes it for little-endian."""
MAX_LOG_VARIANCE = 2 * math.log(np.finfo(np.float32).max)
"""Above it, exp(log_variance / 2) is infinite."""
CHECK_BYTES = 16 << 20
"""Moments whose values are looked at together."""


class ShardIndex(NamedTuple):
    """What one tar holds."""

    records: np.ndarray
    """[samples], INDEX_DTYPE."""
    moments_shape: tuple[int, ...]
    """[V, 2C, H, W]; of no length if all images were skipped."""
    dtype: np.dtype
    skipped: tuple[SkippedImage, ...]
    source: str | None = None
    """sha256 of the stored images; None where nobody recorded it."""


def index_shard(path: Path) -> ShardIndex:
    """``index_tar`` of a local file.

    Raises:
        DataError: as there.
        StorageError: the tar cannot be read.
    """
    with storage_errors("read", path), open(path, "rb") as file:
        return index_tar(file, path)


def index_tar(file: BinaryIO, path: str | Path) -> ShardIndex:
    """Find every sample of a WebDataset tar by reading its headers; other files of a sample are passed over.

    Args:
        file: the tar.
        path: what it is called in errors.

    Raises:
        DataError: the tar is truncated or damaged, a sample lacks its moments or its class, or the arrays differ in
            shape or dtype.
        StorageError: the tar cannot be read.
    """
    offsets: dict[str, int] = {}
    labels: dict[str, int] = {}
    layouts: set[tuple[tuple[int, ...], np.dtype]] = set()
    skipped: tuple[SkippedImage, ...] = ()
    source: str | None = None
    try:
        with storage_errors("read", path):
            for member in read_members(file, _is_part):
                file.seek(member.offset)
                if member.name == SKIPPED_NAME:
                    skipped = _skipped(file, member)
                elif member.name == SOURCE_NAME:
                    source = file.read(min(member.size, 64)).decode("ascii")
                elif member.name.endswith(MOMENTS_SUFFIX):
                    layouts.add(_read_layout(file, member, path))
                    _add(offsets, member.name, MOMENTS_SUFFIX, file.tell())
                else:
                    label = parse_label(file.read(min(member.size, LABEL_BYTES + 1)))
                    check_label(label, f"{path}: {member.name}")
                    _add(labels, member.name, ".cls", label)
    except ValueError as error:
        raise DataError(
            f"{path} must be a whole tar of KEY.moments.npy and KEY.cls ({error}); "
            "replace it, or delete it and prepare the data set again."
        ) from error
    if not offsets and not labels and skipped:
        return ShardIndex(np.empty(0, INDEX_DTYPE), (), np.dtype(np.float32), skipped, source)
    if not offsets or offsets.keys() != labels.keys() or len(layouts) != 1:
        alone = next(iter(offsets.keys() ^ labels.keys()), None)
        raise DataError(
            f"Every sample of {path} must have KEY.moments.npy of one shape and KEY.cls; found {len(offsets)} arrays "
            f"of {len(layouts)} shapes and {len(labels)} classes{f', and {alone} has but one of them' if alone else ''}"
            "; replace it, or delete it and prepare the data set again."
        )
    [(moments_shape, dtype)] = layouts
    records = np.empty(len(offsets), INDEX_DTYPE)
    records["offset"] = list(offsets.values())
    records["label"] = [labels[key] for key in offsets]
    return ShardIndex(records, moments_shape, dtype, skipped, source)


def are_moments(moments: np.ndarray) -> np.ndarray:
    """Whether numbers may be moments [..., 2C, H, W]: finite means, log-variances that are neither NaN nor too large.

    A log-variance of minus infinity is a point.
    """
    mean, log_variance = np.split(moments, 2, axis=-3)
    return np.isfinite(mean) & (log_variance <= MAX_LOG_VARIANCE)


def check_moments(file: BinaryIO, path: str | Path, index: ShardIndex) -> None:
    """Look at every number of a shard.

    Raises:
        DataError: one cannot be a moment.
        StorageError: the tar cannot be read.
    """
    if not len(index.records):
        return
    each = math.prod(index.moments_shape) * index.dtype.itemsize
    at_once = max(1, CHECK_BYTES // each)
    offsets = index.records["offset"].tolist()
    for first in range(0, len(offsets), at_once):
        part = offsets[first : first + at_once]
        with storage_errors("read", path):
            content = b"".join(_bytes_at(file, offset, each) for offset in part)
        good = are_moments(np.frombuffer(content, index.dtype).reshape(len(part), *index.moments_shape))
        if not good.all():
            number = first + int(np.argmin(good.all(axis=(1, 2, 3, 4))))
            raise DataError(
                f"Moments must be finite means and log-variances of at most {MAX_LOG_VARIANCE:.0f}, but those of "
                f"sample {number} of {path} are not; compute them again."
            )


def write_index(folder: Folder, records: np.ndarray) -> FileRecord:
    """Write index.npy: INDEX_DTYPE records [num_samples].

    Raises:
        StorageError: the index cannot be written.
    """
    content = io.BytesIO()
    np.save(content, records, allow_pickle=False)
    folder.write(INDEX_NAME, content.getbuffer())
    return record_of(content, INDEX_NAME)


def read_index(folder: Folder, manifest: Manifest, *, verify_checksum: bool) -> np.ndarray:
    """The index as a memory map: INDEX_DTYPE records [num_samples].

    Raises:
        DataError: the index is missing, damaged, or does not belong to the manifest.
        StorageError: the index cannot be read.
    """
    name = manifest.index.name
    path = f"{folder.url}/{name}"
    check_bytes(path, folder.size(name), manifest.index)
    with open_whole(folder, name) as file, storage_errors("read", path):
        if verify_checksum:
            check_checksum(file, path, manifest.index)
            file.seek(0)
        return map_index(file, path, manifest)


def map_index(file: BinaryIO, path: str | Path, manifest: Manifest) -> np.ndarray:
    """The index in an open file as a memory map, which outlives the file: INDEX_DTYPE records [num_samples].

    Raises:
        DataError: it is damaged, or does not belong to the manifest; names it ``path``.
        OSError: it cannot be read.
    """
    try:
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("Python objects in it")
    except ValueError as error:
        raise DataError(f"{path} must be an npy file ({error}); delete it and prepare the data set again.") from error
    if dtype != INDEX_DTYPE or shape != (manifest.num_samples,):
        raise DataError(
            f"{path} must hold {manifest.num_samples:,} records of {INDEX_DTYPE}, found {shape} of "
            f"{dtype}; delete it and prepare the data set again."
        )
    start = file.tell()
    if file.seek(0, io.SEEK_END) < start + manifest.num_samples * dtype.itemsize:
        raise DataError(
            f"{path} must hold {manifest.num_samples:,} records, but ends before; prepare the data set again."
        )
    records = np.memmap(file, dtype, "r", offset=start, shape=shape)
    _check_records(records, path, manifest)
    return records


def _check_records(records: np.ndarray, path: str | Path, manifest: Manifest) -> None:
    """See that an index says nothing that the manifest does not: every sample lies in its shard, every class counts.

    Raises:
        DataError: says what is wrong.
    """
    remedy = "delete it and prepare the data set again"
    labels = records["label"]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= manifest.num_classes:
        raise DataError(
            f"Classes in {path} must lie in [0, {manifest.num_classes}) as the manifest says, found {low} to {high}; "
            f"{remedy}."
        )
    if np.bincount(labels, minlength=manifest.num_classes).tolist() != list(manifest.label_histogram):
        raise DataError(f"The classes in {path} must add up to the manifest's histogram, and do not; {remedy}.")
    first = 0
    for shard in manifest.shards:
        # In Python's integers, and the largest offset by itself: a sum in 64 bits would wrap around.
        last = int(records["offset"][first : first + shard.samples].max())
        if last + manifest.moments_bytes > shard.bytes:
            raise DataError(
                f"{path} must point into {shard.name}, but points past its end, to byte {last:,} of {shard.bytes:,}; "
                f"{remedy}."
            )
        first += shard.samples


def _is_part(name: str) -> bool:
    hidden = name.rpartition("/")[2].startswith("._")  # a Mac's shadow of a file
    return name in (SKIPPED_NAME, SOURCE_NAME) or (name.endswith((MOMENTS_SUFFIX, ".cls")) and not hidden)


def _add(found: dict[str, int], name: str, suffix: str, value: int) -> None:
    key = posixpath.normpath(name.removesuffix(suffix))
    if key in found:
        raise ValueError(f"{name} is in it twice")
    found[key] = value


def _skipped(file: BinaryIO, member: TarMember) -> tuple[SkippedImage, ...]:
    if member.size > MAX_TEXT_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes, more than {MAX_TEXT_BYTES:,}")
    listed = from_json(file.read(member.size))
    fields = ("key", "name", "reason")
    if not isinstance(listed, list) or not all(
        isinstance(each, dict) and each.keys() == set(fields) and all(isinstance(each[field], str) for field in fields)
        for each in listed
    ):
        raise ValueError(f"{member.name} is no list of skipped images")
    return tuple(SkippedImage(**each) for each in listed)


def _bytes_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _read_layout(file: BinaryIO, member: TarMember, path: str | Path) -> tuple[tuple[int, ...], np.dtype]:
    """Shape [V, 2C, H, W] and dtype; the file is left where the array data begins, in C order."""
    shape, fortran_order, dtype = read_header(file)
    if dtype.str not in MOMENTS_DTYPES:
        raise DataError(
            f"Moments must be little-endian float16 or float32, but {path} holds {dtype.str}; convert them."
        )
    if fortran_order or len(shape) != 4:
        raise ValueError(f"array of shape {shape}{' in Fortran order' * fortran_order} instead of [V, 2C, H, W]")
    if shape[1] % 2:
        raise ValueError(f"array of shape {shape} with an odd number of channels, which are means and log-variances")
    if file.tell() + math.prod(shape) * dtype.itemsize != member.offset + member.size:
        raise ValueError(f"{member.name} has {member.size:,} bytes, which an array of shape {shape} of {dtype} has not")
    return shape, dtype
