"""What images come from. A source is a numbered list of labelled images that can be read from any place."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class LabelledImage:
    """One image of a source."""

    key: str
    """Unique in its source, without a dot (WebDataset ends the key at the first one)."""
    image: np.ndarray
    """[H, W, C], uint8; all of a source have one shape."""
    label: int
    """In [0, num_classes)."""


class ImageSource(Protocol):
    """Images numbered 0 .. len - 1; a shard is a range of these numbers, so shards can be written in any order."""

    id: str
    """Names the images; written to the manifest."""
    num_classes: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        """The images [start, stop), in order."""
        ...


class Digits:
    """Scikit-learn's 1,797 handwritten digits (Alpaydin and Kaynak 1998): 8x8 pixels, ten classes, no download.

    The 17 grey levels 0..16 become ``round(level * 255 / 16)``. Only level 8 lies half-way (127.5); it goes to the
    even 128. The levels stay distinct: ``round(pixel * 16 / 255)`` gives them back.
    """

    id = "sklearn-digits"
    num_classes = 10

    def __len__(self) -> int:
        return 1797

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        """The digits [start, stop): images [8, 8, 1]."""
        images, labels = _load_digits()
        for index in range(start, stop):
            yield LabelledImage(f"{index:06d}", images[index], int(labels[index]))


@cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    # Scikit-learn takes seconds to import, and shards that are there already do not need it.
    from sklearn.datasets import load_digits

    levels, labels = load_digits(return_X_y=True)
    return np.rint(np.reshape(levels, (-1, 8, 8, 1)) * 255 / 16).astype(np.uint8), np.asarray(labels)
