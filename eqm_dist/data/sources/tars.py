"""Images in WebDataset tars."""

import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from eqm_dist.data.sources.files import find_files
from eqm_dist.data.sources.image import RawImage
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_FIELDS = ("label", "cls")
"""Fields of KEY.json that may hold the class, where there is no KEY.cls."""
SCANNERS = 8
"""Tars whose headers are read at once."""


class _Member(NamedTuple):
    tar: str
    name: str
    offset: int
    size: int
    label: int


class ImageTars:
    """Tars of KEY.jpg (jpeg, png, webp) with KEY.cls, or with KEY.json that holds ``label`` or ``cls``.

    All headers are read once, here; after that any image is one seek away.

    Args:
        location: a tar, a directory of tars, or a glob of several, on this machine or on s3://; they are taken in the
            order of their names.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: there are no such tars, or one is damaged or has an image without a class.
        StorageError: a tar cannot be read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, location: str | Path, *, deadline_s: float = DEADLINE_S) -> None:
        self._folder, tars = find_files(str(location), [".tar"], deadline_s)
        if not tars:
            raise DataError(f"Tars of images must exist, but nothing matches {location}; correct --input.")
        with ThreadPoolExecutor(SCANNERS, thread_name_prefix="scan") as threads:
            found = threads.map(partial(_scan, self._folder), tars)
            self._members = [member for members in found for member in members]
        if not self._members:
            raise DataError(
                f"Tars of images must hold KEY.jpg, .png or .webp with KEY.cls or KEY.json, but those of {location} "
                "hold none; correct --input."
            )
        self.num_classes = max(member.label for member in self._members) + 1
        sizes = sum(self._folder.size(tar) or 0 for tar in tars)
        self.id = f"tars {Path(location).name} ({len(tars)} files, {len(self._members)} images, {sizes} bytes)"

    def __len__(self) -> int:
        return len(self._members)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop) in the order of the tars and of their members."""
        numbered = enumerate(self._members[start:stop], start)
        for tar, members in groupby(numbered, key=lambda item: item[1].tar):
            with self._folder.open(tar) as file:
                for number, member in members:
                    with storage_errors("read", f"{self._folder.url}/{tar}"):
                        file.seek(member.offset)
                        content = file.read(member.size)
                    name = f"{PurePosixPath(tar).name}:{member.name}"
                    yield RawImage(f"{number:08d}", name, content, member.label)


def _scan(folder: Folder, tar_name: str) -> list[_Member]:
    path = f"{folder.url}/{tar_name}"
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with storage_errors("read", path), folder.open(tar_name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                parent, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = parent + slash + stem, suffix.lower()
                if suffix in SUFFIXES:
                    images[key] = member
                elif suffix in ("cls", "json"):
                    file.seek(member.offset_data)
                    label = _label(suffix, file.read(member.size))
                    if label is not None and (suffix == "cls" or key not in labels):
                        labels[key] = label
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} must be a whole tar of images and integer classes ({error}); replace it.") from error
    unlabelled = [member.name for key, member in images.items() if labels.get(key, -1) < 0]
    if unlabelled:
        raise DataError(
            f"Every image must have a class from 0 on in KEY.cls or in a field {' or '.join(LABEL_FIELDS)} of KEY.json,"
            f" but {len(unlabelled)} of {path} have none, {unlabelled[0]} first; add them."
        )
    return [_Member(tar_name, m.name, m.offset_data, m.size, labels[key]) for key, m in images.items()]


def _label(suffix: str, content: bytes) -> int | None:
    if suffix == "cls":
        return int(content)
    fields = json.loads(content)
    return next((int(fields[field]) for field in LABEL_FIELDS if field in fields), None)
