"""Sets of images made by anybody, to be measured: files, tars, an ADM .npz, the shards of a training set."""

import hashlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from eqm_dist.data.cache import FileCache
from eqm_dist.data.image_set import PICTURES
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.manifest import MANIFEST_NAME
from eqm_dist.data.npy import read_header
from eqm_dist.data.preprocess import PreparedImages
from eqm_dist.data.sources import RawImage, SkippedImage
from eqm_dist.data.sources.files import find_files
from eqm_dist.data.sources.folder import SUFFIXES
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.models.autoencoder import Autoencoder, load_autoencoder, mean_latents
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S, is_remote, local_path
from eqm_dist.storage.open import open_folder

ADM_IMAGES = "arr_0"
"""The array of images in an ADM .npz."""
HASH_BYTES = 1 << 24
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


def open_images(location: str, *, resolution: int | None = None, channels: int = 3) -> Images:
    """The images at a location.

    Args:
        location: an .npz with ``arr_0``; a tar or a glob of tars; a directory or s3:// prefix of shards, of tars or of
            image files, however deep; or what ``pipelines/sample.py`` wrote.
        resolution: crop files and tars to the centre square of so many pixels; None takes them as they are.
        channels: 1 reads files and tars as grey, 3 as RGB.

    Raises:
        ConfigError: arrays of another resolution.
        DataError: there are no images.
        StorageError: the machine cannot read them.
    """
    folder = open_folder(location)
    if location.endswith(".npz") or folder.size("samples.npz") is not None:
        images: Images = NpzImages(location if location.endswith(".npz") else f"{location.rstrip('/')}/samples.npz")
    elif folder.size(MANIFEST_NAME) is not None:
        images = ShardImages(location)
    else:
        tars, names = find_files(location, [".tar"], DEADLINE_S)
        if names and all(name.endswith(".tar") for name in names):
            raw = _tar_members(location, tars, names)
        else:
            found = [name for name in folder.walk() if PurePosixPath(name).suffix.lower() in SUFFIXES]
            raw = RawImages(location, folder, [_Place(name) for name in found if name not in PICTURES])
        if not len(raw):
            raise DataError(
                f"Images must be an .npz with {ADM_IMAGES}, tars, shards or a folder of image files, and {location}"
                " holds none; correct the path."
            )
        return DecodedImages(raw, resolution, channels)
    if resolution is not None and len(images):
        _, height, width, _ = next(images.read(0, 1, 1)).shape
        if (height, width) != (resolution, resolution):
            raise ConfigError(
                f"A resolution crops files and tars, and {location} holds arrays of {width}x{height}; leave it out, or"
                f" bring images of {resolution}x{resolution}."
            )
    return images


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
            name = place.name or place.file
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
        stop = None if place.size is None else place.offset + place.size
        return self._folder.read(place.file, place.offset, stop)


def _tar_members(location: str, folder: Folder, tars: Sequence[str]) -> RawImages:
    places = []
    for name in tars:
        try:
            with folder.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                places += [
                    _Place(name, f"{name}:{member.name}", member.offset_data, member.size)
                    for member in tar
                    if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES
                ]
        except tarfile.TarError as error:
            raise DataError(f"{folder.url}/{name} must be a whole tar ({error}); replace it.") from error
    return RawImages(location, folder, places)


class DecodedImages:
    """Image files and members of tars as pixels: ``Images``."""

    def __init__(self, raw: RawImages, resolution: int | None, channels: int) -> None:
        self.location = raw.location
        self._raw = raw
        self._prepared = PreparedImages(raw, resolution=resolution, channels=channels)
        self._kind = f"resolution {resolution}, channels {channels}"

    def __len__(self) -> int:
        return len(self._raw)

    def content_id(self) -> str:
        """See ``Images``."""
        return hashlib.sha256(f"{self._raw.content_id()} {self._kind}".encode()).hexdigest()

    def read(self, start: int, stop: int, batch: int) -> Iterator[Tensor]:
        """See ``Images``."""
        for first in range(start, stop, batch):
            pixels = []
            for image in self._prepared.read(first, min(stop, first + batch)):
                if isinstance(image, SkippedImage):
                    raise DataError(
                        f"Every image must be whole, and {image.name} of {self.location} cannot be decoded"
                        f" ({image.reason}); replace or remove it."
                    )
                if pixels and image.image.shape != pixels[0].shape:
                    height, width, _ = image.image.shape
                    raise DataError(
                        f"All images must have one size, and {self.location} holds {pixels[0].shape[1]}x"
                        f"{pixels[0].shape[0]} and {width}x{height}; give a resolution to crop them to."
                    )
                pixels.append(image.image)
            yield torch.from_numpy(np.stack(pixels))


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
        each = int(np.prod(self._shape[1:]))
        with self._stream() as file:
            _header(file, self._path)
            file.seek(start * each, 1)
            for first in range(start, stop, batch):
                count = min(stop, first + batch) - first
                pixels = np.frombuffer(bytearray(file.read(count * each)), np.uint8)
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
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
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
    if dtype != np.uint8 or len(shape) != 4 or fortran:
        raise DataError(f"{path}: {ADM_IMAGES} must be uint8 [N, H, W, C], and is {dtype} {list(shape)}; convert it.")
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
