"""What a location is that a user names: a path on this machine, or a URL."""

import re
from pathlib import Path

from eqm_dist.errors import DataError

DEADLINE_S = 60.0
"""Seconds without a byte of progress after which S3 is given up, where nobody says otherwise."""


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
    return Path(location).expanduser().absolute()


def is_remote(location: str | Path) -> bool:
    """Whether ``location`` is an s3:// URL."""
    return str(location).startswith("s3://")
