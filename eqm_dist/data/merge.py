"""One data set out of several: what machines wrote side by side, joined without copying where that is possible."""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eqm_dist.data.index import INDEX_DTYPE, read_index, write_index
from eqm_dist.data.manifest import MANIFEST_NAME, Manifest, check_size, read_manifest, write_manifest
from eqm_dist.data.storage import TEMPORARY_SUFFIX, fsync_directory, local_path, remove_leftovers, storage_errors
from eqm_dist.errors import DataError

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


def merge_shards(out: str | Path, directories: Sequence[str | Path]) -> Manifest:
    """Join data sets, in the order given, into ``out``, as OUT/NAME-000000.tar, ... NAME is that of the first.

    The inputs stay as they are. Their shards appear in ``out`` as hard links, or as copies where the file systems
    differ. Interrupted, it can be run again.

    Raises:
        DataError: the data sets do not agree, one is damaged, or ``out`` holds something else.
        StorageError: a file cannot be read or written.
    """
    out = local_path(out)
    inputs = [local_path(directory) for directory in directories]
    if len(set(inputs)) < len(inputs) or out in inputs:
        raise DataError(f"Each data set can be joined once, and not into itself, received {out} and {inputs}.")
    manifests = [read_manifest(directory) for directory in inputs]
    _check_agreement(inputs, manifests)
    first = manifests[0]
    sources = [
        (directory / record.name, record)
        for directory, manifest in zip(inputs, manifests, strict=True)
        for record in manifest.shards
    ]
    shards = tuple(
        record.model_copy(update={"name": f"{first.name}-{number:06d}.tar"})
        for number, (_, record) in enumerate(sources)
    )
    with storage_errors("create", out):
        out.mkdir(parents=True, exist_ok=True)
    foreign = {path.name for path in out.glob("*.tar")} - {record.name for record in shards}
    if foreign or (out / MANIFEST_NAME).exists():
        raise DataError(f"A merged data set must go into a directory of its own, but {out} holds one; choose another.")
    remove_leftovers(out)
    for (path, record), joined in zip(sources, shards, strict=True):
        check_size(path, record)
        _link(path, out / joined.name)
    fsync_directory(out)
    records = np.concatenate(
        [
            np.asarray(read_index(directory, manifest, verify_checksum=True))
            for directory, manifest in zip(inputs, manifests, strict=True)
        ]
    )
    assert records.dtype == INDEX_DTYPE
    manifest = first.model_copy(
        update={
            "source": " + ".join(dict.fromkeys(manifest.source for manifest in manifests)),
            "label_histogram": tuple(np.sum([manifest.label_histogram for manifest in manifests], axis=0).tolist()),
            "shards": shards,
            "index": write_index(out, records),
        }
    )
    write_manifest(out, manifest)
    return manifest


def _check_agreement(directories: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    for field in AGREE:
        values = [getattr(manifest, field) for manifest in manifests]
        for directory, value in zip(directories, values, strict=True):
            if value != values[0]:
                raise DataError(
                    f"Data sets that are joined must have one {field}, but {directories[0]} has {values[0]!r} and "
                    f"{directory} {value!r}; prepare them alike."
                )


def _link(source: Path, target: Path) -> None:
    with storage_errors("write", target):
        temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                raise
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # a rename onto a link of the same file does nothing
