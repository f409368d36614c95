"""Images for given sample indices: image i depends on (weights, seed, i) alone, whoever generates it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eqm_dist import rng
from eqm_dist.core.objective import ConditionalField
from eqm_dist.core.samplers import Sampler
from eqm_dist.core.sampling import sample


@dataclass(frozen=True)
class Generated:
    """Images [n, H, W, C] uint8 and the field evaluations that each took, ``nfe`` [n] int64."""

    images: Tensor
    nfe: Tensor


def balanced_labels(indices: Tensor, num_classes: int) -> Tensor:
    """Labels [n] of the sample indices [n]: ``i % num_classes``, so any range of indices is as balanced as can be."""
    return indices % num_classes


@torch.no_grad()
def generate(
    field: ConditionalField,
    *,
    indices: Tensor,
    labels: Tensor,
    latent_shape: Sequence[int],
    sampler: Sampler[Any],
    evaluations: int,
    seed: int,
    decode: Callable[[Tensor], Tensor],
    batch: int,
) -> Generated:
    """Descend the field from noise for every index and decode the result.

    The start of index i is drawn from (seed, i) alone, so workers may divide the indices as they like and choose any
    batch; the images agree up to the rounding of the network's sums, which may depend on the size of the batch.

    Args:
        field: (x [B, C, h, w], labels [B]) -> field [B, C, h, w], pointing downhill; a model, guided or not.
        indices: [n] int64 sample indices, in any order, possibly none; the work is done on their device.
        labels: [n] int64, the class of each.
        latent_shape: (C, h, w).
        sampler: the descent method.
        evaluations: field evaluations per sample.
        seed: seed of the start noise, drawn from ``Stream.START_NOISE``.
        decode: latents [B, C, h, w] -> images [B, H, W, C'] uint8.
        batch: images generated at once.

    Raises:
        ConfigError: evaluations or seed out of range.
    """
    images, nfe = [], []
    for chunk, chunk_labels in zip(indices.split(batch), labels.split(batch), strict=True):
        start = rng.normal(seed, rng.Stream.START_NOISE, chunk, latent_shape)
        result = sample(lambda x, given=chunk_labels: field(x, given), start, sampler, evaluations)
        images.append(decode(result.samples))
        nfe.append(result.nfe)
    return Generated(torch.cat(images), torch.cat(nfe))
