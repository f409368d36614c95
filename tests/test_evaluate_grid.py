import numpy as np
import pytest
import torch

from eqm_dist.evaluate.grid import GAP, sample_grid


def tiles(picture, rows: int, columns: int, side: int) -> np.ndarray:
    """The images of a grid, [rows, columns, side, side, 3]; images sit at the right and lower end."""
    pixels = np.asarray(picture)
    left = pixels.shape[1] - columns * (side + GAP)
    cut = [
        [pixels[top : top + side, x : x + side] for x in range(left, pixels.shape[1], side + GAP)]
        for top in range(GAP, pixels.shape[0], side + GAP)
    ]
    found = np.array(cut)
    assert found.shape[:2] == (rows, columns)
    return found


def test_each_class_has_its_row_enlarged_without_smoothing():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (30, 8, 8, 1), dtype=torch.uint8, generator=generator)
    labels = torch.arange(30) % 10
    found = tiles(sample_grid(images, labels, columns=3), rows=10, columns=3, side=40)
    for index in range(30):
        tile = found[index % 10, index // 10]
        assert np.array_equal(tile[2::5, 2::5], images[index].expand(-1, -1, 3).numpy())
        assert np.array_equal(tile, tile[2::5, 2::5].repeat(5, 0).repeat(5, 1))


def test_every_row_shows_its_label():
    picture = sample_grid(torch.zeros(10, 8, 8, 1, dtype=torch.uint8), torch.arange(10), columns=1)
    margin = np.asarray(picture)[:, : picture.width - 42 - GAP]
    rows = [margin[GAP + row * 42 : GAP + row * 42 + 40] for row in range(10)]
    assert all((row < 128).any() for row in rows)
    assert len({row.tobytes() for row in rows}) == 10  # ten different numbers


def test_a_short_row_stays_empty_and_surplus_images_are_left_out():
    images = torch.zeros(5, 8, 8, 1, dtype=torch.uint8)
    found = tiles(sample_grid(images, torch.tensor([4, 4, 4, 7, 4]), columns=2), rows=2, columns=2, side=40)
    assert (found[0] == 0).all()
    assert (found[1, 0] == 0).all()
    assert (found[1, 1] == 255).all()


@pytest.mark.parametrize("side", [40, 64])
def test_large_colour_images_stay_as_they_are(side):
    images = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8)
    found = tiles(sample_grid(images, torch.tensor([0, 1]), columns=1), rows=2, columns=1, side=side)
    assert np.array_equal(found[:, 0], images.numpy())
