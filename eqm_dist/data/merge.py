"""One data set out of several: what machines wrote side by side, joined without copying where that is possible."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eqm_dist.data.index import INDEX_DTYPE, read_index, write_index
from eqm_dist.data.manifest import MANIFEST_NAME, Manifest, check_bytes, read_manifest, write_manifest
from eqm_dist.errors import DataError
from eqm_dist.storage.files import remove_leftovers
from eqm_dist.storage.folder import LocalFolder
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder

AGREE = (
    "autoencoder",
    "latent_scale",
    "latent_shift",
    "dtype",
    "moments_shape",
    "num_classes",
    "class_names",
)
"""What the data sets must have in common to be one."""


def merge_shards(out: str | Path, locations: Sequence[str | Path], deadline_s: float = DEADLINE_S) -> Manifest:
    """Join data sets, in the order given, into ``out``, as OUT/NAME-000000.tar, ... NAME is that of the first.

    The inputs stay as they are. Local shards appear in a local ``out`` as hard links, or as copies where the file
    systems differ; S3 copies its own by itself. Interrupted, it can be run again.

    Args:
        out: a directory or an s3:// prefix, of the new data set alone.
        locations: of the data sets, directories or s3:// prefixes.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: the data sets do not agree, one is damaged, or ``out`` holds something else.
        StorageError: a file cannot be read or written.
    """
    target, *inputs = (open_folder(location, deadline_s=deadline_s) for location in (out, *locations))
    urls = [folder.url for folder in inputs]
    if len(set(urls)) < len(urls) or target.url in urls:
        raise DataError(f"Each data set can be joined once, and not into itself, received {target.url} and {urls}.")
    manifests = [read_manifest(folder) for folder in inputs]
    _check_agreement(urls, manifests)
    first = manifests[0]
    sources = [
        (folder, record) for folder, manifest in zip(inputs, manifests, strict=True) for record in manifest.shards
    ]
    shards = tuple(
        record.model_copy(update={"name": f"{first.name}-{number:06d}.tar"})
        for number, (_, record) in enumerate(sources)
    )
    present = target.list()
    foreign = {name for name in present if name.endswith(".tar")} - {record.name for record in shards}
    if foreign or MANIFEST_NAME in present:
        raise DataError(
            f"A merged data set must go into a directory of its own, but {target.url} holds one; choose another."
        )
    if isinstance(target, LocalFolder):
        remove_leftovers(Path(target.url))
    for (folder, record), joined in zip(sources, shards, strict=True):
        check_bytes(f"{folder.url}/{record.name}", folder.size(record.name), record)
        target.copy(folder, record.name, joined.name)
    records = np.concatenate(
        [
            np.asarray(read_index(folder, manifest, verify_checksum=True))
            for folder, manifest in zip(inputs, manifests, strict=True)
        ]
    )
    assert records.dtype == INDEX_DTYPE
    manifest = first.model_copy(
        update={
            "source": " + ".join(dict.fromkeys(manifest.source for manifest in manifests)),
            "label_histogram": tuple(np.sum([manifest.label_histogram for manifest in manifests], axis=0).tolist()),
            "shards": shards,
            "index": write_index(target, records),
        }
    )
    write_manifest(target, manifest)
    return manifest


def _check_agreement(urls: Sequence[str], manifests: Sequence[Manifest]) -> None:
    for field in AGREE:
        values = [getattr(manifest, field) for manifest in manifests]
        for url, value in zip(urls, values, strict=True):
            if value != values[0]:
                raise DataError(
                    f"Data sets that are joined must have one {field}, but {urls[0]} has {values[0]!r} and "
                    f"{url} {value!r}; prepare them alike."
                )
