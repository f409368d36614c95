"""What a tar holds, read from its headers alone. Tars come from others, so every number in them is checked.

Python's ``tarfile`` is not used to walk through a tar: up to 3.11.13 a negative size makes it go round for ever, it
reads an extended header of any size into memory, and it takes a damaged header for the end of the tar.
"""

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from eqm_dist.data.bounds import MAX_NAME_BYTES

BLOCK = tarfile.BLOCKSIZE
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int


def read_members(file: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """The files of a tar in their order. A link to a file that comes before it is that file under another name.

    Time and memory are in proportion to the headers.

    Args:
        file: the tar, not compressed; it may be read elsewhere between two members.
        wanted: which names; others are passed over, as are directories.

    Raises:
        ValueError: it is truncated, damaged or no tar, or a wanted file has no bytes of its own in one place.
        OSError: it cannot be read.
    """
    end, at = file.seek(0, os.SEEK_END), 0
    known: dict[str, TarMember] = {}
    extended: dict[str, str] = {}
    while at < end:
        block = _read(file, at, BLOCK)
        if not block.strip(b"\0"):
            _check_rest(file, at, end)
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"the header at byte {at:,} is damaged: {error}") from error
        at += BLOCK
        if header.type in (*_LONG, *_PAX, tarfile.XGLTYPE):
            content = _extension(file, at, header.size, end)
            if header.type in _LONG:
                extended[_LONG[header.type]] = content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif header.type in _PAX:
                extended |= _records(content)
            # What a global header says of all members is their date and owner, which nobody needs.
            at += _padded(header.size)
            continue
        name, target = extended.get("path", header.name), extended.get("linkpath", header.linkname)
        size = _size(extended.get("size"), header.size)
        sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended)
        extended = {}
        if sparse:
            raise ValueError(f"{name} is stored as a sparse file; pack the tar without --sparse")
        if header.type in _LINKS:
            found = known.get(_target(name, target, header.type == tarfile.SYMTYPE))
            if found is not None:
                known[posixpath.normpath(name)] = found
            if not wanted(name):
                continue
            if found is None:
                raise ValueError(
                    f"{name} is a link to {target}, which does not come before it; pack with --dereference"
                )
            yield found._replace(name=name)
            continue
        if header.type in tarfile.SUPPORTED_TYPES and not header.isreg():
            continue
        if size < 0 or at + size > end:
            raise ValueError(f"{name} has {size:,} bytes by its header, and {end - at:,} follow")
        if header.isreg():
            member = known[posixpath.normpath(name)] = TarMember(name, at, size)
            if wanted(name):
                yield member
        at += _padded(size)
    raise ValueError("it is empty" if not end else "it ends without the empty block that ends a tar, so it may be cut")


def _target(name: str, target: str, symbolic: bool) -> str:
    """The member that a link means: hard links name it from the top of the tar, symbolic ones from where they lie."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target) if symbolic else target)


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it ends within a header")
    return content


def _extension(file: BinaryIO, at: int, size: int, end: int) -> bytes:
    if not 0 <= size <= min(MAX_NAME_BYTES, end - at):
        raise ValueError(f"a name at byte {at:,} has {size:,} bytes, and at most {MAX_NAME_BYTES:,} are read")
    return _read(file, at, size)


def _records(content: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header."""
    found = {}
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 6 else 0
        key, equals, value = content[len(length) + 1 : count - 1].partition(b"=")
        if not space or not equals or not len(length) < count <= len(content):
            raise ValueError("a pax header is damaged")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        content = content[count:]
    return found


def _size(text: str | None, stored: int) -> int:
    if text is None:
        return stored
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"a pax header has the size {text[:20]!r}")
    return int(text)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_rest(file: BinaryIO, at: int, end: int) -> None:
    """See that nothing comes after the end of the tar: readers would pass over a second tar without a word."""
    file.seek(at)
    while at < end:
        content = file.read(min(end - at, 1 << 20))
        if not content:
            return
        if content.strip(b"\0"):
            raise ValueError(f"something follows its end, after byte {at:,}; unpack tars that were joined, pack one")
        at += len(content)
