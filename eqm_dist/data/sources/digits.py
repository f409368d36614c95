"""The embedded data set."""

from collections.abc import Iterator
from functools import cache

import numpy as np

from eqm_dist.data.sources.image import LabelledImage


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
