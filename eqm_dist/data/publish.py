"""A finished data set on S3: file by file, the manifest last, so that it exists there only when it is whole."""

import logging
import time
from pathlib import Path

from eqm_dist.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from eqm_dist.errors import DataError
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder

logger = logging.getLogger(__name__)


def publish_shards(directory: Path, location: str, deadline_s: float = DEADLINE_S) -> Manifest:
    """Copy the data set in ``directory`` to an s3:// prefix; goes on where a killed one stopped.

    A file that is there in its size is not sent again: an object on S3 is whole or absent, and who reads it compares
    it with the manifest's sha256.

    Args:
        directory: a finished data set.
        location: s3://BUCKET/PREFIX, of this data set alone.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: another data set lies at ``location``, or ``directory`` holds none.
        StorageError: S3 does not take a file. What was sent stays.
    """
    manifest = read_manifest(directory)
    local, folder = open_folder(directory), open_folder(location, deadline_s=deadline_s)
    present = folder.list()
    if MANIFEST_NAME in present:
        if Manifest.model_validate_json(folder.read(MANIFEST_NAME)) != manifest:
            raise DataError(f"{location} holds another data set; choose another prefix, or empty this one.")
        return manifest
    files = {record.name: record.bytes for record in (*manifest.shards, manifest.index)}
    missing = [name for name, size in files.items() if present.get(name) != size]
    total, sent, began = sum(files[name] for name in missing), 0, time.monotonic()
    for name in missing:
        folder.copy(local, name, name)
        sent += files[name]
        if name != manifest.index.name:
            rate = sent / (time.monotonic() - began)
            logger.info(
                "Sent %s: %.2f of %.2f GiB, %.1f MiB/s, %.0f s left",
                name, sent / 2**30, total / 2**30, rate / 2**20, (total - sent) / rate,
            )  # fmt: skip
    folder.copy(local, MANIFEST_NAME, MANIFEST_NAME)
    return manifest
