"""What a source of images is, and what it gives."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
    stored: str | None = None
    """sha256 of the image as its source stores it; None where it stores none."""


@dataclass(frozen=True)
class SkippedImage:
    """An image that cannot be decoded: it gets no sample, and is named in the report."""

    key: str
    """Its number in its source, in decimals."""
    name: str
    """What its source calls it: a file, a member of a tar, a row of a table."""
    reason: str
    stored: str | None = None
    """As of ``LabelledImage``; not part of the report."""

    def listed(self) -> dict[str, str]:
        """What the report says of it."""
        return {"key": self.key, "name": self.name, "reason": self.reason}


@runtime_checkable
class StoredSource(Protocol):
    """A source whose images somebody may change while a data set is made of them, or after."""

    def versions(self) -> Sequence[str]:
        """What differs where a file was changed, found without reading it: sizes and times of change.

        Raises:
            StorageError: the storage cannot tell.
        """
        ...

    def stored(self, start: int, stop: int) -> Iterator[str]:
        """sha256 of each of the stored images [start, stop), as ``LabelledImage.stored``.

        Raises:
            StorageError: the machine cannot read them.
        """
        ...


class ImageSource(Protocol):
    """Images numbered 0 .. len - 1; a shard is a range of these numbers, so shards can be written in any order."""

    id: str
    """Names the images; written to the manifest."""
    num_classes: int

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[LabelledImage | SkippedImage]:
        """The images [start, stop), in order; one item for each."""
        ...


@dataclass(frozen=True)
class RawImage:
    """One image as it is stored, before decoding and cropping (``eqm_dist.data.preprocess``)."""

    key: str
    name: str
    content: bytes | np.ndarray
    """An image file (JPEG, PNG, WebP ...), or grey pixels [H, W], uint8."""
    label: int


class RawSource(Protocol):
    """Stored images numbered 0 .. len - 1. Cheap to pickle: it holds names and places, not contents."""

    id: str
    num_classes: int
    class_names: tuple[str, ...]
    """One for each class, or none where the source has no names."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[RawImage]:
        """The images [start, stop), in order. Of one that is larger than ``MAX_IMAGE_BYTES`` a byte more than that.

        Raises:
            StorageError: the machine cannot read them.
        """
        ...

    def versions(self) -> Sequence[str]:
        """See ``StoredSource``."""
        ...
