"""Which sample comes at which position: a closed form of (seed, epoch, position), without state.

    positions   0 1 2 ... N-1 | N ... 2N-1 | ...        one epoch after the other, without a gap
    shards      permuted in each epoch
    windows     ``window_shards`` consecutive permuted shards; the samples are permuted inside each window

A worker reads a contiguous part of the positions, so it touches few shards at a time; the order does not know how
many workers there are. Permutations sort by Philox keys (see ``eqm_dist.rng``): the key of shard s in epoch e is drawn
at counter e * num_shards + s, the key of sample i at e * N + i. To resume anywhere costs one permutation of the
shards and one of a window.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from eqm_dist.errors import DataError
from eqm_dist.rng import Stream, random_bits


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

    def _compute_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted shards of an epoch, and the offset in the epoch at which each window starts."""
        count = len(self._sizes)
        order = self._sorting_order(Stream.SHARD_ORDER, epoch * count + np.arange(count))
        ends = np.cumsum(self._sizes[order])
        return order, np.concatenate([[0], ends[self._window_shards - 1 : -1 : self._window_shards]])

    def _compute_window_order(self, epoch: int, window: int) -> np.ndarray:
        """The permuted sample indices of one window."""
        order, _ = self._shard_order(epoch)
        shards = order[window * self._window_shards : (window + 1) * self._window_shards]
        samples = np.concatenate([self._first_sample[shard] + np.arange(int(self._sizes[shard])) for shard in shards])
        return samples[self._sorting_order(Stream.SAMPLE_ORDER, epoch * self.num_samples + samples)]

    def _sorting_order(self, stream: Stream, counters: np.ndarray) -> np.ndarray:
        """The order that sorts the 64-bit Philox keys at ``counters``; equal keys keep their order."""
        words = random_bits(self._seed, stream, torch.from_numpy(counters), 2).numpy().astype(np.uint64)
        return np.argsort(words[:, 0] << np.uint64(32) | words[:, 1], kind="stable")
