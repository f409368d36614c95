"""The manifest: what a directory of shards holds, file by file, and how to find every sample in it.

DIR/NAME-000000.tar ...    WebDataset tars: KEY.moments.npy, KEY.cls
DIR/index.npy              where each sample lies, and its class (``eqm_dist.data.index``)
DIR/manifest.json          written last: a data set exists when its manifest exists
"""

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from eqm_dist.data.bounds import MAX_CLASSES, MAX_MOMENTS_BYTES, MAX_TEXT_BYTES
from eqm_dist.documents import from_json
from eqm_dist.errors import DataError, StorageError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.open import open_folder

VERSION = 1
MANIFEST_NAME = "manifest.json"

MAX_COUNT = 2**62
"""Of bytes and samples: their sums fit into 64 bits."""
MAX_FILE_NAME_BYTES = 255


def is_file_name(name: str) -> bool:
    """Whether a manifest may list a file of that name: of any script, visible, and not outside its directory."""
    forbidden = re.search(r"[/\\:]", name) or name.startswith(".") or not name.isprintable()
    return bool(name) and not forbidden and len(name.encode()) <= MAX_FILE_NAME_BYTES


def _file_name(name: str) -> str:
    # A manifest comes with data from elsewhere: a name must not lead out of its directory.
    if not is_file_name(name):
        raise ValueError(f"{name[:80]!r} is not the name of a file in its directory")
    return name


MomentsDtype = Literal["float16", "float32"]
Positive = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
FileName = Annotated[str, AfterValidator(_file_name)]


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
    latent_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    latent_shift: Annotated[float, Field(allow_inf_nan=False)]
    """latents = (posterior sample - latent_shift) * latent_scale."""
    dtype: MomentsDtype
    moments_shape: tuple[Annotated[int, Field(ge=1, le=2)], Positive, Positive, Positive]
    """[V, 2C, H, W]: mean, then log-variance, of the image and, with V = 2, of its mirror (flipped before encoding)."""
    num_classes: Annotated[int, Field(gt=0, le=MAX_CLASSES)]
    class_names: tuple[str, ...] = ()
    """One for each class, or none."""
    label_histogram: tuple[Count, ...]
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
        names = [record.name for record in (*self.shards, self.index)]
        if len(set(names)) < len(names):
            raise ValueError("every file must be listed once")
        if self.moments_bytes > MAX_MOMENTS_BYTES:
            raise ValueError(f"a sample must have at most {MAX_MOMENTS_BYTES:,} bytes, not {self.moments_bytes:,}")
        return self

    @property
    def moments_bytes(self) -> int:
        """Bytes of the moments of one sample."""
        return math.prod(self.moments_shape) * {"float16": 2, "float32": 4}[self.dtype]

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents that the moments describe."""
        _, channels, height, width = self.moments_shape
        return channels // 2, height, width


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

    def check(self) -> None:
        """See that a manifest can say all this, before anything is computed.

        Raises:
            DataError: it cannot.
        """
        if not 0 < self.num_classes <= MAX_CLASSES:
            raise DataError(f"Classes must be 1 to {MAX_CLASSES:,}, but {self.source} has {self.num_classes:,}.")
        nothing = {"bytes": 8, "sha256": "0" * 64}
        describe(
            self,
            dtype="float32",
            moments_shape=(1, 2, 1, 1),
            label_histogram=(1, *(0,) * (self.num_classes - 1)),
            shards=(ShardRecord(name="shard.tar", samples=1, **nothing),),
            index=FileRecord(name="index.npy", **nothing),
        )


def describe(
    description: Description,
    *,
    dtype: str,
    moments_shape: Sequence[int],
    label_histogram: Sequence[int],
    shards: Sequence[ShardRecord],
    index: FileRecord,
) -> Manifest:
    """The manifest of these files.

    Raises:
        DataError: there is none that could hold all this.
    """
    fields = {**vars(description), "dtype": dtype, "moments_shape": tuple(moments_shape)}
    try:
        return Manifest.model_validate(
            {**fields, "label_histogram": tuple(label_histogram), "shards": tuple(shards), "index": index}
        )
    except ValidationError as error:
        raise DataError(f"A data set must be one that a manifest can describe, but {_reason(error)}.") from error


def read_manifest(location: str | Path | Folder) -> Manifest:
    """Read and check the manifest.json of a local directory or an s3:// prefix.

    Raises:
        DataError: there is no data set, its format is unknown, or its manifest is damaged.
        StorageError: the manifest cannot be read.
    """
    folder = open_folder(location) if isinstance(location, (str, Path)) else location
    path = f"{folder.url}/{MANIFEST_NAME}"
    remote = not isinstance(folder, LocalFolder)
    staging = " --staging DIR" if remote else ""
    remedy = f"prepare one with `python pipelines/prepare_shards.py --source digits{staging} --out {folder.url}`"
    if not remote and not Path(folder.url).is_dir():
        raise DataError(f"Shards must lie in a directory, but {folder.url} does not exist; {remedy}.")
    size = folder.size(MANIFEST_NAME)
    if size is None:
        folder.list()  # where there is no bucket, S3 says so here, and nothing can be prepared into it
        raise DataError(f"A data set must have a {MANIFEST_NAME}, but {folder.url} holds none; {remedy}.")
    if size > MAX_TEXT_BYTES:
        raise DataError(f"A manifest must have at most {MAX_TEXT_BYTES:,} bytes, but {path} has {size:,}; restore it.")
    return parse_manifest(folder.read(MANIFEST_NAME), path)


def parse_manifest(text: bytes, path: str) -> Manifest:
    """The manifest that a text is; ``path`` is what it is called in errors.

    Raises:
        DataError: its format is unknown, or it is damaged.
    """
    try:
        version = from_json(text)["version"]
        if version != VERSION:
            raise DataError(
                f"The manifest must have version {VERSION}, but {path} has version {repr(version)[:40]}; "
                "use the eqm-dist release that wrote it, or prepare the shards again."
            )
        # As JSON, for its tuples are lists.
        return Manifest.model_validate_json(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = _reason(error) if isinstance(error, ValidationError) else repr(error)
        raise DataError(
            f"The manifest {path} is damaged ({reason}); restore it, or prepare the shards again."
        ) from error


def _reason(error: ValidationError) -> str:
    """The first fault in one line: where, and what."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return " ".join(f"{where}: {reason}".removeprefix(": ").split())[:300]


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
