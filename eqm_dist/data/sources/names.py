"""Which names are those of images. Sources and measurements share it, so that all of them take the same files."""

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"})
"""Files with other endings are no images; those with these are read, and skipped with a reason if they are broken."""

logger = logging.getLogger(__name__)


def is_image(name: str) -> bool:
    """Whether a file of that name is taken for an image."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a name below a location belongs to a program: .git, .ipynb_checkpoints, __MACOSX, ._a.jpg."""
    return any((part[:1] == "." and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def without_hidden(names: Sequence[str], where: str) -> list[str]:
    """The names that are not hidden; the log says how many others there were. A file that is asked for is none."""
    if len(names) == 1 and where.endswith(names[0]):
        return list(names)
    seen = [name for name in names if not is_hidden(name)]
    if len(seen) < len(names):
        first = next(name for name in names if is_hidden(name))
        logger.warning("Left out %s hidden files of %s, %s first.", len(names) - len(seen), where, readable(first))
    return seen


def readable(name: str) -> str:
    """A name of the file system as text: bytes that are no UTF-8 are written as \\xNN, so that any file can hold it."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
