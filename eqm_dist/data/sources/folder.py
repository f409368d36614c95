"""Images in a tree of folders, one folder for each class."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.storage import local_path, storage_errors
from eqm_dist.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"})
"""Files with other endings are no images; those with these are read, and skipped with a reason if they are broken."""


class ImageFolder:
    """DIR/CLASS/.../NAME.jpg, as torchvision's ImageFolder: classes are the sorted names of the sub-directories.

    Raises:
        DataError: there is no such directory, or it holds no images.
        StorageError: it cannot be listed.
    """

    def __init__(self, directory: str | Path) -> None:
        self._root = local_path(directory)
        if not self._root.is_dir():
            raise DataError(f"A folder of images must be a directory, but {self._root} is none; correct --input.")
        with storage_errors("list", self._root):
            self.class_names = tuple(sorted(entry.name for entry in os.scandir(self._root) if entry.is_dir()))
            files = [(file, label) for label, name in enumerate(self.class_names) for file in self._files_of(name)]
        if not files:
            raise DataError(
                f"A folder of images must hold CLASS/NAME.jpg (or {', '.join(sorted(SUFFIXES - {'.jpg'}))}), "
                f"but {self._root} holds none; correct --input."
            )
        self._files = [file for file, _ in files]
        self._labels = [label for _, label in files]
        self.num_classes = len(self.class_names)
        listing = hashlib.sha256("\0".join(self._files).encode("utf-8", "surrogateescape")).hexdigest()
        self.id = f"folder {self._root.name} ({len(files)} files, listing {listing[:12]})"

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The files [start, stop) in the order of their classes and names."""
        for number in range(start, stop):
            path = self._root / self._files[number]
            with storage_errors("read", path):
                content = path.read_bytes()
            yield RawImage(f"{number:08d}", self._files[number], content, self._labels[number])

    def _files_of(self, class_name: str) -> list[str]:
        found = []
        for folder, _, names in os.walk(self._root / class_name, followlinks=True, onerror=_raise):
            relative = Path(folder).relative_to(self._root)
            found += [(relative / name).as_posix() for name in names if Path(name).suffix.lower() in SUFFIXES]
        return sorted(found)


def _raise(error: OSError) -> None:
    raise error
