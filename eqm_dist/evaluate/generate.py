"""Images for given sample indices: image i depends on (weights, seed, i) alone, whoever generates it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eqm_dist import rng
from eqm_dist.core.corruption import per_sample
from eqm_dist.core.guidance import TimedField
from eqm_dist.core.samplers import Sampler
from eqm_dist.core.sampling import SamplingMethod, in_order, sample_queue

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """Images and what they cost.

    Attributes:
        images: [n, H, W, C] uint8.
        nfe: [n] int64, the field evaluations that each took.
        complete: [n] bool; False where the limit of its NFE cut a sample off (see ``SampleResult``).
        finite: [n] bool; False where the latents are not numbers. Such an image is that of latents of zero.
    """

    images: Tensor
    nfe: Tensor
    complete: Tensor
    finite: Tensor


def warn_of_failures(samples: int, cut_off: int, not_finite: int, nfe: int) -> None:
    """Log how many of the samples are not what was asked for: not complete, or not finite."""
    if cut_off:
        logger.warning("%d of %d samples were cut off by nfe=%d before they ended", cut_off, samples, nfe)
    if not_finite:
        logger.warning("%d of %d samples are not finite and became blank images", not_finite, samples)


@torch.no_grad()
def generate(
    field: TimedField,
    *,
    indices: Tensor,
    labels: Tensor,
    latent_shape: Sequence[int],
    method: SamplingMethod,
    seed: int,
    decode: Callable[[Tensor], Tensor],
    batch: int,
    start: Callable[[Tensor], Tensor] | None = None,
    start_time: float = 0.0,
) -> Generated:
    """Follow the field from a start for every index and decode the result.

    The start of index i is noise drawn from (seed, i) alone, so workers may divide the indices as they like and choose
    any batch; the images agree up to the rounding of the network's sums, which may depend on the size of the batch.

    Args:
        field: (x [B, C, h, w], labels [B], time [B]) -> field [B, C, h, w], pointing downhill; see ``blind_to_time``.
        indices: [n] int64 sample indices, in any order, possibly none; the work is done on their device.
        labels: [n] int64, the class of each.
        latent_shape: (C, h, w).
        method: how the field is followed.
        seed: seed of the start noise, drawn from ``Stream.START_NOISE``.
        decode: latents [B, C, h, w] -> images [B, H, W, C'] uint8.
        batch: samples under way at once; where one ends, the next takes its place.
        start: positions [b] in ``indices`` -> other starts [b, C, h, w] than noise, such as partly noised latents.
        start_time: the gamma of such starts, for integrators of a field that knows time.

    Raises:
        ConfigError: an option is out of range, or the sampler cannot use it.
    """

    def noise(rows: Tensor) -> Tensor:
        return rng.normal(seed, rng.Stream.START_NOISE, indices[rows], latent_shape)

    queue = sample_queue(
        lambda x, rows, time: field(x, labels[rows], time),
        start or noise,
        torch.arange(len(indices), device=indices.device),
        method,
        slots=batch,
        start_time=start_time,
    )
    result = in_order(list(queue))
    return _decoded(result.samples, result.nfe, result.complete, decode, batch)


@torch.no_grad()
def generate_along(
    field: TimedField,
    *,
    indices: Tensor,
    labels: Tensor,
    latent_shape: Sequence[int],
    sampler: Sampler,
    nfe: Sequence[int],
    seed: int,
    decode: Callable[[Tensor], Tensor],
) -> Iterator[Generated]:
    """The images of ``generate`` for each of several NFE, for the price of the largest.

    For descents whose steps do not depend on the NFE to come: points of one trajectory.

    Args:
        field: see ``generate``, as are the others; all samples are under way at once.
        sampler: a descent without a falling step size.
        nfe: rising, at least one.
    """
    assert list(nfe) == sorted(set(nfe))
    assert nfe[0] > 0
    x = rng.normal(seed, rng.Stream.START_NOISE, indices, latent_shape)
    nothing = torch.zeros(len(x), device=x.device)
    state = sampler.start(x, nfe[-1], 0.0)
    for count in range(1, nfe[-1] + 1):
        point, time = sampler.look(x, state, nothing)
        x, state, _ = sampler.move(x, state, field(point, labels, time), nothing)
        if count in nfe:
            spent = torch.full((len(x),), count, device=x.device)
            yield _decoded(x, spent, torch.ones_like(spent, dtype=torch.bool), decode, len(x))


def _decoded(
    latents: Tensor, nfe: Tensor, complete: Tensor, decode: Callable[[Tensor], Tensor], batch: int
) -> Generated:
    finite = latents.flatten(1).isfinite().all(1)
    latents = torch.where(per_sample(finite, latents), latents, 0)
    images = torch.cat([decode(part) for part in latents.split(batch)])
    return Generated(images, nfe, complete, finite)
