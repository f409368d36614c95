"""The full check of a data set: every byte, every sample."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from eqm_dist.data.index import check_moments, index_tar, read_index
from eqm_dist.data.manifest import Manifest, ShardRecord, check_bytes, check_checksum, read_manifest
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder, open_whole

READERS = 4
"""Shards checked at once; of those on S3 so many copies take room for temporary files."""


def verify_shards(location: str | Path, deadline_s: float = DEADLINE_S) -> Manifest:
    """Read everything and compare it with the manifest: sizes, checksums, every sample's place, shape and class.

    Args:
        location: of the data set, a directory or an s3:// prefix.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: names every damaged file.
        StorageError: a file cannot be read.
    """
    folder = open_folder(location, deadline_s=deadline_s)
    manifest = read_manifest(folder)
    index = read_index(folder, manifest, verify_checksum=True)
    samples = np.split(index, np.cumsum([record.samples for record in manifest.shards])[:-1])
    sizes = folder.list()

    def problem(record: ShardRecord, expected: np.ndarray) -> str | None:
        try:
            _verify_shard(folder, record, sizes.get(record.name), manifest, expected)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(READERS, thread_name_prefix="verify") as threads:
        problems = list(filter(None, threads.map(problem, manifest.shards, samples)))
    if problems:
        raise DataError("\n".join(problems))
    return manifest


def _verify_shard(
    folder: Folder, record: ShardRecord, size: int | None, manifest: Manifest, expected: np.ndarray
) -> None:
    path = f"{folder.url}/{record.name}"
    check_bytes(path, size, record)
    with open_whole(folder, record.name) as file, storage_errors("read", path):
        check_checksum(file, path, record)
        found = index_tar(file, path)
        check_moments(file, path, found)
    layout = (found.moments_shape, found.dtype)
    if not np.array_equal(found.records, expected) or layout != (manifest.moments_shape, np.dtype(manifest.dtype)):
        raise DataError(f"{path} must hold the samples that the index and the manifest describe; prepare it again.")
