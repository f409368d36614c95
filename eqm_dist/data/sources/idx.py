"""Images in IDX files, the format of MNIST and its relatives (LeCun et al. 1998, http://yann.lecun.com/exdb/mnist)."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from eqm_dist.data.bounds import MAX_IDX_BYTES
from eqm_dist.data.npy import read_up_to
from eqm_dist.data.sources.image import RawImage
from eqm_dist.errors import DataError
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder


class IdxImages:
    """Grey images of one size and their classes, in a pair of files, packed with gzip or not.

    Args:
        location: NAME-images-idx3-ubyte[.gz], whose classes are beside it in NAME-labels-idx1-ubyte[.gz]; or a
            directory, which stands for its ``train`` pair; on this machine or on s3://.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
        StorageError: a file cannot be read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, location: str | Path, *, deadline_s: float = DEADLINE_S) -> None:
        folder, _, name = str(location).rstrip("/").rpartition("/")
        if "images-idx3" not in name:
            folder, name = str(location), "train-images-idx3-ubyte"
        self._folder = open_folder(folder or ".", deadline_s=deadline_s)
        self._images = self._existing(name)
        self._labels = self._existing(self._images.removesuffix(".gz").replace("images-idx3", "labels-idx1"))
        self._read_as = self.versions()
        images, labels = self._arrays()
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"Images and classes must come in pairs, found {len(images)} in {self._folder.url}/{self._images} and "
                f"{len(labels)} in {self._labels}; replace the files."
            )
        self.num_classes = int(labels.max()) + 1
        name, (count, height, width) = self._images.removesuffix(".gz"), images.shape
        self.id = f"idx {name} ({count} images of {width}x{height})"

    def __len__(self) -> int:
        return len(self._arrays()[0])

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop)."""
        images, labels = self._arrays()
        for number in range(start, stop):
            yield RawImage(f"{number:08d}", f"{self._images}: {number}", images[number], int(labels[number]))

    def versions(self) -> Sequence[str]:
        """See ``RawSource``."""
        return self._folder.versions([self._images, self._labels])

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W] and classes [N], uint8: read once in each process that needs them."""
        images, labels = self._read_as
        return _load(self._folder, self._images, 3, images), _load(self._folder, self._labels, 1, labels)

    def _existing(self, name: str) -> str:
        found = next((file for file in (name, f"{name}.gz") if self._folder.size(file) is not None), None)
        if found is None:
            raise DataError(f"IDX data must have the file {self._folder.url}/{name} or {name}.gz; correct --input.")
        return found


@lru_cache(maxsize=4)
def _load(folder: Folder, name: str, dimensions: int, version: str) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0 0 8 D, D sizes as big-endian uint32, the bytes.

    ``version`` tells a file that has changed from what was read before it did.
    """
    try:
        with folder.open(name) as opened, storage_errors("read", f"{folder.url}/{name}"):
            file = cast("BinaryIO", gzip.GzipFile(fileobj=opened)) if name.endswith(".gz") else opened
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(f"it begins with {header[:4].hex(' ')} instead of 00 00 08 {dimensions:02x}")
            shape = struct.unpack_from(f">{dimensions}I", header, 4)
            size = math.prod(shape)
            if size > MAX_IDX_BYTES:
                raise ValueError(f"it has {size:,} bytes by its header, more than {MAX_IDX_BYTES:,}")
            content = read_up_to(file, size + 1)  # a byte more, which must not be there
        return np.frombuffer(content, np.uint8).reshape(shape)
    except (ValueError, struct.error, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{folder.url}/{name} must be a whole IDX file of bytes ({error}); replace it.") from error
