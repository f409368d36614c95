"""What a location is that a user names: a path on this machine, or a URL."""

import os
import re
from pathlib import Path, PurePosixPath

from eqm_dist.errors import DataError

MOST_BYTES, MOST_NAME_BYTES = 4095, 255
"""Of a path and of each name in it, on Linux."""
DEADLINE_S = 60.0
"""Seconds without a byte of progress after which S3 is given up, where nobody says otherwise."""
RUN_DEADLINE_S = 120.0
"""The same for a run on S3: longer than an endpoint takes to come back that was restarted."""


def local_path(location: str | Path) -> Path:
    """The absolute local path that ``location`` names; ``~`` is expanded.

    Raises:
        DataError: ``location`` is a URL. ``pipe:`` URLs stay refused for good: they run a shell.
    """
    if match := re.match(r"(pipe|[A-Za-z][A-Za-z0-9+.-]*(?=:/)):", str(location)):
        raise DataError(
            f"A location must be a local path, received the {match[1]}: URL {location}; "
            "use a local or mounted directory."
        )
    if "\0" in str(location):
        raise DataError("A location must be a local path, received one with a zero byte; correct it.")
    try:
        found = Path(location).expanduser().absolute()
        # Of the working directory too: what is recorded, printed and sent to others must be text.
        str(found).encode()
    except RuntimeError:
        raise DataError(
            f"A location with ~ needs a home directory, and there is none for {location}; set HOME, or give the whole"
            " path."
        ) from None
    except UnicodeEncodeError:
        readable = os.fsencode(Path(location).absolute()).decode("utf-8", "backslashreplace")
        raise DataError(f"A path must be text in UTF-8, received {readable}; rename its directories.") from None
    except FileNotFoundError:
        raise DataError("The working directory is gone; change to another one.") from None
    if len(str(found).encode()) > MOST_BYTES or any(len(part.encode()) > MOST_NAME_BYTES for part in found.parts):
        raise DataError(
            f"A path must have at most {MOST_BYTES:,} bytes, and a name in it {MOST_NAME_BYTES}, received"
            f" {str(location)[:50]}...; correct it."
        )
    return found


def is_remote(location: str | PurePosixPath | Path) -> bool:
    """Whether ``location`` is an s3:// URL."""
    return str(location).startswith("s3://")


class S3Path(PurePosixPath):
    """An s3:// location that is taken apart and put together as a path is; ``storage.open`` gives the folder there."""

    def __str__(self) -> str:
        return "s3://" + "/".join(self.parts[1:])

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is no path of this machine")


Location = Path | S3Path
"""A place that has names in it: a directory, or a prefix on S3."""


def to_location(location: str | Path | S3Path) -> Location:
    """What an s3:// URL or a local path names.

    Raises:
        DataError: it is another URL, or no path.
    """
    if not is_remote(location):
        return local_path(str(location))
    if re.fullmatch(r"s3://[A-Za-z0-9][A-Za-z0-9._-]+(/.*)?", str(location)) is None or "/../" in f"{location}/":
        raise DataError(f"An S3 location must be s3://BUCKET/PREFIX, received {location}; correct it.")
    return location if isinstance(location, S3Path) else S3Path(location)
