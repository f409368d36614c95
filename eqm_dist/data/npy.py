"""Arrays in NumPy's .npy format, read without Python's compiler.

NumPy parses the header of an .npy file with ``ast.literal_eval``, which may fail when several threads do so at once:
Python 3.11 counts the depth of its parser for the whole process (``SystemError: AST constructor recursion depth
mismatch``). Shards are opened, indexed and verified in pools of threads, so here the header is matched against what
NumPy writes into it. Nothing is evaluated or unpickled.
"""

import math
import re
from typing import IO, NamedTuple

import numpy as np

MAGIC = b"\x93NUMPY"
VERSIONS = {b"\x01\x00": (2, "latin1"), b"\x02\x00": (4, "latin1"), b"\x03\x00": (4, "utf8")}
"""Bytes of the number that says how long the header is, and the encoding of the header."""
MAX_HEADER_BYTES = 10_000
"""Far above what any array of numbers needs; NumPy has the same limit."""
READ_BYTES = 16 << 20

# Of the literals of Python those that NumPy writes, and what other writers of such files put between them. White space
# matches in one way only wherever it may be, so that a hostile header costs no more time than its length.
_S = r"[ \t\n]*"
_TEXT = r"""(?:'[^'\\\x00-\x1f]+'|"[^"\\\x00-\x1f]+")"""
_FIELD = rf"\({_S}{_TEXT}{_S},{_S}{_TEXT}{_S}\){_S}"
_FIELDS = rf"\[{_S}{_FIELD}(?:,{_S}{_FIELD})*(?:,{_S})?\]"
_SIZE = rf"(?:0|[1-9][0-9]{{0,17}})L?{_S}"  # Python 2 wrote the L, and some published statistics are as old as that
_SHAPE = rf"\({_S}(?:{_SIZE},{_S}(?:{_SIZE},{_S})*(?:{_SIZE})?)?\)"
_ENTRY = rf"({_TEXT}){_S}:{_S}({_TEXT}|{_FIELDS}|{_SHAPE}|True|False){_S}"
_HEADER = re.compile(rf"\{{{_S}{_ENTRY},{_S}{_ENTRY},{_S}{_ENTRY}(?:,{_S})?\}}{_S}")
_DTYPE = re.compile(r"[<>=|]?(?:[biufcSUV][0-9]{1,5}|[mM]8(?:\[[0-9]{0,9}[A-Za-z]{1,7}\])?|O[48]?)")


class NpyHeader(NamedTuple):
    """What an .npy file says of its array."""

    shape: tuple[int, ...]
    fortran_order: bool
    """Whether the first axis changes fastest in the file."""
    dtype: np.dtype


def read_header(file: IO[bytes]) -> NpyHeader:
    """Read the header, and leave the file where the array begins.

    Args:
        file: at its first byte; buffered, so that a read returns less only at the end.

    Raises:
        ValueError: it is not one that NumPy writes for numbers, text, times, objects, or records of such.
    """
    prefix = file.read(len(MAGIC) + 2)
    if prefix[: len(MAGIC)] != MAGIC:
        raise ValueError(f"it begins with {prefix!r} instead of {MAGIC!r}")
    if prefix[len(MAGIC) :] not in VERSIONS:
        raise ValueError(f"it is of npy format {'.'.join(map(str, prefix[len(MAGIC) :]))} instead of 1.0, 2.0 or 3.0")
    length_bytes, encoding = VERSIONS[prefix[len(MAGIC) :]]
    length = int.from_bytes(_exactly(file, length_bytes), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    text = _exactly(file, length).decode(encoding)
    match = _HEADER.fullmatch(text)
    parts = match.groups() if match else ()
    values = {key[1:-1]: value for key, value in zip(parts[::2], parts[1::2], strict=True)}
    if values.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError(f"its header must have descr, fortran_order and shape, and is {text.strip()[:200]!r}")
    descr, fortran_order, shape = values["descr"], values["fortran_order"], values["shape"]
    if descr[0] not in "'\"[" or fortran_order not in ("True", "False") or shape[0] != "(":
        raise ValueError(f"its header has values of the wrong kind: {text.strip()[:200]!r}")
    sizes = tuple(map(int, re.findall(r"[0-9]+", shape)))
    return NpyHeader(sizes, fortran_order == "True", _dtype(descr))


def read_array(file: IO[bytes], most_bytes: int | None = None) -> np.ndarray:
    """The array of an .npy file, in memory and writable. Memory is taken for what the file holds, not for what it says.

    Args:
        file: as for ``read_header``.
        most_bytes: of an array that is read; None for any, where the file is not packed, or one's own.

    Raises:
        ValueError: as there; or it holds objects, which would have to be unpickled, or ends too early, or is too large.
    """
    shape, fortran_order, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled")
    size = math.prod(shape) * dtype.itemsize
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"it has {size:,} bytes by its header, more than {most_bytes:,}")
    content = read_up_to(file, size)
    if len(content) < size:
        raise ValueError(f"it has {len(content):,} bytes for an array of shape {list(shape)} and dtype {dtype}")
    return np.ndarray(shape, dtype, content, order="F" if fortran_order else "C")


def read_up_to(file: IO[bytes], count: int) -> bytearray:
    """The next ``count`` bytes, or what there is. ``file.read(count)`` would take memory before it has the bytes."""
    content = bytearray()
    while len(content) < count and (part := file.read(min(count - len(content), READ_BYTES))):
        content += part
    return content


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it ends within its header")
    return content


def _dtype(descr: str) -> np.dtype:
    """The dtype of a header's text: 'DTYPE', or [('NAME', 'DTYPE'), ...]."""
    # NumPy has parts of some other texts evaluated, too, such as '(2,)f4', so none of them reaches it.
    texts = [each[1:-1] for each in re.findall(_TEXT, descr)]
    names, types = (texts[::2], texts[1::2]) if descr[0] == "[" else ([], texts)
    for each in types:
        if not _DTYPE.fullmatch(each):
            raise ValueError(f"its header has the unknown dtype {each!r}")
    try:
        return np.dtype(list(zip(names, types, strict=True)) if names else types[0])
    except TypeError as error:
        raise ValueError(f"its header has no valid dtype: {descr[:200]} ({error})") from error
