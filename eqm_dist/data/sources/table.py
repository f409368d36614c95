"""Images in the rows of a Parquet or Arrow table, as Hugging Face's data sets have them."""

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as parquet

from eqm_dist.data.bounds import MAX_IMAGE_BYTES, MAX_ROWS
from eqm_dist.data.labels import check_label
from eqm_dist.data.sources.arrow_messages import is_compressed
from eqm_dist.data.sources.files import find_files
from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.sources.names import readable, without_hidden
from eqm_dist.documents import from_json
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.location import DEADLINE_S

FILE_MAGIC = b"ARROW1\0\0"


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
        folder, found = find_files(str(location), [".parquet", ".arrow"], deadline_s)
        self._folder, self._files = folder, without_hidden(found, str(location))
        if not self._files:
            raise DataError(
                f"A table of images must exist, but {location} names no Parquet or Arrow file; correct --input."
            )
        self._columns = (image_column, label_column)
        self._pieces = [piece for file in self._files for piece in _pieces(folder, file, self._columns)]
        labels = [_labels(piece, label_column) for piece in self._pieces]
        self._first = [0, *accumulate(map(len, labels))]
        if not len(self):
            raise DataError(f"A table of images must have a row, but {location} has none; correct --input.")
        self._labels = np.concatenate(labels)
        for label in (int(self._labels.min()), int(self._labels.max())):
            check_label(label, f"the column {label_column} of {location}")
        self.class_names = _class_names(self._pieces[0], label_column)
        self.num_classes = max(int(self._labels.max()) + 1, len(self.class_names))
        listing = hashlib.sha256("\0".join(self._files).encode("utf-8", "surrogateescape"))
        listing.update(self._labels.tobytes())
        name = readable(Path(location).name)
        self.id = f"table {name} ({len(self._files)} files, {len(self)} rows, listing {listing.hexdigest()[:12]})"

    def __len__(self) -> int:
        return self._first[-1]

    def versions(self) -> Sequence[str]:
        """See ``RawSource``."""
        return self._folder.versions(self._files)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The rows [start, stop)."""
        for number in range(start, stop):
            at = int(np.searchsorted(self._first, number, side="right")) - 1
            piece = self._pieces[at]
            name = f"{PurePosixPath(piece.file).name}: row {number}"
            content = _cells(piece, self._columns[0]).cell(number - self._first[at])
            yield RawImage(f"{number:08d}", name, content, int(self._labels[number]))


class _Cells:
    """The image column of a piece, read forward one row at a time.

    A few bytes of a column may stand for gigabytes, as one picture in a dictionary that every row names. So no more
    than the page that a row lies in is unpacked, and of its rows this one.
    """

    def __init__(self, piece: _Piece, column: str) -> None:
        self._piece, self._column = piece, column
        self._batches = _batches(piece, column)
        self._batch = pa.nulls(0)
        self._first = self._stop = 0

    def cell(self, row: int) -> bytes:
        """The bytes of an image; none where the cell is empty."""
        if row < self._first:
            self.__init__(self._piece, self._column)
        while row >= self._stop:
            with _table_errors(self._piece):
                self._batch = next(self._batches)
            self._first, self._stop = self._stop, self._stop + len(self._batch)
        with _table_errors(self._piece):
            cell = self._batch[row - self._first]
            if pa.types.is_struct(cell.type) and cell.is_valid:
                cell = cell["bytes"]
            return bytes(cell.as_buffer()[: MAX_IMAGE_BYTES + 1]) if cell.is_valid else b""


@lru_cache(maxsize=2)  # rows are read in order, so that one piece is in use, or two at their border
def _cells(piece: _Piece, column: str) -> _Cells:
    return _Cells(piece, column)


def _batches(piece: _Piece, column: str) -> Iterator[pa.Array]:
    """The parts of a column in their order: rows of a Parquet file, batches of an Arrow file, which is mapped."""
    if piece.file.endswith(".arrow"):
        yield from (batch.column(column) for batch in _arrow(piece, (column,)))
        return
    with piece.folder.open(piece.file) as opened, parquet.ParquetFile(opened) as file:
        for batch in file.iter_batches(batch_size=1, row_groups=[piece.group], columns=[column]):
            yield batch.column(column)


def _labels(piece: _Piece, column: str) -> np.ndarray:
    """The classes of a piece, int64."""
    with _table_errors(piece):
        if piece.file.endswith(".arrow"):
            chunks = [batch.column(column) for batch in _arrow(piece, (column,))]
        else:
            with piece.folder.open(piece.file) as opened, parquet.ParquetFile(opened) as file:
                rows = file.metadata.row_group(piece.group).num_rows
                _check_rows(rows, piece)
                chunks = [
                    batch.column(column) for batch in file.iter_batches(row_groups=[piece.group], columns=[column])
                ]
    _check_rows(sum(map(len, chunks)), piece)
    parts = [np.empty(0, np.int64)]
    for chunk in chunks:
        if not pa.types.is_integer(chunk.type) or chunk.null_count:
            raise DataError(
                f"The column {column} of {piece.url} must hold an integer in every row, found {chunk.type} with "
                f"{chunk.null_count} empty of {len(chunk)}; name another with --label-column."
            )
        values = chunk.to_numpy(zero_copy_only=False)
        if values.size:
            check_label(int(values.max()), f"the column {column} of {piece.url}")
        parts.append(values.astype(np.int64))
    return np.concatenate(parts)


def _check_rows(rows: int, piece: _Piece) -> None:
    if rows > MAX_ROWS:
        raise DataError(f"A table may have {MAX_ROWS:,} rows, but {piece.url} has {rows:,}; divide it.")


@contextmanager
def _table_errors(piece: _Piece) -> Iterator[None]:
    """Turn what is wrong with a table, or with the machine, into one sentence."""
    try:
        with storage_errors("read", piece.url):
            try:
                yield
            except OSError as error:
                if error.errno is None:  # pyarrow's word for damage; the machine's faults have a number
                    raise ValueError(str(error)) from error
                raise
    except (pa.ArrowException, ValueError, StopIteration, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{piece.url} must be a Parquet or Arrow file ({reason}); replace it.") from error


def _pieces(folder: Folder, file: str, columns: tuple[str, str]) -> list[_Piece]:
    first = _Piece(folder, file, 0)
    with _table_errors(first):  # a damaged schema may have names that are no text
        _check_columns(first, columns)
    if file.endswith(".arrow"):
        with _table_errors(first):
            if any(_names_only(batch.column(columns[0])) for batch in _arrow(first, columns[:1])):
                raise _without_bytes(first, columns[0])
        return [first]
    with _table_errors(first), folder.open(file) as opened:
        metadata = parquet.read_metadata(opened)
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group)
        for column in map(rows.column, range(rows.num_columns)):
            facts = column.statistics if column.path_in_schema in (columns[0], f"{columns[0]}.bytes") else None
            if facts is not None and facts.has_null_count and rows.num_rows and facts.null_count >= rows.num_rows:
                raise _without_bytes(first, columns[0])
    return [_Piece(folder, file, group) for group in range(metadata.num_row_groups)]


def _check_columns(piece: _Piece, columns: tuple[str, str]) -> None:
    """See that a file has the columns, and bytes of images in the first.

    Raises:
        DataError: says what it has.
    """
    schema = _schema(piece)
    missing = [column for column in columns if column not in schema.names]
    if missing:
        raise DataError(
            f"The table {piece.url} must have the columns {' and '.join(columns)}, found {', '.join(schema.names)}; "
            "name them with --image-column and --label-column."
        )
    kind = schema.field(columns[0]).type
    content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise DataError(
            f"The column {columns[0]} of {piece.url} must hold the bytes of image files, found {kind}; "
            "name another with --image-column."
        )


def _names_only(cells: pa.Array) -> bool:
    contents = cells.field("bytes") if pa.types.is_struct(cells.type) else cells
    return len(contents) > 0 and contents.null_count == len(contents)


def _without_bytes(piece: _Piece, column: str) -> DataError:
    return DataError(
        f"The column {column} of {piece.url} must hold the bytes of images, but its cells are empty or name files; "
        "write the table again with the images in it."
    )


def _schema(piece: _Piece) -> pa.Schema:
    with _table_errors(piece):
        if piece.file.endswith(".arrow"):
            with _arrow_stream(piece) as reader:
                return reader.schema
        with piece.folder.open(piece.file) as file:
            return parquet.read_schema(file)


def _arrow(piece: _Piece, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file, each checked: its offsets come from others, and are followed without a look."""
    with _arrow_stream(piece) as reader:
        for batch in reader:
            selected = batch.select(list(columns))
            selected.validate(full=True)
            yield selected


def _arrow_stream(piece: _Piece) -> ipc.RecordBatchStreamReader:
    """The messages of an Arrow file. There are two formats of one suffix: streams, which Hugging Face's caches are, and
    files, which are a stream between a word and a table of contents that nobody needs to read it forward.

    Raises:
        ValueError: it is packed: a few bytes might become any number.
    """
    if isinstance(piece.folder, LocalFolder):
        # Not pyarrow's own map, which takes names that are text only.
        with piece.folder.open(piece.file) as file:
            content = pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    else:
        content = pa.BufferReader(piece.folder.read(piece.file))
    start = len(FILE_MAGIC) if content.read(len(FILE_MAGIC)) == FILE_MAGIC else 0
    content.seek(start)
    if is_compressed(content):
        raise ValueError("its buffers are compressed; write it without compression, or as Parquet")
    content.seek(start)
    return ipc.open_stream(content)


def _class_names(piece: _Piece, label_column: str) -> tuple[str, ...]:
    metadata = (_schema(piece).metadata or {}).get(b"huggingface", b"{}")
    try:
        names = from_json(metadata)["info"]["features"][label_column]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
