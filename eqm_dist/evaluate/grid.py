"""A picture of samples: one row per class."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEGIBLE_SIDE = 40
"""Images that are smaller are enlarged by a whole factor to at least so many pixels."""
GAP = 2
"""Pixels of background around every image."""


def sample_grid(images: Tensor, labels: Tensor, columns: int, names: Sequence[str] | None = None) -> Image.Image:
    """One row for each class among the labels, in rising order, with its number at the left.

    Args:
        images: [n, H, W, C] uint8, C = 1 (grey) or 3 (RGB).
        labels: [n] int64.
        columns: images per row: the first of each class; a class with fewer leaves the rest of its row empty.
        names: what stands at the left of the rows instead of the numbers.

    Returns:
        An RGB picture. Small images are enlarged without smoothing.
    """
    height, width, channels = images.shape[1:]
    assert channels in (1, 3)
    scale = max(1, math.ceil(LEGIBLE_SIDE / height))
    tile_height, tile_width = height * scale + GAP, width * scale + GAP
    classes = torch.unique(labels).tolist()
    font = ImageFont.load_default(size=LEGIBLE_SIDE // 2)
    texts = list(map(str, classes)) if names is None else list(names)
    margin = math.ceil(max(map(font.getlength, texts))) + LEGIBLE_SIDE // 2

    canvas = Image.new("RGB", (margin + columns * tile_width + GAP, len(classes) * tile_height + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    enlarged = np.kron(images.expand(-1, -1, -1, 3).cpu().numpy(), np.ones((1, scale, scale, 1), dtype=np.uint8))
    for row, label in enumerate(classes):
        top = GAP + row * tile_height
        draw.text((margin / 2, top + height * scale / 2), texts[row], fill="black", font=font, anchor="mm")
        for column, index in enumerate((labels == label).nonzero().flatten()[:columns].tolist()):
            canvas.paste(Image.fromarray(enlarged[index]), (margin + GAP + column * tile_width, top))
    return canvas
