"""The full check of a data set: every byte, every sample."""

from pathlib import Path

import numpy as np

from eqm_dist.data.index import index_shard, read_index
from eqm_dist.data.manifest import Manifest, ShardRecord, check_checksum, check_size, read_manifest
from eqm_dist.data.storage import local_path, storage_errors
from eqm_dist.errors import DataError


def verify_shards(directory: str | Path) -> Manifest:
    """Read everything and compare it with the manifest: sizes, checksums, every sample's place, shape and class.

    Raises:
        DataError: names every damaged file.
        StorageError: a file cannot be read.
    """
    directory = local_path(directory)
    manifest = read_manifest(directory)
    index = read_index(directory, manifest, verify_checksum=True)
    problems: list[str] = []
    first = 0
    for record in manifest.shards:
        try:
            _verify_shard(directory / record.name, record, manifest, index[first : first + record.samples])
        except DataError as error:
            problems.append(str(error))
        first += record.samples
    if np.bincount(index["label"], minlength=manifest.num_classes).tolist() != list(manifest.label_histogram):
        problems.append(f"The classes in {directory / manifest.index.name} do not add up to the manifest's histogram.")
    if problems:
        raise DataError("\n".join(problems))
    return manifest


def _verify_shard(path: Path, record: ShardRecord, manifest: Manifest, expected: np.ndarray) -> None:
    check_size(path, record)
    with storage_errors("read", path), open(path, "rb") as file:
        check_checksum(file, path, record)
    found = index_shard(path)
    layout = (found.moments_shape, found.dtype)
    if not np.array_equal(found.records, expected) or layout != (manifest.moments_shape, np.dtype(manifest.dtype)):
        raise DataError(f"{path} must hold the samples that the index and the manifest describe; prepare it again.")
