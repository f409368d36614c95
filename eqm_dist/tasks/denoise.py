"""Restoring partly noised images: descent simply begins there instead of at noise (paper, Figure 10)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from eqm_dist import rng
from eqm_dist.core.corruption import corrupt
from eqm_dist.evaluate.generate import Generated
from eqm_dist.evaluate.grid import sample_grid

Draw = Callable[[Tensor, float], Generated]
"""(starts [n, C, h, w], gamma of all of them) -> what the sampler makes of them."""


@dataclass(frozen=True)
class Restored:
    """Images from one level of start noise.

    Attributes:
        start_noise: 1 - gamma: 1 is noise alone, 0 the image itself.
        starts: [n, H, W, C] uint8, what the descent began with.
        images: [n, H, W, C] uint8, where it ended.
        error: root mean square difference from the originals, in grey levels of 255.
        start_error: the same of the starts.
        nfe: mean NFE.
    """

    start_noise: float
    starts: Tensor
    images: Tensor
    error: float
    start_error: float
    nfe: float


def restore(
    draw: Draw,
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    start_noises: Iterable[float],
    *,
    seed: int,
) -> list[Restored]:
    """Noise the latents [n, C, h, w] to every level, and let the sampler go on from there.

    The noise of image i depends on (seed, i) alone and is the same at all levels.
    """
    noise = rng.normal(
        seed, rng.Stream.START_NOISE, torch.arange(len(latents), device=latents.device), latents.shape[1:]
    )
    originals = decode(latents)
    results = []
    for start_noise in start_noises:
        gamma = 1 - start_noise
        starts = corrupt(latents, noise, torch.full(latents.shape[:1], gamma, device=latents.device))
        drawn, shown = draw(starts, gamma), decode(starts)
        errors = (_error(drawn.images, originals), _error(shown, originals))
        results.append(Restored(start_noise, shown, drawn.images, *errors, drawn.nfe.double().mean().item()))
    return results


def restoration_grid(originals: Tensor, results: Sequence[Restored], columns: int) -> Image.Image:
    """Rows: the originals, then for each level the starts and what became of them."""
    rows = [originals, *(images for result in results for images in (result.starts, result.images))]
    images = torch.cat([row[:columns].cpu() for row in rows])
    numbers = torch.arange(len(rows)).repeat_interleave(min(columns, len(originals)))
    names = ["original"]
    for result in results:
        names += [f"noise {result.start_noise:g}", "restored"]
    return sample_grid(images, numbers, columns, names)


def restoration_figure(results: Sequence[Restored], fids: Sequence[float]) -> Figure:
    """FID and error over the level of start noise."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = [result.start_noise for result in results]
    left.plot(levels, fids, marker="o")
    left.set(xlabel="start noise (1 - gamma)", ylabel="FID", ylim=(0, None))
    right.plot(levels, [result.start_error for result in results], marker="o", color="0.6", label="before")
    right.plot(levels, [result.error for result in results], marker="o", label="restored")
    right.set(xlabel="start noise (1 - gamma)", ylabel="RMS error, of 255 grey levels", ylim=(0, None))
    right.legend(frameon=False)
    return figure


def _error(images: Tensor, originals: Tensor) -> float:
    return (images.double() - originals.double()).square().mean().sqrt().item()
