"""Decoding and cropping, against definitions written out here."""

import io
import resource
import struct
import subprocess
import zlib
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eqm_dist.data import preprocess
from eqm_dist.data.preprocess import PreparedImages, centre_crop, decode
from eqm_dist.data.sources import LabelledImage, RawImage, SkippedImage
from tests.images import encoded, pixels, png


class Listed:
    """A raw source of these contents."""

    id, num_classes, class_names = "listed", 1, ()

    def __init__(self, *contents: bytes | np.ndarray) -> None:
        self._contents = contents

    def __len__(self) -> int:
        return len(self._contents)

    def versions(self) -> list[str]:
        return []

    def read(self, start: int, stop: int):
        for index in range(start, stop):
            yield RawImage(f"{index:08d}", f"file {index}", self._contents[index], 0)


def prepared(content: bytes | np.ndarray, resolution: int | None = None, channels: int = 3) -> np.ndarray:
    [sample] = PreparedImages(Listed(content), resolution=resolution, channels=channels).read(0, 1)
    assert isinstance(sample, LabelledImage), sample
    assert sample.image.dtype == np.uint8
    return sample.image


# --- the centre crop ---


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic kernel with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resized(image: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Bicubic along one axis, the kernel widened when it shrinks; in 8 bits, as Pillow leaves each pass."""
    scale = image.shape[axis] / size
    centres = (np.arange(size) + 0.5) * scale
    distances = np.arange(image.shape[axis]) + 0.5 - centres[:, None]
    weights = cubic(distances / max(scale, 1))
    weights /= weights.sum(axis=1, keepdims=True)
    moved = np.moveaxis(image.astype(np.float64), axis, 0)
    result = np.moveaxis(np.tensordot(weights, moved, axes=1), 0, axis)
    return np.floor(result.clip(0, 255) + 0.5)


def halved(image: np.ndarray, axis: int) -> np.ndarray:
    """Means of neighbours along one axis of even length (with the sides below all that are halved are), in 8 bits."""
    pairs = np.moveaxis(image, axis, 0).reshape(image.shape[axis] // 2, 2, -1).mean(axis=1)
    shape = np.delete(image.shape, axis)
    return np.moveaxis(np.floor(pairs + 0.5).reshape(-1, *shape), 0, axis)


def crop_by_definition(image: np.ndarray, resolution: int, orders: tuple[int, ...]) -> np.ndarray:
    """ADM's centre crop, on arrays [H, W, C]: halve, resize, crop; axis ``orders[k]`` goes first in step k."""
    firsts = iter(orders)
    while min(image.shape[:2]) >= 2 * resolution:
        first = next(firsts)
        image = halved(halved(image, first), 1 - first)
    first = next(firsts)
    scale = resolution / min(image.shape[:2])
    size = [round(side * scale) for side in image.shape[:2]]
    image = resized(resized(image, size[first], first), size[1 - first], 1 - first)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return image[top : top + resolution, left : left + resolution]


@settings(max_examples=40)
@given(
    height=st.integers(5, 24), width=st.integers(5, 24), resolution=st.integers(13, 24), seed=st.integers(0, 2**32 - 1)
)
def test_the_centre_crop_is_adms(height: int, width: int, resolution: int, seed: int) -> None:
    image = pixels(seed, 4 * height, 4 * width)
    found = np.asarray(centre_crop(Image.fromarray(image), resolution)).astype(int)
    # Pillow resizes one axis after the other, rounds to 8 bits in between, and chooses the order by the cost.
    # With the sides above it halves at most twice.
    differences = [
        np.abs(found - crop_by_definition(image, resolution, orders)) for orders in product((0, 1), repeat=3)
    ]
    # Its weights have 22 bits: a value next to a half may fall to either side.
    assert min(difference.max() for difference in differences) <= 1
    assert min((difference > 0).mean() for difference in differences) < 0.02


def test_an_image_of_that_size_stays_as_it_is() -> None:
    image = pixels(0, 32, 32)
    assert np.array_equal(prepared(png(image), 32), image)


def test_the_crop_takes_the_centre() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200
    assert (prepared(png(image), 10) == 200).all()


@pytest.mark.parametrize(("width", "height"), [(9, 100), (120, 10), (30, 400)])
def test_of_a_long_image_no_more_than_the_crop_is_resized(width: int, height: int) -> None:
    image = pixels(0, height, width)
    found = np.asarray(centre_crop(Image.fromarray(image), 12)).astype(int)
    wholes = [crop_by_definition(image, 12, orders) for orders in product((0, 1), repeat=3)]
    assert min(np.abs(found - whole).max() for whole in wholes) <= 1


def test_a_line_of_pixels_takes_no_gigabyte() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert prepared(png(pixels(0, 4000, 1)), 256).shape == (256, 256, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


# --- 8-bit correct ---


def test_grey_fills_all_channels_and_grey_of_colours_is_luma() -> None:
    grey = pixels(0, 9, 7, 1)
    assert np.array_equal(prepared(png(grey)), np.repeat(grey, 3, axis=2))
    assert np.array_equal(prepared(png(grey), channels=1), grey)
    colours = pixels(1)
    luma = colours @ np.array([0.299, 0.587, 0.114])  # ITU-R 601-2
    assert (
        np.abs(prepared(png(colours), channels=1)[..., 0] - luma).max() <= 0.51
    )  # rounding, and Pillow's 16-bit weights


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_the_nearest_of_eight(kind: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = prepared(encoded(Image.fromarray(values), kind), channels=1)[..., 0]
    assert np.array_equal(found, np.rint(values / 257))


def test_sixteen_bit_colours_are_within_one_level() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(prepared(file) - values / 257).max() <= 1


def test_what_is_transparent_shows_white() -> None:
    image = pixels(0, channels=4)
    alpha = image[..., 3:] / 255
    expected = image[..., :3] * alpha + 255 * (1 - alpha)
    # Pillow composites with 8-bit weights: a rounding at each of its two steps.
    assert np.abs(prepared(png(image)) - expected).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(image[..., 0]), Image.fromarray(image[..., 3])])
    found = prepared(encoded(grey, "PNG"), channels=1)[..., 0]
    assert np.abs(found - (image[..., 0] * alpha[..., 0] + 255 * (1 - alpha[..., 0]))).max() <= 1


def test_palettes_show_their_colours_and_their_transparent_entry_white() -> None:
    numbers = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = pixels(3, 1, 6)[0]
    image = Image.fromarray(numbers).convert("P")
    image.putpalette(palette.tobytes())
    image.putdata(numbers.flatten().tolist())
    assert np.array_equal(prepared(encoded(image, "PNG")), palette[numbers])
    palette_with_hole = palette.copy()
    palette_with_hole[2] = 255
    assert np.array_equal(prepared(encoded(image, "PNG", transparency=2)), palette_with_hole[numbers])
    one_bit = Image.fromarray(np.eye(4, dtype=bool))
    assert np.array_equal(prepared(encoded(one_bit, "PNG"), channels=1)[..., 0], 255 * np.eye(4))


def test_cmyk_jpegs_show_their_colours() -> None:
    flat = np.broadcast_to(np.array([200, 90, 30], np.uint8), (16, 16, 3))
    content = encoded(Image.fromarray(flat).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(prepared(content).astype(int) - flat).max() <= 3  # JPEG is lossy, a flat image by little


def test_exif_orientation_is_applied() -> None:
    """The eight orientations by their definition: where the stored first row and first column belong."""
    image = pixels(5, 6, 4)
    # EXIF 2.32: 0th row, 0th column of the stored pixels are the visual ...
    stored = {
        1: image,  # top, left
        2: image[:, ::-1],  # top, right
        3: image[::-1, ::-1],  # bottom, right
        4: image[::-1],  # bottom, left
        5: image.transpose(1, 0, 2),  # left, top
        6: np.rot90(image, 1),  # right, top
        7: image[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: np.rot90(image, -1),  # left, bottom
    }
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        content = encoded(Image.fromarray(np.ascontiguousarray(array)), "PNG", exif=exif)
        assert np.array_equal(prepared(content), image), orientation


def test_an_orientation_that_does_not_exist_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    image = pixels(5)
    assert np.array_equal(prepared(encoded(Image.fromarray(image), "PNG", exif=exif)), image)


# --- broken images ---

WHOLE = encoded(Image.fromarray(pixels(9, 64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "ValueError: the file is empty"),
        (b"this is no image", "UnidentifiedImageError: cannot identify image file"),
        (WHOLE[:-500], "OSError: image file is truncated"),
        (png(pixels(1))[:-60], "OSError"),
        (encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "ValueError: float pixels have no scale"),
        (encoded(Image.fromarray(np.full((4, 4), 2**20, np.int32)), "TIFF"), "ValueError: 32-bit pixels"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "floats", "32 bits"],
)
def test_broken_images_are_skipped_with_a_reason(content: bytes, reason: str) -> None:
    [first, second] = PreparedImages(Listed(content, WHOLE), resolution=16, channels=3).read(0, 2)
    assert isinstance(first, SkippedImage)
    assert (first.key, first.name) == ("00000000", "file 0")
    assert first.reason.startswith(reason)
    assert "0x" not in first.reason  # an address would make equal input give unequal bytes
    assert isinstance(second, LabelledImage)


def reason(content: bytes, **options: int) -> str:
    [sample] = PreparedImages(Listed(content), resolution=16, channels=3, **options).read(0, 1)
    assert isinstance(sample, SkippedImage)
    return sample.reason


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICNS", "SGI", "JPEG2000"])
def test_only_the_kinds_of_the_page_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(pixels(0, 64, 64)), kind)

    def started(*arguments: object, **options: object) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    assert reason(content).startswith("UnidentifiedImageError")


def test_the_limit_of_pixels_can_be_raised() -> None:
    image = png(pixels(0, 30, 40))
    assert "it has more than 1,199 pixels, which --max-image-pixels" in reason(image, max_pixels=1199)
    [sample] = PreparedImages(Listed(image), resolution=16, channels=3, max_pixels=1200).read(0, 1)
    assert isinstance(sample, LabelledImage)


def test_images_above_the_limit_of_pillow_are_decoded_when_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    [sample] = PreparedImages(Listed(png(pixels(0))), resolution=16, channels=3).read(0, 1)
    assert isinstance(sample, LabelledImage)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_long_texts_do_not_break_a_png(kind: bytes, after: bool) -> None:
    image = pixels(0)
    body = b"comment\0\0" + zlib.compress(bytes(5 << 20))
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    content = png(image)
    at = len(content) - 12 if after else 33  # before IEND, or after IHDR
    assert np.array_equal(prepared(content[:at] + chunk + content[at:]), image)


def test_a_file_beyond_the_bound_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_IMAGE_BYTES", 100)
    assert reason(png(pixels(0))) == "ValueError: the file has more than 100 bytes"


def test_images_without_a_crop_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_SIDE", 8)
    [sample] = PreparedImages(Listed(png(pixels(0, 9, 9))), resolution=None, channels=3).read(0, 1)
    assert isinstance(sample, SkippedImage)
    assert sample.reason == "ValueError: it has 81 pixels, more than 64; give --resolution"


def test_what_is_stored_is_named_by_its_bytes_and_its_class() -> None:
    first, second = png(pixels(0)), b"broken"
    images = PreparedImages(Listed(first, second), resolution=16, channels=3)
    digests = list(images.stored(0, 2))
    assert [item.stored for item in images.read(0, 2)] == digests
    assert len(set(digests)) == 2


def test_damage_anywhere_is_an_image_or_an_exception_and_never_more() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        content = bytearray(WHOLE)
        for at in generator.integers(0, len(content), 5):
            content[at] = generator.integers(0, 256)
        [sample] = PreparedImages(Listed(bytes(content)), resolution=16, channels=3).read(0, 1)
        assert isinstance(sample, SkippedImage) or sample.image.shape == (16, 16, 3)


def test_decode_reads_only_the_first_frame() -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 250)]
    content = io.BytesIO()
    frames[0].save(content, "PNG", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(decode(content.getvalue()).convert("RGB")), np.asarray(frames[0]))
