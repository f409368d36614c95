"""Images in the rows of a Parquet or Arrow table, as Hugging Face's data sets have them."""

import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet

from eqm_dist.data.sources.files import find_files
from eqm_dist.data.sources.image import RawImage
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.location import DEADLINE_S


class _Piece(NamedTuple):
    """What is read at once: a row group of a Parquet file, or a whole Arrow file (which is mapped if it is local)."""

    folder: Folder
    file: str
    group: int

    @property
    def url(self) -> str:
        return f"{self.folder.url}/{self.file}"


class ImageTable:
    """A column of image files (bytes, or a struct with a field ``bytes``) and a column of integer classes.

    Args:
        location: a .parquet or .arrow file, a directory of such files, or a glob, on this machine or on s3://.
        image_column: of the images.
        label_column: of the classes.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: there is no such table, it lacks a column, or a row has no class.
        StorageError: a file cannot be read.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        image_column: str = "image",
        label_column: str = "label",
        deadline_s: float = DEADLINE_S,
    ) -> None:
        folder, files = find_files(str(location), [".parquet", ".arrow"], deadline_s)
        if not files:
            raise DataError(
                f"A table of images must exist, but {location} names no Parquet or Arrow file; correct --input."
            )
        self._columns = (image_column, label_column)
        self._pieces = [piece for file in files for piece in _pieces(folder, file, self._columns)]
        lengths = [len(_read(piece, (label_column,))) for piece in self._pieces]
        self._first = [0, *accumulate(lengths)]
        labels = pa.chunked_array(
            [chunk for piece in self._pieces for chunk in _read(piece, (label_column,)).column(0).chunks]
        )
        if not pa.types.is_integer(labels.type) or labels.null_count or not len(labels):
            raise DataError(
                f"The column {label_column} of {location} must hold an integer in every row, found {labels.type} with "
                f"{labels.null_count} empty of {len(labels)}; name another with --label-column."
            )
        self._labels = labels.to_numpy()
        if self._labels.min() < 0:
            raise DataError(f"Classes must be 0 or more, but the lowest of {location} is {self._labels.min()}.")
        self.class_names = _class_names(self._pieces[0], label_column)
        self.num_classes = max(int(self._labels.max()) + 1, len(self.class_names))
        sizes = sum(folder.size(file) or 0 for file in files)
        self.id = f"table {Path(location).name} ({len(files)} files, {len(self)} rows, {sizes} bytes)"

    def __len__(self) -> int:
        return self._first[-1]

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The rows [start, stop)."""
        for number in range(start, stop):
            at = int(np.searchsorted(self._first, number, side="right")) - 1
            piece, row = self._pieces[at], number - self._first[at]
            cell = _read(piece, self._columns).column(self._columns[0])[row].as_py()
            content = (cell.get("bytes") if isinstance(cell, dict) else cell) or b""
            yield RawImage(
                f"{number:08d}", f"{PurePosixPath(piece.file).name}: row {number}", content, int(self._labels[number])
            )


def _pieces(folder: Folder, file: str, columns: tuple[str, str]) -> list[_Piece]:
    first = _Piece(folder, file, 0)
    schema = _schema(first)
    missing = [column for column in columns if column not in schema.names]
    if missing:
        raise DataError(
            f"The table {first.url} must have the columns {' and '.join(columns)}, found {', '.join(schema.names)}; "
            "name them with --image-column and --label-column."
        )
    kind = schema.field(columns[0]).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise DataError(
            f"The column {columns[0]} of {first.url} must hold the bytes of image files, found {kind}; "
            "name another with --image-column."
        )
    if file.endswith(".arrow"):
        return [first]
    with folder.open(file) as opened:
        return [_Piece(folder, file, group) for group in range(parquet.read_metadata(opened).num_row_groups)]


def _schema(piece: _Piece) -> pa.Schema:
    try:
        with storage_errors("read", piece.url):
            if piece.file.endswith(".arrow"):
                return _arrow(piece).schema
            with piece.folder.open(piece.file) as file:
                return parquet.read_schema(file)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{piece.url} must be a Parquet or Arrow file ({str(error).splitlines()[0]}); replace it."
        ) from error


@lru_cache(maxsize=2)  # rows are read in order, so that one row group is in use, or two at their border
def _read(piece: _Piece, columns: tuple[str, ...]) -> pa.Table:
    try:
        with storage_errors("read", piece.url):
            if piece.file.endswith(".arrow"):
                return _arrow(piece).select(list(columns))
            with piece.folder.open(piece.file) as opened, parquet.ParquetFile(opened) as file:
                return file.read_row_group(piece.group, columns=list(columns)).select(list(columns))
    except pa.ArrowInvalid as error:
        raise DataError(f"{piece.url} is damaged ({str(error).splitlines()[0]}); replace it.") from error


def _arrow(piece: _Piece) -> pa.Table:
    """Arrow has two formats of one suffix: files, and streams, which Hugging Face's caches are."""
    if isinstance(piece.folder, LocalFolder):
        content = pa.memory_map(piece.url)
    else:
        content = pa.BufferReader(piece.folder.read(piece.file))
    try:
        return ipc.open_file(content).read_all()
    except pa.ArrowInvalid:
        content.seek(0)
        return ipc.open_stream(content).read_all()


def _class_names(piece: _Piece, label_column: str) -> tuple[str, ...]:
    metadata = (_schema(piece).metadata or {}).get(b"huggingface", b"{}")
    try:
        return tuple(json.loads(metadata)["info"]["features"][label_column]["names"])
    except (ValueError, KeyError, TypeError):
        return ()
