"""Which files a location stands for: one, those of a directory, or those that match a glob; local or on S3 alike."""

import glob
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.location import is_remote, local_path
from eqm_dist.storage.open import open_folder


def find_files(location: str, suffixes: Sequence[str], deadline_s: float) -> tuple[Folder, list[str]]:
    """A folder and the names of the files in it that ``location`` stands for, in their order; none if there are none.

    Args:
        location: of a file; of a directory, for the files directly in it that end in one of ``suffixes``; or a glob,
            in which ``**`` stands for any number of directories. What is there under a name is meant by it, whatever
            characters it has: ``[`` begins a pattern only where no file or directory is called so.
        suffixes: with their dots.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: a kind of URL that is not known.
        StorageError: the storage cannot tell.
    """
    parts = (location if is_remote(location) else str(local_path(location))).rstrip("/").split("/")
    first, folder = _first_pattern(parts, deadline_s)
    if folder is None:
        directory = open_folder("/".join(parts), deadline_s=deadline_s)
        names = [name for name in directory.list() if name.endswith(tuple(suffixes))]
        if names or (is_remote(location) and len(parts) == len(["s3:", "", "BUCKET"])):
            return directory, names
        folder = open_folder("/".join(parts[:-1]) or "/", deadline_s=deadline_s)
        return folder, parts[-1:] if folder.size(parts[-1]) is not None else []
    pattern = parts[first:]
    if isinstance(folder, LocalFolder):  # which need not look into every directory
        with storage_errors("list", folder.url):
            found = sorted(glob.glob("/".join(pattern), root_dir=folder.url, recursive=True))
        return folder, [name for name in found if folder.size(name) is not None]
    names = folder.walk() if "**" in pattern or len(pattern) > 1 else folder.list()
    return folder, [name for name in names if _matches(name.split("/"), pattern)]


def _first_pattern(parts: Sequence[str], deadline_s: float) -> tuple[int, Folder | None]:
    """The first part that is a pattern, and not the name of something, and the folder in which it is one."""
    for at, part in enumerate(parts):
        if glob.has_magic(part):
            folder = open_folder("/".join(parts[:at]) or "/", deadline_s=deadline_s)
            if not _exists(folder, part):
                return at, folder
    return len(parts), None


def _exists(folder: Folder, name: str) -> bool:
    if isinstance(folder, LocalFolder):
        return (Path(folder.url) / name).exists()
    return folder.size(name) is not None or name in folder.folders()


def _matches(name: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a name match those of a glob."""
    if not pattern:
        return not name
    if pattern[0] == "**":
        return _matches(name, pattern[1:]) or (bool(name) and _matches(name[1:], pattern))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(name[1:], pattern[1:])
