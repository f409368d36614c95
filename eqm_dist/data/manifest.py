"""The manifest: what a directory of shards holds, file by file, and how to find every sample in it.

DIR/NAME-000000.tar ...    WebDataset tars: KEY.moments.npy, KEY.cls
DIR/index.npy              where each sample lies, and its class (``eqm_dist.data.index``)
DIR/manifest.json          written last: a data set exists when its manifest exists
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eqm_dist.errors import DataError, StorageError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.open import open_folder

VERSION = 1
MANIFEST_NAME = "manifest.json"

MomentsDtype = Literal["float16", "float32"]
Positive = Annotated[int, Field(gt=0)]
# A manifest comes with data from elsewhere: a name must not lead out of its directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


class FileRecord(BaseModel):
    """A file of the data set as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: FileName
    bytes: Positive
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ShardRecord(FileRecord):
    """A shard: a file that holds samples."""

    samples: Positive


class Manifest(BaseModel):
    """Everything about a data set except its samples."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: Literal[1] = VERSION
    name: FileName
    source: str
    """What the images came from."""
    autoencoder: str
    """What turned images into moments: a name that says which weights."""
    autoencoder_location: str | None = None
    """Where those weights are: a local folder, or a hub id with its revision; None where there are none."""
    latent_scale: float
    latent_shift: float
    """latents = (posterior sample - latent_shift) * latent_scale."""
    dtype: MomentsDtype
    moments_shape: tuple[Annotated[int, Field(ge=1, le=2)], Positive, Positive, Positive]
    """[V, 2C, H, W]: mean, then log-variance, of the image and, with V = 2, of its mirror (flipped before encoding)."""
    num_classes: Positive
    class_names: tuple[str, ...] = ()
    """One for each class, or none."""
    label_histogram: tuple[int, ...]
    """Samples of each class."""
    shards: Annotated[tuple[ShardRecord, ...], Field(min_length=1)]
    """In the order in which sample indices count."""
    index: FileRecord

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.moments_shape[1] % 2:
            raise ValueError(f"moments_shape {self.moments_shape} must have an even number of channels")
        if len(self.label_histogram) != self.num_classes or sum(self.label_histogram) != self.num_samples:
            raise ValueError(f"label_histogram must count {self.num_samples} samples in {self.num_classes} classes")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names must be {self.num_classes} or none, not {len(self.class_names)}")
        return self

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the moments describe."""
        _, channels, height, width = self.moments_shape
        return channels // 2, height, width


def read_manifest(location: str | Path | Folder) -> Manifest:
    """Read and check the manifest.json of a local directory or an s3:// prefix.

    Raises:
        DataError: there is no data set, its format is unknown, or its manifest is damaged.
        StorageError: the manifest cannot be read.
    """
    folder = open_folder(location) if isinstance(location, (str, Path)) else location
    path = f"{folder.url}/{MANIFEST_NAME}"
    remedy = f"prepare one with `python pipelines/prepare_shards.py --source digits --out {folder.url}`"
    if isinstance(folder, LocalFolder) and not Path(folder.url).is_dir():
        raise DataError(f"Shards must lie in a directory, but {folder.url} does not exist; {remedy}.")
    if folder.size(MANIFEST_NAME) is None:
        raise DataError(f"A data set must have a {MANIFEST_NAME}, but {folder.url} holds none; {remedy}.")
    text = folder.read(MANIFEST_NAME)
    try:
        fields = json.loads(text)
        version = fields["version"]
        if version != VERSION:
            raise DataError(
                f"The manifest must have version {VERSION}, but {path} has version {version!r}; "
                "use the eqm-dist release that wrote it, or prepare the shards again."
            )
        # As JSON, for its tuples are lists.
        return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise DataError(
            f"The manifest {path} is damaged ({reason}); restore it, or prepare the shards again."
        ) from error


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write manifest.json whole: from here on the data set exists.

    Raises:
        StorageError: the manifest cannot be written.
    """
    folder.write(MANIFEST_NAME, (manifest.model_dump_json(indent=1) + "\n").encode())


def file_record(path: Path) -> FileRecord:
    """The record of a file as it is now.

    Raises:
        StorageError: the file cannot be read.
    """
    with storage_errors("read", path), open(path, "rb") as file:
        return record_of(file, path.name)


def record_of(file: BinaryIO, name: str) -> FileRecord:
    """The record of an open file."""
    return FileRecord(name=name, bytes=file.seek(0, os.SEEK_END), sha256=_sha256(file))


def check_size(path: Path, record: FileRecord) -> None:
    """Check that a file is there in its recorded size, without reading it.

    Raises:
        DataError: it is missing, truncated or too long.
        StorageError: the machine cannot tell.
    """
    try:
        with storage_errors("read", path):
            found = path.stat().st_size
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            found = None
        else:
            raise
    check_bytes(path, found, record)


def check_bytes(path: str | Path, found: int | None, record: FileRecord) -> None:
    """Compare the size of a file, None if there is none, with its record.

    Raises:
        DataError: it is missing, truncated or too long.
    """
    if found is None:
        raise DataError(f"{path} must be there, for the manifest lists it; restore it or prepare the data set again.")
    if found != record.bytes:
        raise DataError(
            f"{path} must have {record.bytes:,} bytes as the manifest records, found {found:,}; "
            "delete it and prepare the data set again."
        )


def check_checksum(file: BinaryIO, path: str | Path, record: FileRecord) -> None:
    """Compare all bytes of an open file with its record.

    Raises:
        DataError: they are not those that the manifest records.
        StorageError: the file cannot be read.
    """
    with storage_errors("read", path):
        found = _sha256(file)
    if found != record.sha256:
        raise DataError(
            f"{path} must have the sha256 {record.sha256[:12]}... that the manifest records, found {found[:12]}...: "
            "it was changed or damaged after it was written; delete it and prepare the data set again."
        )


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
