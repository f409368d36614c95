"""From a location to the folder that it names, and from a name in it to a file that is whole and here."""

import functools
import tempfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.location import DEADLINE_S, RUN_DEADLINE_S, Location, S3Path, is_remote
from eqm_dist.storage.s3 import S3Folder


def open_folder(location: str | Path | PurePosixPath, *, deadline_s: float | None = None) -> Folder:
    """The local directory or s3:// prefix that ``location`` names; it need not exist.

    Args:
        location: a path, or s3://BUCKET/PREFIX.
        deadline_s: how long S3 may answer with errors, or not at all, before it is given up; None for
            ``DEADLINE_S``.

    Raises:
        DataError: any other kind of URL. ``pipe:`` URLs stay refused for good: they run a shell.
        StorageError: S3 is not configured.
    """
    if not is_remote(location):
        return LocalFolder(str(location))
    return S3Folder(str(location), DEADLINE_S if deadline_s is None else deadline_s)


def open_s3(location: S3Path, *, deadline_s: float | None = None) -> S3Folder:
    """As ``open_folder``, for a run on S3; by default within ``RUN_DEADLINE_S``."""
    return S3Folder(str(location), RUN_DEADLINE_S if deadline_s is None else deadline_s)


def open_whole(folder: Folder, name: str) -> BinaryIO:
    """A whole file, open for reading here: itself if it is local, otherwise a copy that goes when it is closed.

    Raises:
        StorageError: it is missing or cannot be read, or there is no room for the copy.
    """
    if isinstance(folder, LocalFolder):
        return folder.open(name)
    with storage_errors("keep a copy of", f"{folder.url}/{name}"):
        file = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            folder.download(name, file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file


def local_copy(place: Location, name: str) -> Path:
    """A file of a place as a path of this machine: itself, or a copy that goes with this process; absent if it is.

    Raises:
        StorageError: it cannot be read, or there is no room for the copy.
    """
    if isinstance(place, Path):
        return place / name
    path = Path(_copies().name, *place.parts[1:], name)
    folder = open_s3(place)
    if folder.size(name) is not None:
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                folder.download(name, file)
    return path


@functools.cache
def _copies() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="eqm-dist-")
