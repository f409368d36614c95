"""From stored images to the pixels that are encoded: decode, bring to 8-bit grey or RGB, crop to the centre."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

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


class PreparedImages:
    """The images of a raw source, decoded and cropped: an ``ImageSource``.

    Args:
        source: the stored images.
        resolution: side of the square; None takes images as they are, which must then have one size.
        channels: 1 for grey, 3 for RGB.
        num_classes: where it is more than the source shows.

    Raises:
        DataError: the source has more classes.
    """

    def __init__(
        self, source: RawSource, *, resolution: int | None, channels: int, num_classes: int | None = None
    ) -> None:
        if num_classes is not None and num_classes < source.num_classes:
            raise DataError(
                f"num_classes must be at least the {source.num_classes} of {source.id}, received {num_classes}."
            )
        self._source = source
        self._resolution = resolution
        self._channels = channels
        self.class_names = source.class_names
        self.num_classes = num_classes or source.num_classes
        size = "" if resolution is None else f", centre crop to {resolution}x{resolution}"
        self.id = f"{source.id}{size}, {'grey' if channels == 1 else 'RGB'}"

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, stop: int) -> Iterator[LabelledImage | SkippedImage]:
        """The images [start, stop), in order, decoded by as many threads as torch may use."""
        with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="decode") as threads:
            yield from threads.map(self._prepare, self._source.read(start, stop))

    def _prepare(self, raw: RawImage) -> LabelledImage | SkippedImage:
        try:
            image = Image.fromarray(raw.content) if isinstance(raw.content, np.ndarray) else decode(raw.content)
            image = image.convert("RGB").convert("L" if self._channels == 1 else "RGB")
            if self._resolution is not None:
                image = centre_crop(image, self._resolution)
        except Exception as error:  # whatever a damaged file makes a decoder raise, it is the file that is bad
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return SkippedImage(raw.key, raw.name, _without_addresses(reason))
        pixels = np.asarray(image)
        return LabelledImage(raw.key, pixels.reshape(*pixels.shape[:2], self._channels), raw.label)


def decode(content: bytes) -> Image.Image:
    """An image file -> 8-bit pixels, upright, opaque. Of an animation the first frame.

    EXIF orientation is applied. 16-bit grey becomes ``round(value / 257)``; of 16-bit colours Pillow gives the upper
    byte. What is transparent shows white. Broken EXIF data turns nothing.

    Raises:
        Exception: the file is damaged, no image, or has pixels without a scale (floats, 32-bit integers).
    """
    if not content:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(content)) as file:
        file.load()
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
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


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
