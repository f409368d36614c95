"""Random numbers as a function of (seed, stream, sample position).

Every random quantity of a run (gamma, noise, flips, ...) has a stream of its own, and in it every sample position has a
sequence of its own. So the numbers do not depend on how a batch is divided over workers, on the order in which they are
asked for, or on what was drawn before; and nothing has to be saved to resume. The generator is Philox-4x32-10 of
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), written in torch integer arithmetic, so that a
CPU and a GPU give the same words.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from eqm_dist.errors import ConfigError, DataError

_MASK = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_KEY_INCREMENT_0 = 0x9E3779B9
_KEY_INCREMENT_1 = 0xBB67AE85
_ROUNDS = 10


class Stream(IntEnum):
    """The named streams. A number, once given, is never changed or used again: old runs must stay reproducible."""

    GAMMA = 0
    NOISE = 1
    POSTERIOR = 2
    FLIP = 3
    LABEL_DROPOUT = 4
    SHARD_ORDER = 5
    SAMPLE_ORDER = 6
    START_NOISE = 7
    START_LABEL = 8
    SPLIT = 9
    INIT = 10
    MIXTURE = 11


def philox_4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox-4x32-10: four random words for each counter.

    Args:
        counter: [..., 4] int64 holding unsigned 32-bit words.
        key: [..., 2] int64 holding unsigned 32-bit words; its leading dimensions broadcast against the counter's.

    Returns:
        [..., 4] int64 holding unsigned 32-bit words.
    """
    words = torch.broadcast_tensors(*counter.unbind(-1), *key.unbind(-1))
    return torch.stack(_philox_words(words[:4], words[4:]), dim=-1)


def _philox_words(counter: Sequence[Tensor], key: Sequence[Tensor | int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ten rounds, on four counter words of one shape."""
    word_0, word_1, word_2, word_3 = counter
    key_0, key_1 = key
    for _ in range(_ROUNDS):
        # The signed product wraps, but the bits of both of its halves are those of the unsigned one. A low half is only
        # ever an operand of a xor whose result is masked, so its upper bits may stay until the end. In place, because
        # allocating every intermediate doubles the time.
        product_0 = word_0 * _MULTIPLIER_0
        product_1 = word_2 * _MULTIPLIER_1
        word_0 = (product_1 >> 32).bitwise_xor_(word_1).bitwise_xor_(key_0).bitwise_and_(_MASK)
        word_2 = (product_0 >> 32).bitwise_xor_(word_3).bitwise_xor_(key_1).bitwise_and_(_MASK)
        word_1, word_3 = product_1, product_0
        key_0 = (key_0 + _KEY_INCREMENT_0) & _MASK
        key_1 = (key_1 + _KEY_INCREMENT_1) & _MASK
    return word_0, word_1 & _MASK, word_2, word_3 & _MASK


def random_bits(seed: int, stream: Stream | int, positions: Tensor, count: int) -> Tensor:
    """The first ``count`` random words of each sample position.

    Word j of position p is lane ``j % 4`` of Philox at counter (j // 4, stream, low and high word of p) under the key
    (low and high word of the seed). It does not depend on ``count`` nor on the other positions.

    Args:
        seed: 0 <= seed < 2^64.
        stream: which quantity the words are for.
        positions: [n] int64, not negative; the result is on its device.
        count: words per position.

    Returns:
        [n, count] int64 holding unsigned 32-bit words.

    Raises:
        ConfigError: the seed is out of range.
        DataError: positions are not a vector of int64.
    """
    if not 0 <= seed < 2**64:
        raise ConfigError(f"A seed must lie in [0, 2^64), got {seed}; choose another one.")
    if positions.ndim != 1 or positions.dtype != torch.int64:
        raise DataError(
            f"Positions must be a vector of int64, got shape {tuple(positions.shape)} of {positions.dtype}; "
            "convert them with .flatten().long()."
        )
    blocks = -(-count // 4)
    counter = torch.broadcast_tensors(
        torch.arange(blocks, device=positions.device)[None, :],
        torch.full((1, 1), int(stream), device=positions.device),
        (positions & _MASK)[:, None],
        ((positions >> 32) & _MASK)[:, None],
    )
    words = _philox_words(counter, (seed & _MASK, seed >> 32))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(
    seed: int,
    stream: Stream | int,
    positions: Tensor,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1), one block of ``shape`` per position.

    A word w becomes (w + 1/2) / 2^32, which is exact in float64 and never 0 or 1. Rounding to a narrower type can reach
    0 or 1 (in float32 the 128 largest words would give 1), so the result is clamped to that type's smallest normal
    number and to the last number before 1.

    Args:
        seed, stream, positions: see ``random_bits``.
        shape: shape of one sample; () gives one number per position.
        dtype: floating-point type of the result.

    Returns:
        [n, *shape] of ``dtype`` on the device of ``positions``.
    """
    limits = torch.finfo(dtype)
    values = _unit_interval(random_bits(seed, stream, positions, math.prod(shape))).to(dtype)
    return values.clamp_(limits.tiny, 1 - limits.eps / 2).reshape(-1, *shape)


def normal(
    seed: int,
    stream: Stream | int,
    positions: Tensor,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers by Box and Muller's transform, one block of ``shape`` per position.

    Words 2i and 2i + 1 of a position give its numbers 2i and 2i + 1. The transform runs in float64, whose logarithm and
    cosine may differ in the last bit between devices; after rounding to float32 that is hardly ever visible. The
    largest possible magnitude is sqrt(66 ln 2) = 6.76.

    Args:
        seed, stream, positions: see ``random_bits``.
        shape: shape of one sample; () gives one number per position.
        dtype: floating-point type of the result.

    Returns:
        [n, *shape] of ``dtype`` on the device of ``positions``.
    """
    count = math.prod(shape)
    pairs = _unit_interval(random_bits(seed, stream, positions, count + count % 2)).unflatten(1, (-1, 2))
    radius = pairs[..., 0].log().mul_(-2).sqrt_()
    angle = pairs[..., 1] * (2 * math.pi)
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :count]
    return values.to(dtype).reshape(-1, *shape)


def _unit_interval(words: Tensor) -> Tensor:
    return words.to(torch.float64).add_(0.5).mul_(2.0**-32)
