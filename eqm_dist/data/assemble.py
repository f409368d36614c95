"""From tars to a data set: the index and the manifest that make them one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from eqm_dist.data.index import ShardIndex, index_shard, write_index
from eqm_dist.data.manifest import MANIFEST_NAME, Manifest, ShardRecord, file_record, write_manifest
from eqm_dist.data.storage import local_path
from eqm_dist.errors import DataError


@dataclass(frozen=True)
class Description:
    """What the tars do not say about themselves. The fields are those of ``Manifest``."""

    name: str
    source: str
    autoencoder: str
    autoencoder_location: str | None
    latent_scale: float
    latent_shift: float
    num_classes: int
    class_names: tuple[str, ...] = ()


def assemble(directory: Path, description: Description, shards: Sequence[tuple[Path, ShardIndex]]) -> Manifest:
    """Write index and manifest of the tars in ``directory``; tars without a sample are left out.

    Raises:
        DataError: the tars hold no sample, differ in layout, or have classes outside [0, num_classes).
        StorageError: a tar cannot be read or a file cannot be written.
    """
    shards = [(path, index) for path, index in shards if len(index.records)]
    layouts = {(index.moments_shape, index.dtype) for _, index in shards}
    if len(layouts) != 1:
        raise DataError(f"All shards of {directory} must hold moments of one shape, found {sorted(map(str, layouts))}.")
    [(moments_shape, dtype)] = layouts
    records = np.concatenate([index.records for _, index in shards])
    low, high = int(records["label"].min()), int(records["label"].max())
    num_classes = description.num_classes
    if low < 0 or high >= num_classes:
        raise DataError(f"Labels must lie in [0, {num_classes}), found {low} to {high} in {directory}.")
    manifest = Manifest.model_validate(
        {
            **asdict(description),
            "dtype": dtype.name,
            "moments_shape": moments_shape,
            "label_histogram": tuple(np.bincount(records["label"], minlength=num_classes).tolist()),
            "shards": tuple(
                ShardRecord(**file_record(path).model_dump(), samples=len(index.records)) for path, index in shards
            ),
            "index": write_index(directory, records),
        }
    )
    write_manifest(directory, manifest)
    return manifest


def index_directory(
    directory: str | Path,
    *,
    source: str,
    autoencoder: str,
    autoencoder_location: str | None,
    latent_scale: float,
    latent_shift: float,
    num_classes: int | None,
) -> Manifest:
    """Make a data set of tars that others wrote: KEY.moments.npy [V, 2C, H, W] and KEY.cls.

    Args:
        directory: of the tars; index and manifest are written beside them.
        source: what the images came from.
        autoencoder: names what made the moments.
        autoencoder_location: where its weights are, as ``load_autoencoder`` takes it.
        latent_scale, latent_shift: latents = (posterior sample - shift) * scale.
        num_classes: default: the highest class that occurs, and one.

    Raises:
        DataError: the directory holds no tars, or is a data set already, or a tar is damaged or has another layout.
        StorageError: a tar cannot be read.
    """
    directory = local_path(directory)
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise DataError(f"A directory to index must hold tars, but {directory} holds none; correct DIR.")
    if (directory / MANIFEST_NAME).exists():
        raise DataError(
            f"A directory to index must have no {MANIFEST_NAME}, but {directory} has one; check it with `verify`, or "
            "delete the file to index anew."
        )
    shards = [(path, index_shard(path)) for path in paths]
    for path, index in shards:
        if len(index.records) and index.dtype.name not in ("float16", "float32"):
            raise DataError(f"Moments must be float16 or float32, but {path} holds {index.dtype}; convert them.")
    highest = max((int(index.records["label"].max()) for _, index in shards if len(index.records)), default=0)
    description = Description(
        name=directory.name,
        source=source,
        autoencoder=autoencoder,
        autoencoder_location=autoencoder_location,
        latent_scale=latent_scale,
        latent_shift=latent_shift,
        num_classes=num_classes or highest + 1,
    )
    return assemble(directory, description, shards)
