"""Images in WebDataset tars."""

import logging
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from eqm_dist.data.bounds import MAX_IMAGE_BYTES, MAX_LABEL_BYTES
from eqm_dist.data.labels import LABEL_BYTES, check_label, parse_label
from eqm_dist.data.sources.files import find_files
from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.sources.names import is_hidden, is_image, readable, without_hidden
from eqm_dist.data.tar_members import TarMember, read_members
from eqm_dist.documents import from_json
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S

LABEL_FIELDS = ("label", "cls")
"""Fields of KEY.json that may hold the class, where there is no KEY.cls."""
SCANNERS = 8
"""Tars whose headers are read at once."""

logger = logging.getLogger(__name__)


class _Member(NamedTuple):
    tar: str
    name: str
    offset: int
    size: int
    label: int


class _Label(NamedTuple):
    """What a KEY.cls or a KEY.json says: an integer, or the text for which it is none."""

    value: int | None
    text: str = ""


class ImageTars:
    """Tars of KEY.png (or what else a folder may hold) with KEY.cls, or KEY.json that holds ``label`` or ``cls``.

    All headers are read once, here; after that any image is one seek away. KEY may have dots. Of a sample with several
    images the one without a name between, KEY.png and not KEY.mask.png, is taken.

    Args:
        location: a tar, a directory of tars, or a glob of several, on this machine or on s3://; they are taken in the
            order of their names.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: there are no such tars, or one is damaged, has an image without a class, or two with one name.
        StorageError: a tar cannot be read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, location: str | Path, *, deadline_s: float = DEADLINE_S) -> None:
        self._folder, tars = find_files(str(location), [".tar"], deadline_s)
        self._tars = without_hidden(tars, str(location))
        if not self._tars:
            raise DataError(f"Tars of images must exist, but nothing matches {location}; correct --input.")
        with ThreadPoolExecutor(SCANNERS, thread_name_prefix="scan") as threads:
            found = threads.map(partial(_scan, self._folder), self._tars)
            self._members = [member for members in found for member in members]
        if not self._members:
            raise DataError(
                f"Tars of images must hold KEY.jpg, .png or another kind of image with KEY.cls or KEY.json, but those "
                f"of {location} hold none; correct --input."
            )
        self.num_classes = max(member.label for member in self._members) + 1
        self.id = f"tars {readable(Path(location).name)} ({len(self._tars)} files, {len(self._members)} images)"

    def __len__(self) -> int:
        return len(self._members)

    def versions(self) -> Sequence[str]:
        """See ``RawSource``."""
        return self._folder.versions(self._tars)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop) in the order of the tars and of their members."""
        numbered = enumerate(self._members[start:stop], start)
        for tar, members in groupby(numbered, key=lambda item: item[1].tar):
            with self._folder.open(tar) as file:
                for number, member in members:
                    with storage_errors("read", f"{self._folder.url}/{tar}"):
                        file.seek(member.offset)
                        content = file.read(min(member.size, MAX_IMAGE_BYTES + 1))
                    name = f"{PurePosixPath(tar).name}:{member.name}"
                    yield RawImage(f"{number:08d}", name, content, member.label)


def image_members(file: BinaryIO, path: str) -> list[TarMember]:
    """The images of a tar, whatever else it holds, in their order.

    Raises:
        DataError: it is damaged, or two images have one name.
        OSError: it cannot be read.
    """
    members: dict[str, TarMember] = {}
    try:
        for member in read_members(file, lambda name: is_image(name) and not is_hidden(name)):
            if posixpath.normpath(member.name) in members:
                raise DataError(
                    f"Every image of a tar must have a name of its own, but {path} holds two of the name "
                    f"{member.name}; rename or remove one."
                )
            members[posixpath.normpath(member.name)] = member
    except ValueError as error:
        raise DataError(f"{path} must be a whole tar ({error}); replace it.") from error
    return list(members.values())


def _scan(folder: Folder, tar_name: str) -> list[_Member]:
    path = f"{folder.url}/{tar_name}"
    images: dict[str, TarMember] = {}
    classes: dict[str, _Label] = {}
    fields: dict[str, _Label] = {}
    hidden = 0
    try:
        with storage_errors("read", path), folder.open(tar_name) as file:
            for member in read_members(file, _is_part):
                stem, _, suffix = posixpath.normpath(member.name).rpartition(".")
                if is_hidden(member.name):
                    hidden += is_image(member.name)
                    continue
                is_label = suffix.lower() in ("cls", "json")
                labels = classes if suffix.lower() == "cls" else fields
                if stem in (labels if is_label else images):
                    raise DataError(
                        f"Every sample of a tar must have one image and one class, but {path} holds two of the key "
                        f"{stem}, and the second is {member.name}; rename or remove one."
                    )
                if is_label:
                    labels[stem] = _label(file, member, labels is fields)
                else:
                    images[stem] = member
    except ValueError as error:
        raise DataError(f"{path} must be a whole tar of images and integer classes ({error}); replace it.") from error
    if hidden:
        logger.warning("Left out %s hidden images of %s.", hidden, path)
    return _labelled(tar_name, path, images, fields | classes)


def _is_part(name: str) -> bool:
    return is_image(name) or name.lower().endswith((".cls", ".json"))


def _label(file: BinaryIO, member: TarMember, is_json: bool) -> _Label:
    """The class in a KEY.cls, which is nothing else, or in a KEY.json, which may be about anything."""
    file.seek(member.offset)
    content = file.read(min(member.size, (MAX_LABEL_BYTES if is_json else LABEL_BYTES) + 1))
    if not is_json:
        return _Label(parse_label(content))
    if len(content) > MAX_LABEL_BYTES:
        return _Label(None, f"more than {MAX_LABEL_BYTES:,} bytes")
    try:
        found = from_json(content)
    except ValueError:
        return _Label(None, "no JSON")
    present = [found[field] for field in LABEL_FIELDS if field in found] if isinstance(found, dict) else []
    return _of_field(present[0]) if present else _Label(None)


def _of_field(value: Any) -> _Label:
    if isinstance(value, str):
        try:
            return _Label(parse_label(value.encode()))
        except ValueError:
            pass
    if isinstance(value, int) and not isinstance(value, bool):
        return _Label(value)
    return _Label(None, repr(value)[:40])


def _labelled(tar_name: str, path: str, images: dict[str, TarMember], labels: dict[str, _Label]) -> list[_Member]:
    """The images with their classes.

    An image whose own stem has no class belongs to the sample that WebDataset sees, whose key ends at the first dot:
    it is KEY.NAME.png. Where there is a KEY.png too, such images are other fields, masks for example, and left out.
    """
    found: list[_Member] = []
    by_sample: dict[str, str] = {}
    other_fields: list[str] = []
    unlabelled: list[tuple[str, str]] = []
    for stem, member in images.items():
        label, sample = labels.get(stem), _sample(stem)
        if label is None and sample != stem and sample in labels:
            if sample in images:
                other_fields.append(member.name)
                continue
            if sample in by_sample:
                raise DataError(
                    f"Every sample of a tar must have one image, but {path} holds {by_sample[sample]} and "
                    f"{member.name} for one class; name the image {sample}.png, then the others are left out."
                )
            by_sample[sample] = member.name
            label = labels[sample]
        if label is None or label.value is None or label.value < 0:
            unlabelled.append((member.name, "none" if label is None else label.text or str(label.value)))
            continue
        check_label(label.value, f"{path}: {member.name}")
        found.append(_Member(tar_name, member.name, member.offset, member.size, label.value))
    if unlabelled:
        name, reason = unlabelled[0]
        raise DataError(
            f"Every image must have a class from 0 on in KEY.cls or in a field {' or '.join(LABEL_FIELDS)} of KEY.json,"
            f" but {len(unlabelled)} of {path} have none, {name} first"
            f"{'' if reason in ('none', 'None') else f', which has {reason}'}; add them."
        )
    if other_fields:
        logger.warning(
            "Left out %s images of %s that are fields of samples with another image, %s first.",
            len(other_fields), path, other_fields[0],
        )  # fmt: skip
    return found


def _sample(stem: str) -> str:
    """The key of WebDataset: up to the first dot of the base name."""
    folder, slash, base = stem.rpartition("/")
    return folder + slash + base.partition(".")[0]
