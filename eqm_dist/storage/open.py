"""From a location to the folder that it names, and from a name in it to a file that is whole and here."""

import tempfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.location import DEADLINE_S, RUN_DEADLINE_S, S3Path, is_remote
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
