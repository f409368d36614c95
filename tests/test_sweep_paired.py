"""What several seeds say of points: intervals, ties, who is taken, how many seeds would tell, and how it is shown."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.sweeps.comparison import COLUMNS, Seeded, cells, compare, csv_cells, figures, others
from eqm_dist.sweeps.paired import Difference, difference, mean_and_spread, t_quantile, taken, within
from eqm_dist.sweeps.pictures import points_over_seeds

ETA, NFE = "sampler.step_size", "sampler.nfe"
FORTY = {0: 1.297, 1: 1.405, 2: 1.235}
TWENTY = {0: 1.300, 1: 1.399, 2: 1.209}
"""The FIDs of a sweep that took 40 evaluations for the first of these alone."""


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423), (999, 1.9623)]
)
def test_students_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-5)


def test_students_t_of_one_and_two_degrees_has_a_closed_form() -> None:
    for t in (0.1, 1.0, 5.0):
        assert within(t, 1) == pytest.approx(2 * math.atan(t) / math.pi)
        assert within(t, 2) == pytest.approx(t / math.sqrt(2 + t * t))


def test_an_interval_is_that_of_the_paired_differences() -> None:
    found = difference({0: 5.0, 1: 9.0, 2: 2.0}, {0: 4.0, 1: 7.0, 2: -1.0})  # 1, 2, 3
    assert found == Difference(3, 2.0, 1.0)
    low, high = Difference(3, 2.0, 1.0).interval
    assert (low, high) == pytest.approx((2 - 4.30265 / math.sqrt(3), 2 + 4.30265 / math.sqrt(3)), abs=1e-4)
    assert not Difference(3, 2.48, 1.0).told  # 2.484 is half the width
    assert Difference(3, 2.49, 1.0).told


def test_a_tie_is_not_told_apart_and_within_a_standard_error() -> None:
    assert Difference(3, 0.57, 1.0).tied  # 1 / sqrt(3) is 0.577
    assert not Difference(3, 0.58, 1.0).tied
    assert Difference(3, 0.0, 0.0).tied
    # The digits' families of c(gamma): every seed says worse, by much, and three seeds cannot be sure of it.
    constant, truncated = {0: 1.671, 1: 1.908, 2: 1.366}, {0: 1.238, 1: 1.489, 2: 1.258}
    assert taken([constant, truncated], [(14.0,), (20.0,)]) == 1
    standings = compare([Seeded({NFE: 14}, constant, (14.0,)), Seeded({NFE: 20}, truncated, (20.0,))])
    assert [one.verdict for one in standings] == ["lowest", "unclear"]
    assert others(standings, [NFE]) == {
        "unclear": "nfe 14 (FID 1.648 +- 0.272 over 3 seeds, about 4 would tell the two apart)"
    }


def test_the_interval_holds_the_truth_in_95_of_100_cases() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        noise = draw.normal(size=5)  # what both points share
        point = {seed: 1.3 + noise[seed] + 0.1 * draw.normal() for seed in range(5)}
        other = {seed: 1.1 + noise[seed] + 0.1 * draw.normal() for seed in range(5)}
        found = difference(point, other)
        assert found is not None
        held += found.interval[0] <= 0.2 <= found.interval[1]
    assert held / 2000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_only_common_seeds_make_a_pair_and_one_is_not_enough() -> None:
    assert difference({0: 1.0, 1: 2.0, 7: 9.0}, {0: 1.0, 1: 1.0, 8: 0.0}) == Difference(2, 0.5, math.sqrt(0.5))
    assert difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 3.0}) is None


def test_one_seed_has_no_spread() -> None:
    assert mean_and_spread({3: 1.5}) == (1.5, None)
    assert Seeded({}, {3: 1.5}, ()).said == "1.500 with one seed"


@given(st.floats(0.02, 2), st.floats(0.001, 2))
def test_the_seeds_to_tell_are_the_fewest_whose_interval_leaves_out_zero(mean: float, spread: float) -> None:
    seeds = Difference(5, mean, spread).seeds_to_tell
    fewest = next((n for n in range(2, 1001) if Difference(n, mean, spread).told), None)
    assert seeds == fewest


def test_what_is_equal_or_nearly_so_needs_more_seeds_than_anybody_has() -> None:
    assert Difference(3, 0.0, 0.0).seeds_to_tell is None
    assert Difference(3, 1e-6, 1.0).seeds_to_tell is None
    assert Difference(2, 0.5, 0.0).seeds_to_tell == 2


def test_of_a_tie_the_cheaper_is_taken_and_a_worse_one_never() -> None:
    dear = {seed: fid - 0.015 for seed, fid in FORTY.items()}  # now it has the lower mean, by less than the noise
    assert statistics.fmean(dear.values()) < statistics.fmean(TWENTY.values())
    cheap_and_bad = {seed: fid + 0.5 for seed, fid in FORTY.items()}
    assert taken([FORTY, TWENTY], [(40.0,), (20.0,)]) == 1
    assert taken([dear, TWENTY, cheap_and_bad], [(40.0,), (20.0,), (5.0,)]) == 1
    assert taken([dear, TWENTY], [(20.0, 1.0), (20.0, 2.0)]) == 0
    assert taken([{0: 1.0}, {0: 0.9}], [(1.0,), (2.0,)]) == 1  # one seed calls nothing a tie


def test_a_comparison_names_the_tie_and_the_seeds_that_would_end_it() -> None:
    dear = {seed: fid - 0.015 for seed, fid in FORTY.items()}
    worse = {seed: fid + 0.3 + 0.01 * seed for seed, fid in FORTY.items()}
    points = [
        Seeded({ETA: 0.01, NFE: 40}, dear, (40.0,)),
        Seeded({ETA: 0.04, NFE: 20}, worse, (20.0,)),
        Seeded({ETA: 0.02, NFE: 20}, TWENTY, (20.0,)),
    ]
    order = compare(points)
    assert [one.point.overrides[ETA] for one in order] == [0.02, 0.01, 0.04]
    assert [one.verdict for one in order] == ["tied", "lowest", "worse"]
    pair = difference(TWENTY, dear)
    assert pair is not None
    low, high = pair.interval
    row = dict(zip(COLUMNS, cells(order[0]), strict=True))
    assert row == {
        "FID": "1.303",
        "+-": "0.095",
        "seeds": "3",
        "above lowest": f"{pair.mean:+.3f}",
        "95 % interval": f"{low:+.3f} to {high:+.3f}",
        "verdict": "tied",
        "seeds to tell": str(pair.seeds_to_tell),
    }
    assert cells(order[1])[3:] == ["-", "-", "lowest", "-"]
    assert others(order, [ETA, NFE]) == {
        "tied with": f"step_size 0.01, nfe 40 (FID 1.297 +- 0.086 over 3 seeds, about {pair.seeds_to_tell} would"
        " tell the two apart)"
    }
    assert csv_cells(order[0])[3:] == [pair.mean, low, high, "tied", pair.seeds_to_tell]
    assert figures(order[0].point) == pytest.approx(
        {"eval/fid": 1.302667, "eval/fid_seeds": 3, "eval/fid_std": 0.095028}
    )


def test_one_seed_gives_no_verdict_and_no_interval() -> None:
    order = compare([Seeded({NFE: 9}, {0: 2.0}, (9.0,)), Seeded({NFE: 5}, {0: 2.1}, (5.0,))])
    assert [cells(one) for one in order] == [
        ["2.000", "-", "1", "-", "-", "-", "-"],
        ["2.100", "-", "1", "-", "-", "-", "-"],
    ]
    assert others(order, [NFE]) == {}
    assert "eval/fid_std" not in figures(order[0].point)


def test_the_picture_has_an_interval_where_several_seeds_say_one() -> None:
    several = compare([Seeded({NFE: 40}, FORTY, (40.0,)), Seeded({NFE: 20}, TWENTY, (20.0,))])
    fids, above = points_over_seeds(several, [NFE]).axes
    assert "95 % interval" in above.get_xlabel()
    assert [text.get_text() for text in fids.get_yticklabels()] == ["nfe 20", "nfe 40"]
    [alone] = points_over_seeds(compare([Seeded({NFE: 40}, {0: 1.3}, ())]), [NFE]).axes
    assert alone.get_xlabel() == "FID of one seed"
