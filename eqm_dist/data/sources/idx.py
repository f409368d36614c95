"""Images in IDX files, the format of MNIST and its relatives (LeCun et al. 1998, http://yann.lecun.com/exdb/mnist)."""

import gzip
import hashlib
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.storage import local_path, storage_errors
from eqm_dist.errors import DataError


class IdxImages:
    """Grey images of one size and their classes, in a pair of files, packed with gzip or not.

    Args:
        location: NAME-images-idx3-ubyte[.gz], whose classes are beside it in NAME-labels-idx1-ubyte[.gz]; or a
            directory, which stands for its ``train`` pair.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
        StorageError: a file cannot be read.
    """

    class_names: tuple[str, ...] = ()

    def __init__(self, location: str | Path) -> None:
        path = local_path(location)
        self._path = _existing(path / "train-images-idx3-ubyte") if path.is_dir() else path
        if "images-idx3" not in self._path.name:
            raise DataError(f"IDX images must be a file NAME-images-idx3-ubyte, received {path}; correct --input.")
        labels_name = self._path.name.removesuffix(".gz").replace("images-idx3", "labels-idx1")
        labels_path = _existing(self._path.with_name(labels_name))
        self._files = [(self._path, 3, _modified_ns(self._path)), (labels_path, 1, _modified_ns(labels_path))]
        images, labels = self._arrays()
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"Images and classes must come in pairs, found {len(images)} in {self._path} and {len(labels)} in "
                f"{labels_path}; replace the files."
            )
        self.num_classes = int(labels.max()) + 1
        self.id = (
            f"idx {self._path.name.removesuffix('.gz')} (pixels {hashlib.sha256(images.tobytes()).hexdigest()[:12]})"
        )

    def __len__(self) -> int:
        return len(self._arrays()[0])

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop)."""
        images, labels = self._arrays()
        for number in range(start, stop):
            yield RawImage(f"{number:08d}", f"{self._path.name}: {number}", images[number], int(labels[number]))

    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, H, W] and classes [N], uint8: read once in each process that needs them."""
        images, labels = self._files
        return _load(*images), _load(*labels)


def _modified_ns(path: Path) -> int:
    with storage_errors("read", path):
        return path.stat().st_mtime_ns


def _existing(path: Path) -> Path:
    candidates = [path, path.with_name(path.name + ".gz")]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        raise DataError(f"IDX data must have the file {path} or {candidates[1].name}; correct --input.")
    return found


@lru_cache(maxsize=4)
def _load(path: Path, dimensions: int, modified_ns: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0 0 8 D, D sizes as big-endian uint32, the bytes.

    Of a file that is changed, ``modified_ns`` brings the new content.
    """
    try:
        with storage_errors("read", path), open(path, "rb") as file:
            content = gzip.decompress(file.read()) if path.suffix == ".gz" else file.read()
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"it begins with {content[:4].hex(' ')} instead of 00 00 08 {dimensions:02x}")
        shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (ValueError, struct.error, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} must be a whole IDX file of bytes ({error}); replace it.") from error
