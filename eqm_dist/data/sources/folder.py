"""Images in a tree of folders, one folder for each class."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from eqm_dist.data.sources.image import RawImage
from eqm_dist.errors import DataError
from eqm_dist.storage.folder import LocalFolder
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff"})
"""Files with other endings are no images; those with these are read, and skipped with a reason if they are broken."""
READERS = 16
"""Files read at once: each waits for its server most of the time."""


class ImageFolder:
    """ROOT/CLASS/.../NAME.jpg, as torchvision's ImageFolder: classes are the sorted names of the sub-directories.

    Args:
        location: a directory or an s3:// prefix.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: there is no such directory, or it holds no images.
        StorageError: it cannot be listed.
    """

    def __init__(self, location: str | Path, *, deadline_s: float = DEADLINE_S) -> None:
        self._folder = open_folder(location, deadline_s=deadline_s)
        if isinstance(self._folder, LocalFolder) and not Path(self._folder.url).is_dir():
            raise DataError(f"A folder of images must be a directory, but {self._folder.url} is none; correct --input.")
        self.class_names = tuple(self._folder.folders())
        labels = {name: label for label, name in enumerate(self.class_names)}
        # Files that lie beside the folders of the classes have no class.
        images = [
            name for name in self._folder.walk() if PurePosixPath(name).suffix.lower() in SUFFIXES and "/" in name
        ]
        if not images:
            raise DataError(
                f"A folder of images must hold CLASS/NAME.jpg (or {', '.join(sorted(SUFFIXES - {'.jpg'}))}), "
                f"but {self._folder.url} holds none; correct --input."
            )
        numbered = sorted((labels[name.split("/", 1)[0]], name) for name in images)
        self._labels, self._files = map(list, zip(*numbered, strict=True))
        self.num_classes = len(self.class_names)
        listing = hashlib.sha256("\0".join(self._files).encode("utf-8", "surrogateescape")).hexdigest()
        name = PurePosixPath(self._folder.url).name
        self.id = f"folder {name} ({len(self._files)} files, listing {listing[:12]})"

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The files [start, stop) in the order of their classes and names."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as threads:
            contents = threads.map(self._folder.read, self._files[start:stop])
            for number, content in zip(range(start, stop), contents, strict=True):
                yield RawImage(f"{number:08d}", self._files[number], content, self._labels[number])
