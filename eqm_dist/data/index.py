"""The index: where in its shard each sample lies, so that any sample is read without reading what comes before it."""

import io
import json
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from eqm_dist.data.manifest import FileRecord, Manifest, check_bytes, check_checksum, record_of
from eqm_dist.data.npy import read_header
from eqm_dist.data.sources.image import SkippedImage
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.open import open_whole

INDEX_NAME = "index.npy"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("label", "<i4")])
"""Byte in its shard at which a sample's array data begins (after the npy header), and its class: 12 bytes a sample."""


SKIPPED_NAME = "__skipped__"
"""Member of a tar that lists the images that could not be decoded, as JSON. WebDataset passes over such names."""


class ShardIndex(NamedTuple):
    """What one tar holds."""

    records: np.ndarray
    """[samples], INDEX_DTYPE."""
    moments_shape: tuple[int, ...]
    """[V, 2C, H, W]; of no length if all images were skipped."""
    dtype: np.dtype
    skipped: tuple[SkippedImage, ...]


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
    try:
        file.seek(0)
        with storage_errors("read", path), tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = folder + slash + stem
                file.seek(member.offset_data)
                if suffix == "moments.npy":
                    layouts.add(_read_layout(file))
                    offsets[key] = file.tell()
                elif suffix == "cls":
                    labels[key] = int(file.read(member.size))
                elif member.name == SKIPPED_NAME:
                    skipped = tuple(SkippedImage(**fields) for fields in json.loads(file.read(member.size)))
    except (tarfile.TarError, ValueError, TypeError) as error:
        raise DataError(
            f"{path} must be a whole tar of KEY.moments.npy and KEY.cls ({error}); "
            "delete it and prepare the data set again."
        ) from error
    if not offsets and not labels and skipped:
        return ShardIndex(np.empty(0, INDEX_DTYPE), (), np.dtype(np.float32), skipped)
    if not offsets or list(offsets) != list(labels) or len(layouts) != 1:
        raise DataError(
            f"Every sample of {path} must have KEY.moments.npy of one shape and KEY.cls; found {len(offsets)} arrays "
            f"of {len(layouts)} shapes and {len(labels)} classes; delete it and prepare the data set again."
        )
    [(moments_shape, dtype)] = layouts
    records = np.empty(len(offsets), INDEX_DTYPE)
    records["offset"] = list(offsets.values())
    records["label"] = list(labels.values())
    return ShardIndex(records, moments_shape, dtype, skipped)


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
    return np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)


def _read_layout(file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape [V, 2C, H, W] and dtype; the file is left where the array data begins, in C order."""
    shape, fortran_order, dtype = read_header(file)
    if fortran_order or len(shape) != 4:
        raise ValueError(f"array of shape {shape}{' in Fortran order' * fortran_order} instead of [V, 2C, H, W]")
    return shape, dtype
