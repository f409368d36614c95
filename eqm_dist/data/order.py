"""Which sample comes at which position: a closed form of (seed, epoch, position), without state.

    positions   0 1 2 ... N-1 | N ... 2N-1 | ...        one epoch after the other, without a gap
    shards      permuted in each epoch
    windows     ``window_shards`` consecutive permuted shards; the samples are permuted inside each window

A worker reads a contiguous part of the positions, so it touches few shards at a time; the order does not know how
many workers there are. Permutations sort by Philox keys (see ``eqm_dist.rng``): the key of shard s in epoch e is drawn
at counter e * num_shards + s, the key of sample i at e * N + i. To resume anywhere costs one permutation of the
shards and one of a window.

Several data sets are mixed in blocks of ``MIX_BLOCK`` positions. Each block holds an exact number of samples of each
data set, in an order of its own (keys at counter = position), and each data set goes on with its own order from block
to block: block b begins at its position b * (its samples per block). So this too is a closed form of the position.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from eqm_dist.errors import DataError
from eqm_dist.rng import Stream, random_bits

MIX_BLOCK = 1024
"""Positions in which a mixture holds exactly its shares. Part of what decides the order: never changed."""


def rank_range(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """Rank ``rank``'s contiguous part [low, high) of the positions [start, stop).

    The parts of ranks 0 .. world - 1 follow each other, cover the range exactly, and differ by at most one in size.
    """
    count = stop - start
    return start + count * rank // world, start + count * (rank + 1) // world


class SampleOrder:
    """The order of all epochs of one data set.

    Args:
        shard_sizes: number of samples of each shard, in manifest order.
        seed: of the run.
        window_shards: samples are shuffled within windows of this many shards; all shards or more make every epoch a
            full permutation.

    Raises:
        DataError: there is no shard, or an empty one, or the window is not positive.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window_shards: int) -> None:
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        if self._sizes.size == 0 or self._sizes.min() < 1:
            raise DataError(f"An order needs shards of at least one sample each, received sizes {list(shard_sizes)}.")
        if window_shards < 1:
            raise DataError(f"window_shards must be at least 1, received {window_shards}.")
        self.num_samples = int(self._sizes.sum())
        self.num_shards = len(self._sizes)
        self._seed = seed
        self._window_shards = window_shards
        self._first_sample = np.cumsum(self._sizes) - self._sizes
        # A batch may straddle two epochs and, with small shards, several windows.
        self._shard_order = lru_cache(maxsize=2)(self._compute_shard_order)
        self._window_order = lru_cache(maxsize=4)(self._compute_window_order)

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [n], int64, in any order -> epochs [n] and sample indices [n], int64, counted in manifest order."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        indices = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            _, window_starts = self._shard_order(int(epoch))
            windows = np.searchsorted(window_starts, offsets[rows], side="right") - 1
            for window in np.unique(windows):
                chosen = rows[windows == window]
                order = self._window_order(int(epoch), int(window))
                indices[chosen] = order[offsets[chosen] - window_starts[window]]
        return epochs, indices

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of the window at ``position``, then those of the window after it: what to have at hand there."""
        epoch, offset = divmod(position, self.num_samples)
        order, window_starts = self._shard_order(epoch)
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        shards = order[window * self._window_shards :][: 2 * self._window_shards].tolist()
        if window + 1 == len(window_starts):
            shards += self._shard_order(epoch + 1)[0][: self._window_shards].tolist()
        return list(dict.fromkeys(shards))

    def _compute_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted shards of an epoch, and the offset in the epoch at which each window starts."""
        count = len(self._sizes)
        order = _sorting_order(self._seed, Stream.SHARD_ORDER, epoch * count + np.arange(count))
        ends = np.cumsum(self._sizes[order])
        return order, np.concatenate([[0], ends[self._window_shards - 1 : -1 : self._window_shards]])

    def _compute_window_order(self, epoch: int, window: int) -> np.ndarray:
        """The permuted sample indices of one window."""
        order, _ = self._shard_order(epoch)
        shards = order[window * self._window_shards : (window + 1) * self._window_shards]
        samples = np.concatenate([self._first_sample[shard] + np.arange(int(self._sizes[shard])) for shard in shards])
        return samples[_sorting_order(self._seed, Stream.SAMPLE_ORDER, epoch * self.num_samples + samples)]


class MixedOrder:
    """Several data sets, mixed by weight. Samples and shards are numbered through, data set after data set.

    Each data set has epochs of its own: a small one with a large weight is repeated more often than the others.

    Args:
        orders: of the data sets.
        weights: share of each data set, in any unit; honoured to 1 / MIX_BLOCK.
        seed: of the run.

    Raises:
        DataError: there are not as many weights as data sets, or a weight is too small to be honoured.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], seed: int) -> None:
        self._orders = list(orders)
        self.block_samples = apportion(weights, MIX_BLOCK)
        """Samples of each data set in each block."""
        if len(weights) != len(orders) or min(self.block_samples) < 1:
            raise DataError(
                f"A mixture needs for each data set a weight of at least 1/{MIX_BLOCK} of all, received "
                f"{list(weights)} for {len(orders)} data sets; correct the weights."
            )
        self._seed = seed
        self._first_sample = np.cumsum([0, *(order.num_samples for order in orders)])
        self._first_shard = np.cumsum([0, *(order.num_shards for order in orders)])
        self._block = lru_cache(maxsize=8)(self._compute_block)

    @property
    def num_samples(self) -> int:
        """Samples of all data sets."""
        return int(self._first_sample[-1])

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [n], int64, in any order -> the data set's own epochs [n] and sample indices [n], int64."""
        sets, own = np.empty_like(positions), np.empty_like(positions)
        blocks, offsets = np.divmod(positions, MIX_BLOCK)
        for block in np.unique(blocks):
            rows = np.flatnonzero(blocks == block)
            block_sets, earlier = self._block(int(block))
            sets[rows] = block_sets[offsets[rows]]
            own[rows] = block * np.asarray(self.block_samples)[sets[rows]] + earlier[offsets[rows]]
        epochs, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(sets):
            rows = np.flatnonzero(sets == number)
            epochs[rows], indices[rows] = self._orders[number].samples(own[rows])
            indices[rows] += self._first_sample[number]
        return epochs, indices

    def upcoming_shards(self, position: int) -> list[int]:
        """The shards of every data set's window at ``position`` and of the one after it."""
        block = position // MIX_BLOCK
        return [
            int(first) + shard
            for order, first, samples in zip(self._orders, self._first_shard, self.block_samples, strict=False)
            for shard in order.upcoming_shards(block * samples)
        ]

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The data set at each place of a block [MIX_BLOCK], and how many of it come earlier in the block."""
        in_order = np.repeat(np.arange(len(self._orders)), self.block_samples)
        numbers = np.concatenate([np.arange(samples) for samples in self.block_samples])
        places = block * MIX_BLOCK + np.arange(MIX_BLOCK)
        sets = in_order[_sorting_order(self._seed, Stream.MIXTURE, places)]
        earlier = np.empty_like(numbers)
        earlier[np.argsort(sets, kind="stable")] = numbers
        return sets, earlier


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to ``total`` (largest remainders, the first of equals)."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    return shares.tolist()


def _sorting_order(seed: int, stream: Stream, counters: np.ndarray) -> np.ndarray:
    """The order that sorts the 64-bit Philox keys at ``counters``; equal keys keep their order."""
    words = random_bits(seed, stream, torch.from_numpy(counters), 2).numpy().astype(np.uint64)
    return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
