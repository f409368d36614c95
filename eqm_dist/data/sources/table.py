"""Images in the rows of a Parquet or Arrow table, as Hugging Face's data sets have them."""

import glob
import json
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet

from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.storage import local_path, storage_errors
from eqm_dist.errors import DataError


class _Piece(NamedTuple):
    """What is read at once: a row group of a Parquet file, or a whole Arrow file (which is mapped, not read)."""

    path: Path
    group: int
    modified_ns: int


class ImageTable:
    """A column of image files (bytes, or a struct with a field ``bytes``) and a column of integer classes.

    Args:
        location: a .parquet or .arrow file, a directory of such files, or a glob.
        image_column: of the images.
        label_column: of the classes.

    Raises:
        DataError: there is no such table, it lacks a column, or a row has no class.
        StorageError: a file cannot be read.
    """

    def __init__(self, location: str | Path, *, image_column: str = "image", label_column: str = "label") -> None:
        files = _files(local_path(location))
        self._columns = (image_column, label_column)
        self._pieces = [piece for path in files for piece in _pieces(path, self._columns)]
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
        self.class_names = _class_names(files[0], label_column)
        self.num_classes = max(int(self._labels.max()) + 1, len(self.class_names))
        sizes = sum(path.stat().st_size for path in files)
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
            yield RawImage(f"{number:08d}", f"{piece.path.name}: row {number}", content, int(self._labels[number]))


def _files(location: Path) -> list[Path]:
    if location.is_dir():
        found = sorted([*location.glob("*.parquet"), *location.glob("*.arrow")])
    else:
        found = [Path(path) for path in sorted(glob.glob(str(location), recursive=True))]
    if not found:
        raise DataError(
            f"A table of images must exist, but {location} names no Parquet or Arrow file; correct --input."
        )
    return found


def _pieces(path: Path, columns: tuple[str, str]) -> list[_Piece]:
    schema = _schema(path)
    missing = [column for column in columns if column not in schema.names]
    if missing:
        raise DataError(
            f"The table {path} must have the columns {' and '.join(columns)}, found {', '.join(schema.names)}; "
            "name them with --image-column and --label-column."
        )
    kind = schema.field(columns[0]).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise DataError(
            f"The column {columns[0]} of {path} must hold the bytes of image files, found {kind}; "
            "name another with --image-column."
        )
    groups = 1 if path.suffix == ".arrow" else parquet.read_metadata(path).num_row_groups
    return [_Piece(path, group, path.stat().st_mtime_ns) for group in range(groups)]


def _schema(path: Path) -> pa.Schema:
    try:
        with storage_errors("read", path):
            return _arrow(path).schema if path.suffix == ".arrow" else parquet.read_schema(path)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path} must be a Parquet or Arrow file ({str(error).splitlines()[0]}); replace it."
        ) from error


@lru_cache(maxsize=2)  # rows are read in order, so that one row group is in use, or two at their border
def _read(piece: _Piece, columns: tuple[str, ...]) -> pa.Table:
    try:
        with storage_errors("read", piece.path):
            if piece.path.suffix == ".arrow":
                return _arrow(piece.path).select(list(columns))
            with parquet.ParquetFile(piece.path) as file:
                return file.read_row_group(piece.group, columns=list(columns)).select(list(columns))
    except pa.ArrowInvalid as error:
        raise DataError(f"{piece.path} is damaged ({str(error).splitlines()[0]}); replace it.") from error


def _arrow(path: Path) -> pa.Table:
    """Arrow has two formats of one suffix: files, and streams, which Hugging Face's caches are."""
    content = pa.memory_map(str(path))
    try:
        return ipc.open_file(content).read_all()
    except pa.ArrowInvalid:
        content.seek(0)
        return ipc.open_stream(content).read_all()


def _class_names(path: Path, label_column: str) -> tuple[str, ...]:
    metadata = (_schema(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        return tuple(json.loads(metadata)["info"]["features"][label_column]["names"])
    except (ValueError, KeyError, TypeError):
        return ()
