"""From stored images to the pixels that are encoded: decode, bring to 8-bit grey or RGB, crop to the centre."""

import hashlib
import io
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from eqm_dist.data.bounds import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, MAX_SIDE
from eqm_dist.data.sources.image import LabelledImage, RawImage, RawSource, SkippedImage
from eqm_dist.errors import DataError

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF 2.32, tag Orientation: what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may take a file for. It knows forty formats more, of which one starts Ghostscript."""
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that say nothing of its pixels as they are read here."""
LONGEST = 8
"""Sides of a resized image, in those of its crop, above which no more than the crop is resized."""


class PreparedImages:
    """The images of a raw source, decoded and cropped: an ``ImageSource`` and a ``StoredSource``.

    Args:
        source: the stored images.
        resolution: side of the square; None takes images as they are, which must then have one size.
        channels: 1 for grey, 3 for RGB.
        num_classes: where it is more than the source shows; classes without a name are called by their number.
        max_pixels: an image with more is not decoded.

    Raises:
        DataError: the source has more classes.
    """

    def __init__(
        self,
        source: RawSource,
        *,
        resolution: int | None,
        channels: int,
        num_classes: int | None = None,
        max_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        if num_classes is not None and num_classes < source.num_classes:
            raise DataError(
                f"num_classes must be at least the {source.num_classes} of {source.id}, received {num_classes}; "
                "raise it, or leave it out."
            )
        self._source = source
        self._resolution = resolution
        self._channels = channels
        self._max_pixels = max_pixels
        self.num_classes = source.num_classes if num_classes is None else num_classes
        names = source.class_names
        self.class_names = (*names, *map(str, range(len(names), self.num_classes))) if names else ()
        size = "" if resolution is None else f", centre crop to {resolution}x{resolution}"
        self.id = f"{source.id}{size}, {'grey' if channels == 1 else 'RGB'}"

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, stop: int) -> Iterator[LabelledImage | SkippedImage]:
        """The images [start, stop), in order, decoded by as many threads as torch may use."""
        count = torch.get_num_threads()
        with ThreadPoolExecutor(count, thread_name_prefix="decode") as threads:
            # A few ahead, and not all: each stored image may be large.
            pending: deque[Future[LabelledImage | SkippedImage]] = deque()
            for raw in self._source.read(start, stop):
                if len(pending) > 2 * count:
                    yield pending.popleft().result()
                pending.append(threads.submit(self._prepare, raw))
            while pending:
                yield pending.popleft().result()

    def versions(self) -> Sequence[str]:
        """See ``StoredSource``."""
        return self._source.versions()

    def stored(self, start: int, stop: int) -> Iterator[str]:
        """See ``StoredSource``."""
        return (_digest(raw) for raw in self._source.read(start, stop))

    def _prepare(self, raw: RawImage) -> LabelledImage | SkippedImage:
        stored = _digest(raw)
        try:
            image = (
                Image.fromarray(raw.content)
                if isinstance(raw.content, np.ndarray)
                else decode(raw.content, self._max_pixels)
            )
            if self._resolution is None and image.width * image.height > MAX_SIDE**2:
                raise ValueError(
                    f"it has {image.width * image.height:,} pixels, more than {MAX_SIDE**2:,}; give --resolution"
                )
            image = image.convert("RGB").convert("L" if self._channels == 1 else "RGB")
            if self._resolution is not None:
                image = centre_crop(image, self._resolution)
        except Exception as error:  # whatever a damaged file makes a decoder raise, it is the file that is bad
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return SkippedImage(raw.key, raw.name, _without_addresses(reason), stored)
        pixels = np.asarray(image)
        return LabelledImage(raw.key, pixels.reshape(*pixels.shape[:2], self._channels), raw.label, stored)


def decode(content: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """An image file -> 8-bit pixels, upright, opaque. Of an animation the first frame.

    EXIF orientation is applied. 16-bit grey becomes ``round(value / 257)``; of 16-bit colours Pillow gives the upper
    byte. What is transparent shows white. Broken EXIF data turns nothing.

    Raises:
        Exception: the file is damaged, no image of ``FORMATS``, too large, or has pixels without a scale (floats,
            32-bit integers).
    """
    if not content:
        raise ValueError("the file is empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"the file has more than {MAX_IMAGE_BYTES:,} bytes")
    try:
        file = _loaded(content, max_pixels)
    except ValueError:
        # Pillow holds long texts against a PNG, but its pixels are none the worse for them.
        shorter = _without_texts(content)
        if len(shorter) == len(content):
            raise
        file = _loaded(shorter, max_pixels)
    with file:
        image = _opaque(_eight_bit(file))
        orientation = _orientation(file)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square of ``resolution`` pixels a side, as in ADM's ``center_crop_arr``, which the official code uses.

    Halved with a box filter while the shorter side is at least twice ``resolution``, then resized with a bicubic
    filter so that it is ``resolution``, then cropped (Dhariwal and Nichol 2021, guided_diffusion/image_datasets.py).
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    if max(width, height) > LONGEST * resolution:
        # The same pixels, but for rounding, without those that are cropped: a line of 4,000 would take a gigabyte.
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + resolution) * across, (top + resolution) * down)
        return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + resolution, top + resolution))


def _loaded(content: bytes, max_pixels: int) -> Image.Image:
    """A file with its pixels, if they are not too many."""
    Image.MAX_IMAGE_PIXELS = (
        None  # of the whole process: above it Pillow prints a warning, above twice of it it refuses
    )
    file = Image.open(io.BytesIO(content), formats=FORMATS)
    if file.width * file.height > max_pixels:
        raise OSError(
            f"it has more than {max_pixels:,} pixels, which --max-image-pixels of prepare_shards.py and evaluate.py can"
            " raise"
        )
    file.load()
    return file


def _without_texts(content: bytes) -> bytes:
    """A PNG without its texts and its colour profile; anything else as it is."""
    signature = b"\x89PNG\r\n\x1a\n"
    if not content.startswith(signature):
        return content
    parts, at = [signature], len(signature)
    while at + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        end = at + 12 + length
        if content[at + 4 : at + 8] not in PNG_TEXTS:
            parts.append(content[at:end])
        at = end
    return b"".join([*parts, content[at:]])


def _digest(raw: RawImage) -> str:
    """sha256 of a stored image, and its class."""
    digest = hashlib.sha256(b"%d " % raw.label)
    digest.update(raw.content.tobytes() if isinstance(raw.content, np.ndarray) else raw.content)
    return digest.hexdigest()


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("float pixels have no scale")
    if not image.mode.startswith("I"):
        return image
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError("32-bit pixels have no scale")
    return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the pixels are whole; how they were turned is lost
        return 1


def _without_addresses(text: str) -> str:
    """Pillow prints objects with their addresses, and equal input must give equal bytes."""
    return text.split("<_io.", 1)[0].rstrip() if "<_io." in text else text
