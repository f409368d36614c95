"""Images in WebDataset tars."""

import glob
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.storage import local_path, storage_errors
from eqm_dist.errors import DataError

SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_FIELDS = ("label", "cls")
"""Fields of KEY.json that may hold the class, where there is no KEY.cls."""


class _Member(NamedTuple):
    tar: int
    name: str
    offset: int
    size: int
    label: int


class ImageTars:
    """Tars of KEY.jpg (jpeg, png, webp) with KEY.cls, or with KEY.json that holds ``label`` or ``cls``.

    All headers are read once, here; after that any image is one seek away.

    Args:
        pattern: path of a tar or a glob of several; they are taken in the order of their names.

    Raises:
        DataError: there are no such tars, or one is damaged or has an image without a class.
        StorageError: a tar cannot be read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, pattern: str) -> None:
        pattern = str(local_path(pattern))
        self._tars = sorted(glob.glob(pattern, recursive=True))
        if not self._tars:
            raise DataError(f"Tars of images must exist, but nothing matches {pattern}; correct --input.")
        self._members = [member for number, tar in enumerate(self._tars) for member in _scan(number, Path(tar))]
        if not self._members:
            raise DataError(
                f"Tars of images must hold KEY.jpg, .png or .webp with KEY.cls or KEY.json, but those of {pattern} "
                "hold none; correct --input."
            )
        self.num_classes = max(member.label for member in self._members) + 1
        sizes = sum(Path(tar).stat().st_size for tar in self._tars)
        self.id = f"tars {Path(pattern).name} ({len(self._tars)} files, {len(self._members)} images, {sizes} bytes)"

    def __len__(self) -> int:
        return len(self._members)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop) in the order of the tars and of their members."""
        for number in range(start, stop):
            member = self._members[number]
            tar = Path(self._tars[member.tar])
            with storage_errors("read", tar), open(tar, "rb") as file:
                file.seek(member.offset)
                content = file.read(member.size)
            yield RawImage(f"{number:08d}", f"{tar.name}:{member.name}", content, member.label)


def _scan(number: int, path: Path) -> list[_Member]:
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with storage_errors("read", path), open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = folder + slash + stem, suffix.lower()
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
    return [_Member(number, m.name, m.offset_data, m.size, labels[key]) for key, m in images.items()]


def _label(suffix: str, content: bytes) -> int | None:
    if suffix == "cls":
        return int(content)
    fields = json.loads(content)
    return next((int(fields[field]) for field in LABEL_FIELDS if field in fields), None)
