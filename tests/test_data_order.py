"""The sample order: a permutation in every epoch, shuffled well, the same for any division of the positions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm_dist.data.order import MIX_BLOCK, MixedOrder, SampleOrder, apportion, rank_range
from eqm_dist.errors import DataError
from eqm_dist.rng import Stream, random_bits

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)
seeds = st.integers(0, 2**64 - 1)
windows = st.integers(1, 14)


def epoch_samples(order: SampleOrder, epoch: int) -> np.ndarray:
    positions = np.arange(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    return order.samples(positions)[1]


def sort_by_keys(seed: int, stream: Stream, items: list[int], counters: list[int]) -> list[int]:
    words = random_bits(seed, stream, torch.tensor(counters), 2).tolist()
    keys = [high * 2**32 + low for high, low in words]
    return [item for _, item in sorted(zip(keys, items, strict=True), key=lambda pair: pair[0])]


def epoch_by_definition(sizes: list[int], seed: int, window: int, epoch: int) -> list[int]:
    """The order as its docstring tells it, one sample at a time."""
    ends = list(itertools.accumulate(sizes))
    members = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    shards = list(range(len(sizes)))
    shards = sort_by_keys(seed, Stream.SHARD_ORDER, shards, [epoch * len(sizes) + shard for shard in shards])
    result = []
    for start in range(0, len(shards), window):
        samples = [sample for shard in shards[start : start + window] for sample in members[shard]]
        result += sort_by_keys(seed, Stream.SAMPLE_ORDER, samples, [epoch * ends[-1] + sample for sample in samples])
    return result


@given(st.integers(0, 10**6), st.integers(0, 1000), st.integers(1, 70))
def test_rank_ranges_partition_any_range(start: int, count: int, world: int) -> None:
    parts = [rank_range(start, start + count, rank, world) for rank in range(world)]
    assert parts[0][0] == start
    assert parts[-1][1] == start + count
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    sizes = [high - low for low, high in parts]
    assert max(sizes) - min(sizes) <= 1


@given(shard_sizes, seeds, windows, st.integers(0, 10**9))
@settings(deadline=None)
def test_every_epoch_is_a_permutation(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = SampleOrder(sizes, seed, window)
    assert sorted(epoch_samples(order, epoch)) == list(range(sum(sizes)))


@given(shard_sizes, seeds, windows, st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_the_order_is_the_one_defined(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    assert epoch_samples(SampleOrder(sizes, seed, window), epoch).tolist() == epoch_by_definition(
        sizes, seed, window, epoch
    )


@given(shard_sizes, seeds, windows, st.lists(st.integers(0, 200), max_size=50))
@settings(deadline=None, max_examples=50)
def test_any_positions_in_any_order_give_what_the_whole_gives(
    sizes: list[int], seed: int, window: int, positions: list[int]
) -> None:
    whole_epochs, whole = SampleOrder(sizes, seed, window).samples(np.arange(201))
    chosen = np.array(positions, dtype=np.int64)
    epochs, indices = SampleOrder(sizes, seed, window).samples(chosen)
    assert np.array_equal(indices, whole[chosen])
    assert np.array_equal(epochs, chosen // sum(sizes))
    assert np.array_equal(epochs, whole_epochs[chosen])


@given(shard_sizes, seeds, windows)
@settings(deadline=None, max_examples=50)
def test_a_window_reads_no_more_than_its_shards(sizes: list[int], seed: int, window: int) -> None:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[epoch_samples(SampleOrder(sizes, seed, window), 0)]
    start, seen = 0, set()
    while start < len(shard_of):
        shards = set(shard_of[start : start + 1])
        stop = start
        while stop < len(shard_of) and len(shards | {shard_of[stop]}) <= window:
            shards.add(shard_of[stop])
            stop += 1
        assert not shards & seen
        # The window ends where its shards end, whatever their sizes.
        assert stop - start == sum(sizes[shard] for shard in shards)
        seen |= shards
        start = stop


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's of the ranks; there are no ties."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def test_the_shuffle_is_good() -> None:
    full = SampleOrder([500] * 36 + [123], seed=1, window_shards=37)
    first, second = epoch_samples(full, 0), epoch_samples(full, 1)
    # For independent draws the correlation is normal with deviation 1/sqrt(n); 4 deviations, of a fixed seed.
    limit = 4 / np.sqrt(len(first))
    assert abs(rank_correlation(first[:-1], first[1:])) < limit
    assert abs(rank_correlation(first, np.arange(len(first)))) < limit
    assert abs(rank_correlation(first, second)) < limit
    # A permutation leaves one sample on average where it was (Poisson): 10 or more has a probability of 1e-7.
    assert np.sum(first == np.arange(len(first))) < 10
    assert np.sum(first == second) < 10


def test_the_shuffle_within_a_window_is_as_good_as_a_full_one() -> None:
    windowed = epoch_samples(SampleOrder([500] * 40, seed=1, window_shards=8), 0)
    for window in windowed.reshape(5, 4000):
        assert abs(rank_correlation(window[:-1], window[1:])) < 4 / np.sqrt(4000)
        assert abs(rank_correlation(window, np.arange(4000))) < 4 / np.sqrt(4000)
        # Of 8 equal shards, two neighbours share one in 499 of 3,999 cases, with a deviation of 0.005.
        assert np.mean(window[:-1] // 500 == window[1:] // 500) == pytest.approx(499 / 3999, abs=0.02)


def test_the_order_never_changes() -> None:
    """A resumed run must find the order that it left, also after an upgrade."""
    order = SampleOrder([256] * 7 + [5], seed=0, window_shards=4)
    assert order.samples(np.arange(8))[1].tolist() == [1668, 1294, 1784, 1241, 1093, 1661, 603, 752]
    assert order.samples(np.arange(1795, 1800))[1].tolist() == [116, 320, 1001, 699, 936]
    assert order.samples(np.array([10**12]))[1].tolist() == [1153]


@pytest.mark.parametrize(("sizes", "window"), [([], 1), ([3, 0], 1), ([3], 0)])
def test_impossible_orders_are_refused(sizes: list[int], window: int) -> None:
    with pytest.raises(DataError, match="at least"):
        SampleOrder(sizes, 0, window)


def test_upcoming_shards_are_those_of_this_window_and_the_next() -> None:
    order = SampleOrder([3, 5, 2, 4, 1, 6, 2], seed=3, window_shards=3)
    shard_of = np.repeat(np.arange(7), [3, 5, 2, 4, 1, 6, 2])
    read = shard_of[order.samples(np.arange(3 * 23))[1]]
    changes = [0]  # where each window begins: at its fourth shard, or with the epoch
    for position in range(1, 3 * 23):
        if position % 23 == 0 or len(set(read[changes[-1] : position + 1])) > 3:
            changes.append(position)
    for start, following, stop in zip(changes, changes[1:], changes[2:], strict=False):
        for position in range(start, following):
            assert set(order.upcoming_shards(position)) == set(read[start:stop])
            assert set(order.upcoming_shards(position)[: len(set(read[start:following]))]) == set(read[start:following])


# --- mixtures ---

mixtures = st.lists(
    st.tuples(st.lists(st.integers(30, 200), min_size=1, max_size=8), st.floats(0.05, 10)), min_size=1, max_size=4
)


def mixed(parts: list[tuple[list[int], float]], seed: int) -> tuple[MixedOrder, list[SampleOrder]]:
    orders = [SampleOrder(sizes, seed, 3) for sizes, _ in parts]
    return MixedOrder(orders, [weight for _, weight in parts], seed), orders


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 10_000))
def test_shares_add_up_and_are_within_one_of_the_weights(weights: list[float], total: int) -> None:
    shares = apportion(weights, total)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6  # rounding of the division


@given(mixtures, seeds, st.integers(0, 10**6))
@settings(max_examples=15)
def test_every_block_of_a_mixture_holds_its_exact_shares(
    parts: list[tuple[list[int], float]], seed: int, block: int
) -> None:
    order, orders = mixed(parts, seed)
    _, indices = order.samples(block * MIX_BLOCK + np.arange(MIX_BLOCK))
    sets = np.searchsorted(np.cumsum([own.num_samples for own in orders]), indices, side="right")
    assert np.bincount(sets, minlength=len(parts)).tolist() == apportion([weight for _, weight in parts], MIX_BLOCK)


@given(mixtures, seeds)
@settings(max_examples=15)
def test_each_data_set_of_a_mixture_goes_through_its_own_order(parts: list[tuple[list[int], float]], seed: int) -> None:
    order, orders = mixed(parts, seed)
    epochs, indices = order.samples(np.arange(3 * MIX_BLOCK))
    first = 0
    for own in orders:
        mine = (indices >= first) & (indices < first + own.num_samples)
        own_epochs, own_indices = own.samples(np.arange(mine.sum()))
        assert np.array_equal(indices[mine] - first, own_indices)
        assert np.array_equal(epochs[mine], own_epochs)
        first += own.num_samples
    assert order.num_samples == first


@given(mixtures, seeds, st.lists(st.integers(0, 3000), max_size=60))
@settings(max_examples=15)
def test_any_positions_of_a_mixture_give_what_the_whole_gives(
    parts: list[tuple[list[int], float]], seed: int, positions: list[int]
) -> None:
    whole = mixed(parts, seed)[0].samples(np.arange(3001))[1]
    chosen = np.array(positions, dtype=np.int64)
    assert np.array_equal(mixed(parts, seed)[0].samples(chosen)[1], whole[chosen])


def test_a_mixture_is_mixed_well() -> None:
    order, _ = mixed([([500] * 4, 1), ([500] * 4, 1), ([500] * 4, 2)], seed=2)
    _, indices = order.samples(np.arange(32 * MIX_BLOCK))
    sets = indices // 2000
    # Neighbours are of one data set as often as independent draws would be, 1/16 + 1/16 + 1/4, less one in 1,024.
    assert np.mean(sets[:-1] == sets[1:]) == pytest.approx(0.375, abs=4 * np.sqrt(0.375 * 0.625 / len(sets)))
    by_block = sets.reshape(32, MIX_BLOCK)
    assert len({block.tobytes() for block in by_block}) == 32
    assert abs(np.corrcoef(sets, np.tile(np.arange(MIX_BLOCK), 32))[0, 1]) < 4 / np.sqrt(len(sets))


def test_the_mixture_never_changes() -> None:
    order, _ = mixed([([256] * 7 + [5], 2.5), ([10, 20], 1)], seed=0)
    assert order.block_samples == [731, 293]
    assert order.samples(np.arange(10))[1].tolist() == [1668, 1294, 1784, 1661, 1824, 603, 752, 1477, 1816, 569]
    assert order.samples(np.array([10**12]))[1].tolist() == [1816]


@pytest.mark.parametrize(("weights", "count"), [([1.0], 2), ([1.0, 1e-4], 2)])
def test_impossible_mixtures_are_refused(weights: list[float], count: int) -> None:
    with pytest.raises(DataError, match=r"needs for each data set a weight of at least 1/1024"):
        MixedOrder([SampleOrder([3], 0, 1)] * count, weights, 0)


@pytest.mark.parametrize("position", [0, 1023, 1024, 40_000, 10**9])
def test_upcoming_shards_of_a_mixture_hold_what_the_next_positions_need(position: int) -> None:
    order, orders = mixed([([200] * 40, 1), ([300] * 50, 3)], seed=5)
    shard_of = np.concatenate([np.repeat(np.arange(40), 200), np.repeat(np.arange(40, 90), 300)])
    needed = shard_of[order.samples(position + np.arange(64))[1]]
    assert set(needed) <= set(order.upcoming_shards(position))
    assert len(order.upcoming_shards(position)) <= 2 * 3 * len(orders)
