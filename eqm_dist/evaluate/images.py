"""Sets of images made by anybody, to be measured: files, tars, an ADM .npz, the shards of a training set."""

import hashlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from eqm_dist.data.bounds import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_SIDE
from eqm_dist.data.cache import FileCache
from eqm_dist.data.image_set import NPZ_FILE, PICTURES, RECORD_FILE, SETTINGS_FILE
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.manifest import MANIFEST_NAME
from eqm_dist.data.npy import read_header, read_up_to
from eqm_dist.data.preprocess import PreparedImages
from eqm_dist.data.sources import LabelledImage, RawImage, SkippedImage
from eqm_dist.data.sources.files import find_files
from eqm_dist.data.sources.names import is_image, readable, without_hidden
from eqm_dist.data.sources.tars import image_members
from eqm_dist.documents import from_json
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.models.autoencoder import Autoencoder, load_autoencoder, mean_latents
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S, is_remote, local_path
from eqm_dist.storage.open import open_folder

ADM_IMAGES = "arr_0"
"""The array of images in an ADM .npz."""
CHANNELS = (1, 3)
HASH_BYTES = 1 << 24
MAX_SETTINGS_BYTES = 1 << 20
ARCHIVE_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, KeyError, EOFError,
    RuntimeError, NotImplementedError,  # encrypted, or packed in a way that Python does not know
)  # fmt: skip
"""What a damaged .npz makes Python raise."""
CACHE_BYTES = 64 << 30


class Images(Protocol):
    """Images numbered 0 .. len - 1. Pickles, for the actors that read parts of it."""

    location: str

    def __len__(self) -> int: ...

    def content_id(self) -> str:
        """sha256 of everything that decides the pixels; another one where a byte differs."""
        ...

    def read(self, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """The images [start, stop), in order, as uint8 [B, H, W, C] with B up to ``batch``.

        Raises:
            DataError: an image cannot be decoded, or has another size than the others.
            StorageError: the machine cannot read it.
        """
        ...


def open_images(
    location: str, *, resolution: int | None = None, channels: int = 3, max_pixels: int = MAX_IMAGE_PIXELS
) -> Images:
    """The images at a location.

    Args:
        location: an .npz with ``arr_0``; a tar or a glob of tars; a directory or s3:// prefix of shards, of tars or of
            image files, however deep; a glob of image files; or what ``pipelines/sample.py`` wrote.
        resolution: crop files and tars to the centre square of so many pixels; None takes them as they are.
        channels: 1 reads files and tars as grey, 3 as RGB.
        max_pixels: a file with more is not decoded.

    Raises:
        ConfigError: arrays of another resolution.
        DataError: there are no images.
        StorageError: the machine cannot read them.
    """
    folder = open_folder(location)
    tars, names = find_files(location, [".tar"], DEADLINE_S)
    pictures = [name for name in folder.walk() if is_image(name)]
    pictures_folder = folder
    if not pictures:  # a glob, or one file
        pictures_folder, pictures = tars, [name for name in names if is_image(name)]
    names = without_hidden([name for name in names if name.endswith(".tar")], location)
    is_set = _is_image_set(folder)
    pictures = without_hidden([name for name in pictures if not (is_set and name in PICTURES)], location)
    is_npz = location.endswith(".npz")
    holds_npz = not is_npz and folder.size(NPZ_FILE) is not None
    holds_shards = folder.size(MANIFEST_NAME) is not None
    found = {
        f"a {NPZ_FILE}": holds_npz,
        f"a {MANIFEST_NAME}, which is one of shards": holds_shards,
        f"{len(names)} tars": bool(names) and not holds_shards,
        f"{len(pictures)} image files": bool(pictures),
    }
    kinds = [kind for kind, there in found.items() if there]
    if len(kinds) > 1:
        raise DataError(
            f"A set of images must be of one kind, but {location} holds {' and '.join(kinds)}; name the file, or move "
            "the others elsewhere."
        )
    if is_npz or holds_npz:
        images: Images = NpzImages(location if is_npz else f"{location.rstrip('/')}/{NPZ_FILE}")
    elif holds_shards:
        images = ShardImages(location)
    else:
        raw = (
            _tar_members(location, tars, names)
            if names
            else RawImages(location, pictures_folder, [_Place(name) for name in pictures])
        )
        if not len(raw):
            raise DataError(
                f"Images must be an .npz with {ADM_IMAGES}, tars, shards or a folder of image files, and {location}"
                " holds none; correct the path."
            )
        return DecodedImages(raw, resolution, channels, max_pixels)
    if resolution is not None and len(images):
        _, height, width, _ = next(images.read(0, 1, 1)).shape
        if (height, width) != (resolution, resolution):
            raise ConfigError(
                f"A resolution crops files and tars, and {location} holds arrays of {width}x{height}; leave it out, or"
                f" bring images of {resolution}x{resolution}."
            )
    return images


def _is_image_set(folder: Folder) -> bool:
    """Whether ``pipelines/sample.py`` wrote it, so that its pictures are known by their names.

    Raises:
        DataError: it did not come to its end.
    """
    if folder.size(SETTINGS_FILE) is None:
        return False
    try:
        settings = from_json(folder.read(SETTINGS_FILE, 0, MAX_SETTINGS_BYTES))
    except ValueError:
        return False
    if not (isinstance(settings, dict) and {"format", "samples", "unit"} <= settings.keys()):
        return False
    if folder.size(RECORD_FILE) is None:
        raise DataError(
            f"A set of images must be whole, but {folder.url} is one that sample.py has begun and not finished; run it "
            "again."
        )
    return True


def first_images(location: str, count: int, channels: int = 3) -> Tensor:
    """The first images at a location, at most ``count``: [n, H, W, C] uint8; see ``open_images``."""
    images = open_images(location, channels=channels)
    return torch.cat([batch.cpu() for batch in images.read(0, min(count, len(images)), 256)])


@dataclass(frozen=True)
class _Place:
    """A file, or a range of bytes in one."""

    file: str
    name: str | None = None
    offset: int = 0
    size: int | None = None


class RawImages:
    """Image files, or members of tars, without classes: a ``RawSource``.

    Args:
        location: what the user calls them.
        folder: where the files are.
        places: the images, in their order.
    """

    num_classes = 1
    class_names = ()

    def __init__(self, location: str, folder: Folder, places: Sequence[_Place]) -> None:
        self.id = self.location = location
        self._folder = folder
        self._places = list(places)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop), in order."""
        for number, place in enumerate(self._places[start:stop], start):
            name = readable(place.name or place.file)
            yield RawImage(f"{number:08d}", name, self._content(place), 0)

    def content_id(self) -> str:
        """sha256 of the names and the bytes of all images, in their order."""
        digest = hashlib.sha256()
        for place in self._places:
            content = self._content(place)
            digest.update(f"{place.name or place.file} {len(content)}\n".encode("utf-8", "surrogateescape"))
            digest.update(content)
        return digest.hexdigest()

    def _content(self, place: _Place) -> bytes:
        most = MAX_IMAGE_BYTES + 1
        size = most if place.size is None else min(place.size, most)
        return self._folder.read(place.file, place.offset, place.offset + size)

    def versions(self) -> Sequence[str]:
        """See ``RawSource``."""
        return self._folder.versions(list(dict.fromkeys(place.file for place in self._places)))


def _tar_members(location: str, folder: Folder, tars: Sequence[str]) -> RawImages:
    places = []
    for name in tars:
        path = f"{folder.url}/{name}"
        with storage_errors("read", path), folder.open(name) as file:
            places += [_Place(name, f"{name}:{m.name}", m.offset, m.size) for m in image_members(file, path)]
    return RawImages(location, folder, places)


class DecodedImages:
    """Image files and members of tars as pixels: ``Images``. All must have the size of the first."""

    def __init__(self, raw: RawImages, resolution: int | None, channels: int, max_pixels: int) -> None:
        self.location = raw.location
        self._raw = raw
        self._prepared = PreparedImages(raw, resolution=resolution, channels=channels, max_pixels=max_pixels)
        self._kind = f"resolution {resolution}, channels {channels}"

    def __len__(self) -> int:
        return len(self._raw)

    def content_id(self) -> str:
        """See ``Images``."""
        return hashlib.sha256(f"{self._raw.content_id()} {self._kind}".encode()).hexdigest()

    def read(self, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """See ``Images``."""
        for first in range(start, stop, batch):
            images = self._prepared.read(first, min(stop, first + batch))
            yield torch.from_numpy(np.stack([self._sized(self._whole(image)) for image in images]))

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        """Of the first image of all: an actor reads its own part, which may have one size of its own."""
        return self._whole(next(iter(self._prepared.read(0, 1)))).shape

    def _whole(self, image: LabelledImage | SkippedImage) -> np.ndarray:
        if isinstance(image, SkippedImage):
            raise DataError(
                f"Every image must be whole, and {image.name} of {self.location} cannot be decoded"
                f" ({image.reason}); replace or remove it."
            )
        return image.image

    def _sized(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.shape != self._shape:
            raise DataError(
                f"All images must have one size, and {self.location} holds {self._shape[1]}x{self._shape[0]} and "
                f"{pixels.shape[1]}x{pixels.shape[0]}; give a resolution to crop them to."
            )
        return pixels


class NpzImages:
    """The images of an .npz as ADM's evaluation exchanges them: ``arr_0``, uint8 [N, H, W, C]. Read as a stream.

    Raises:
        DataError: there is no such file, or it holds no such array.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._path = local_path(location)
        with self._stream() as file:
            self._shape = _header(file, self._path)

    def __len__(self) -> int:
        return self._shape[0]

    def content_id(self) -> str:
        """See ``Images``."""
        digest = hashlib.sha256()
        with self._stream() as file:
            while content := file.read(HASH_BYTES):
                digest.update(content)
        return digest.hexdigest()

    def read(self, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """See ``Images``."""
        each = math.prod(self._shape[1:])
        with self._stream() as file:
            _header(file, self._path)
            file.seek(start * each, 1)
            for first in range(start, stop, batch):
                count = min(stop, first + batch) - first
                pixels = np.frombuffer(read_up_to(file, count * each), np.uint8)
                if len(pixels) < count * each:
                    raise EOFError(f"it ends before image {first + count}")
                yield torch.from_numpy(pixels.reshape(count, *self._shape[1:]))

    @contextmanager
    def _stream(self) -> Iterator[IO[bytes]]:
        try:
            with (
                storage_errors("read", self._path),
                zipfile.ZipFile(self._path) as archive,
                archive.open(f"{ADM_IMAGES}.npy") as file,
            ):
                yield file
        except ARCHIVE_ERRORS as error:
            raise DataError(
                f"{self._path} must be a whole .npz with the array {ADM_IMAGES} ({' '.join(str(error).split())}); write"
                " it again with numpy.savez(path, images)."
            ) from error


def _header(file: IO[bytes], path: Path) -> tuple[int, ...]:
    """The shape of the array that follows; nothing in it is unpickled."""
    try:
        shape, fortran, dtype = read_header(file)
    except ValueError as error:
        raise DataError(f"{path}: {ADM_IMAGES} must be an array ({error}); write it with numpy.savez.") from error
    rule = f"{path}: {ADM_IMAGES} must be uint8 [N, H, W, C], and is {dtype} {list(shape)}"
    if dtype != np.uint8 or len(shape) != 4 or fortran:
        raise DataError(f"{rule}; convert it.")
    count, height, width, channels = shape
    if channels not in CHANNELS:
        axes = "transpose it with images.transpose(0, 2, 3, 1)" if height in CHANNELS else "convert it"
        raise DataError(f"{rule}, of which C is 1 or 3; {axes}.")
    if not (count and height and width) or height * width > MAX_SIDE**2:
        raise DataError(f"{rule}, with images of 1 to {MAX_SIDE**2:,} pixels; convert it.")
    return shape


class TrainingImages:
    """The images of an open training set, as its autoencoder gives them back from the means, on one device."""

    def __init__(self, location: str, reader: ShardReader, autoencoder: Autoencoder, device: torch.device) -> None:
        self.location = location
        self._reader = reader
        self._autoencoder = autoencoder
        self._device = device

    def __len__(self) -> int:
        return self._reader.manifest.num_samples

    def content_id(self) -> str:
        """See ``Images``; the manifest holds the sha256 of every shard."""
        return hashlib.sha256(self._reader.manifest.model_dump_json().encode()).hexdigest()

    def read(self, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """See ``Images``."""
        for first in range(start, stop, batch):
            moments, _ = self._reader.read(np.arange(first, min(stop, first + batch)))
            scale, shift = self._autoencoder.latent_scale, self._autoencoder.latent_shift
            yield self._autoencoder.decode(mean_latents(moments[:, 0].to(self._device), scale, shift))


class ShardImages:
    """The images of shards; opened where they are read.

    Raises:
        DataError: the shards are missing or damaged, or their autoencoder is gone.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self._count = len(self._opened)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return {"location": self.location, "_count": self._count}  # an actor opens the shards itself

    def content_id(self) -> str:
        """See ``Images``."""
        return self._opened.content_id()

    def read(self, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """See ``Images``."""
        return self._opened.read(start, stop, batch)

    @cached_property
    def _opened(self) -> TrainingImages:
        cache = FileCache("~/.cache/eqm-dist", CACHE_BYTES) if is_remote(self.location) else None
        reader = ShardReader(self.location, cache=cache)
        autoencoder = load_autoencoder(reader.manifest.autoencoder_location, reader.manifest.autoencoder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return TrainingImages(self.location, reader, autoencoder, device)
