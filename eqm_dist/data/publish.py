"""A finished data set on S3: file by file, the manifest last, so that it exists there only when it is whole."""

import json
import logging
import time
from pathlib import Path

from eqm_dist.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, read_manifest
from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import DataError
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder

SENT_NAME = ".sent"

logger = logging.getLogger(__name__)


def publish_shards(directory: Path, location: str, deadline_s: float = DEADLINE_S) -> Manifest:
    """Copy the data set in ``directory`` to an s3:// prefix; goes on where a killed one stopped.

    A file that is there in its size is not sent again, unless it was sent from here before its images were changed: an
    object on S3 is whole or absent, and who reads it compares it with the manifest's sha256.

    Args:
        directory: a finished data set.
        location: s3://BUCKET/PREFIX, of this data set alone.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: another data set lies at ``location``, or ``directory`` holds none.
        StorageError: S3 does not take a file. What was sent stays.
    """
    manifest = read_manifest(directory)
    sent_before = _Sent(directory / SENT_NAME, location)
    local, folder = open_folder(directory), open_folder(location, deadline_s=deadline_s)
    present = folder.list()
    if MANIFEST_NAME in present:
        if parse_manifest(folder.read(MANIFEST_NAME), f"{folder.url}/{MANIFEST_NAME}") != manifest:
            raise DataError(f"{location} holds another data set; choose another prefix, or empty this one.")
        return manifest
    files = {record.name: record.bytes for record in (*manifest.shards, manifest.index)}
    hashes = {record.name: record.sha256 for record in (*manifest.shards, manifest.index)}
    missing = [
        name for name, size in files.items() if present.get(name) != size or sent_before.other(name, hashes[name])
    ]
    total, sent, began = sum(files[name] for name in missing), 0, time.monotonic()
    for name in missing:
        sent_before.record(name, None)
        folder.copy(local, name, name)
        sent_before.record(name, hashes[name])
        sent += files[name]
        if name != manifest.index.name:
            rate = sent / (time.monotonic() - began)
            logger.info(
                "Sent %s: %.2f of %.2f GiB, %.1f MiB/s, %.0f s left",
                name, sent / 2**30, total / 2**30, rate / 2**20, (total - sent) / rate,
            )  # fmt: skip
    folder.copy(local, MANIFEST_NAME, MANIFEST_NAME)
    return manifest


class _Sent:
    """DIR/.sent: the sha256 of each file that went from here to a location, null while it was on its way."""

    def __init__(self, path: Path, location: str) -> None:
        self._path, self._location = path, location
        self._hashes: dict[str, str | None] = {}
        try:
            with storage_errors("read", path):
                found = mapping_from_json(read_bounded(path) if path.exists() else b"{}")
            self._hashes = dict(found["files"]) if found.get("location") == location else {}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is damaged ({error!r}); delete it and empty the prefix, then everything is sent again."
            ) from error

    def other(self, name: str, sha256: str) -> bool:
        """Whether what was sent under a name may be something else."""
        return name in self._hashes and self._hashes[name] != sha256

    def record(self, name: str, sha256: str | None) -> None:
        """Write down what is sent."""
        self._hashes[name] = sha256
        atomic_write(self._path, json.dumps({"location": self._location, "files": self._hashes}).encode())
