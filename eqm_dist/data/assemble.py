"""From tars to a data set: the index and the manifest that make them one."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from eqm_dist.data.index import ShardIndex, check_moments, index_tar, write_index
from eqm_dist.data.manifest import (
    MANIFEST_NAME,
    Description,
    FileRecord,
    Manifest,
    ShardRecord,
    describe,
    is_file_name,
    record_of,
    write_manifest,
)
from eqm_dist.data.sources.names import readable, without_hidden
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder, open_whole


def assemble(folder: Folder, description: Description, shards: Sequence[tuple[FileRecord, ShardIndex]]) -> Manifest:
    """Write index and manifest of the tars in ``folder``; tars without a sample are left out.

    Raises:
        DataError: the tars hold no sample, differ in layout, or have classes outside [0, num_classes).
        StorageError: a file cannot be written.
    """
    description.check()
    shards = [(record, index) for record, index in shards if len(index.records)]
    if not shards:
        raise DataError(
            f"A data set must hold a sample, but no image of {folder.url} could be read; repair the images."
        )
    layouts = {(index.moments_shape, index.dtype) for _, index in shards}
    if len(layouts) != 1:
        raise DataError(
            f"All shards of {folder.url} must hold moments of one shape, found {sorted(map(str, layouts))}; "
            "put those of each shape into a directory of their own."
        )
    [(moments_shape, dtype)] = layouts
    records = np.concatenate([index.records for _, index in shards])
    low, high = int(records["label"].min()), int(records["label"].max())
    num_classes = description.num_classes
    if low < 0 or high >= num_classes:
        raise DataError(
            f"Labels must lie in [0, {num_classes}), found {low} to {high} in {folder.url}; "
            f"give --num-classes {high + 1}, or correct the classes."
        )
    manifest = describe(
        description,
        dtype=dtype.name,
        moments_shape=moments_shape,
        label_histogram=np.bincount(records["label"], minlength=num_classes).tolist(),
        shards=[ShardRecord(**record.model_dump(), samples=len(index.records)) for record, index in shards],
        index=write_index(folder, records),
    )
    write_manifest(folder, manifest)
    return manifest


def index_directory(
    location: str | Path,
    *,
    source: str,
    autoencoder: str,
    autoencoder_location: str | None,
    latent_scale: float,
    latent_shift: float,
    num_classes: int | None,
    deadline_s: float = DEADLINE_S,
) -> Manifest:
    """Make a data set of tars that others wrote: KEY.moments.npy [V, 2C, H, W] and KEY.cls.

    Args:
        location: of the tars, a directory or an s3:// prefix; index and manifest are written beside them.
        source: what the images came from.
        autoencoder: names what made the moments.
        autoencoder_location: where its weights are, as ``load_autoencoder`` takes it.
        latent_scale, latent_shift: latents = (posterior sample - shift) * scale.
        num_classes: default: the highest class that occurs, and one.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: there are no tars, or it is a data set already, or a tar is damaged or has another layout.
        StorageError: a tar cannot be read.
    """
    folder = open_folder(location, deadline_s=deadline_s)
    files = folder.list()
    tars = without_hidden([name for name in files if name.endswith(".tar")], folder.url)
    if not tars:
        raise DataError(f"A directory to index must hold tars, but {folder.url} holds none; correct DIR.")
    if MANIFEST_NAME in files:
        raise DataError(
            f"A directory to index must have no {MANIFEST_NAME}, but {folder.url} has one; check it with `verify`, or "
            "delete the file to index anew."
        )
    for name in tars:
        if not is_file_name(name):
            raise DataError(
                f"Names of shards must be text without control characters, but {folder.url} holds "
                f"{readable(name)!r}; rename it."
            )
    description = Description(
        name=_name(PurePosixPath(folder.url).name),
        source=source,
        autoencoder=autoencoder,
        autoencoder_location=autoencoder_location,
        latent_scale=latent_scale,
        latent_shift=latent_shift,
        num_classes=1 if num_classes is None else num_classes,
    )
    description.check()  # now, and not after hours of reading
    shards = [_index(folder, name) for name in tars]
    if num_classes is None:
        highest = max((int(index.records["label"].max()) for _, index in shards if len(index.records)), default=0)
        description = replace(description, num_classes=highest + 1)
    return assemble(folder, description, shards)


def _name(directory: str) -> str:
    """The name of a data set that lies in a directory of that name: it begins the names of shards that are merged."""
    name = re.sub(r"[\\:]", "_", readable(directory)).lstrip(".")
    return name if is_file_name(name) else "shards"


def _index(folder: Folder, name: str) -> tuple[FileRecord, ShardIndex]:
    path = f"{folder.url}/{name}"
    with open_whole(folder, name) as file, storage_errors("read", path):
        index = index_tar(file, path)
        check_moments(file, path, index)
        return record_of(file, name), index
