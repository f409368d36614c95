"""Images for the tests of preparation: every layout a source may have, and every kind of image that is hard to read."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 20, channels: int = 3) -> np.ndarray:
    """Random pixels [H, W, C], uint8."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    """An array [H, W, C] as a PNG file."""
    return encoded(Image.fromarray(array if array.shape[2] != 1 else array[..., 0]), "PNG")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file of that kind."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def write_idx(path: Path, array: np.ndarray) -> None:
    """An array of bytes as an IDX file."""
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_tree(root: Path, good: int = 24) -> list[str]:
    """A tree of two classes with ``good`` plain PNG files, four odd but whole ones, and three broken ones.

    Returns:
        The broken files, in the order in which a source meets them.
    """
    files = {f"{'cat' if index % 3 else 'dog'}/{index:03d}.png": png(pixels(index)) for index in range(good)}
    files["cat/cmyk.jpg"] = encoded(Image.fromarray(pixels(100)).convert("CMYK"), "JPEG")
    files["cat/deep.png"] = encoded(Image.fromarray(pixels(101)[..., 0].astype(np.uint16) * 257), "PNG")
    files["dog/palette.png"] = encoded(Image.fromarray(pixels(102)).quantize(16), "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    files["dog/nested/turned.JPEG"] = encoded(Image.fromarray(pixels(103)), "JPEG", exif=turned)
    files["cat/truncated.jpg"] = encoded(Image.fromarray(pixels(104)), "JPEG")[:-200]
    files["cat/zero.webp"] = b""
    files["dog/text.png"] = b"this is no image"
    files["dog/readme.txt"] = b"not offered as an image at all"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return ["cat/truncated.jpg", "cat/zero.webp", "dog/text.png"]
