"""Images in a tree of folders, one folder for each class."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from eqm_dist.data.bounds import MAX_IMAGE_BYTES
from eqm_dist.data.sources.image import RawImage
from eqm_dist.data.sources.names import SUFFIXES, is_hidden, is_image, readable, without_hidden
from eqm_dist.errors import DataError
from eqm_dist.storage.folder import LocalFolder
from eqm_dist.storage.location import DEADLINE_S
from eqm_dist.storage.open import open_folder

READERS = 16
"""Files read at once: each waits for its server most of the time."""


class ImageFolder:
    """ROOT/CLASS/.../NAME.jpg, as torchvision's ImageFolder: classes are the sorted names of the sub-directories.

    Hidden folders and files are no images: they belong to notebooks, version control and Macs.

    Args:
        location: a directory or an s3:// prefix.
        deadline_s: how long S3 may fail before it is given up.

    Raises:
        DataError: there is no such directory, it holds no images, or images without a class.
        StorageError: it cannot be listed.
    """

    def __init__(self, location: str | Path, *, deadline_s: float = DEADLINE_S) -> None:
        self._folder = open_folder(location, deadline_s=deadline_s)
        url = readable(self._folder.url)
        if isinstance(self._folder, LocalFolder) and not Path(self._folder.url).is_dir():
            raise DataError(f"A folder of images must be a directory, but {url} is none; correct --input.")
        folders = [name for name in self._folder.folders() if not is_hidden(name)]
        labels = {name: label for label, name in enumerate(folders)}
        images = without_hidden([name for name in self._folder.walk() if is_image(name)], url)
        outside = [name for name in images if "/" not in name]
        if outside:
            raise DataError(
                f"Every image must lie in the folder of its class, but {len(outside)} of {len(images)} lie directly in "
                f"{url}, {readable(outside[0])} first; move them into a folder, or elsewhere."
            )
        if not images:
            raise DataError(
                f"A folder of images must hold CLASS/NAME.jpg (or {', '.join(sorted(SUFFIXES - {'.jpg'}))}), "
                f"but {url} holds none; correct --input."
            )
        numbered = sorted((labels[name.split("/", 1)[0]], name) for name in images)
        self._labels, self._files = map(list, zip(*numbered, strict=True))
        self.class_names = tuple(map(readable, folders))
        self.num_classes = len(self.class_names)
        listing = hashlib.sha256("\0".join(self._files).encode("utf-8", "surrogateescape")).hexdigest()
        name = readable(PurePosixPath(self._folder.url).name)
        self.id = f"folder {name} ({len(self._files)} files, listing {listing[:12]})"

    def __len__(self) -> int:
        return len(self._files)

    def versions(self) -> Sequence[str]:
        """See ``RawSource``."""
        return self._folder.versions(self._files)

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The files [start, stop) in the order of their classes and names."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as threads:
            # So many at once and no more: who asks takes them one by one, and each may be large.
            for first in range(start, stop, READERS):
                files = self._files[first : min(first + READERS, stop)]
                contents = threads.map(lambda name: self._folder.read(name, 0, MAX_IMAGE_BYTES + 1), files)
                for number, name, content in zip(range(first, stop), files, contents, strict=False):
                    yield RawImage(f"{number:08d}", readable(name), content, self._labels[number])
