"""Whether the messages of an Arrow stream are packed, which pyarrow unpacks without a limit and does not tell.

A message is a flatbuffer (Apache Arrow, format/Message.fbs): its third field is its header, of which a record batch
(and a dictionary's, in the second field of its header) has the compression as fourth.
"""

import struct

import pyarrow as pa
import pyarrow.ipc as ipc

_HEADER = 2
_COMPRESSION = 3
_DICTIONARY_DATA = 1


def is_compressed(content: pa.NativeFile) -> bool:
    """Whether a message from here on has compressed buffers; the file is left somewhere behind.

    Raises:
        ValueError: these are no Arrow messages.
    """
    try:
        return any(
            _is_packed(message.metadata.to_pybytes(), message.type == "dictionary")
            for message in ipc.MessageReader.open_stream(content)
            if message.type in ("record batch", "dictionary")
        )
    except struct.error as error:
        raise ValueError(f"a message is damaged: {error}") from error


def _is_packed(message: bytes, is_dictionary: bool) -> bool:
    (root,) = struct.unpack_from("<I", message, 0)
    batch = _table(message, root, _HEADER)
    if batch is not None and is_dictionary:
        batch = _table(message, batch, _DICTIONARY_DATA)
    return batch is not None and _table(message, batch, _COMPRESSION) is not None


def _table(message: bytes, table: int, field: int) -> int | None:
    """Where the table in a field of a table begins; None where the field is not set."""
    (back,) = struct.unpack_from("<i", message, table)
    fields = table - back
    (size,) = struct.unpack_from("<H", message, fields)
    place = 4 + 2 * field
    offset = struct.unpack_from("<H", message, fields + place)[0] if place + 2 <= size else 0
    if not offset:
        return None
    (forward,) = struct.unpack_from("<I", message, table + offset)
    return table + offset + forward
