"""Statistics of image sets: the same from any division of the set, and figures that are known in closed form."""

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate import statistics
from eqm_dist.evaluate.metrics import FeatureMoments, inception_score, kernel_distance, precision_recall
from eqm_dist.evaluate.statistics import (
    PARTS,
    ImageStatistics,
    MetricSettings,
    Rows,
    compute,
    extract,
    image_statistics,
    parts_of,
)


class Levels(nn.Module):
    """Known outputs without any network: pixels, their squares and their halves."""

    id = "levels"
    num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()

    def spatial(self, images: Tensor) -> Tensor:
        return self(images).square()

    def logits(self, images: Tensor) -> Tensor:
        return self(images) / 2


def random_images(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 2, 2, 1), dtype=torch.uint8, generator=generator)


def tensors_of(found: ImageStatistics) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": tensor for name, part in sorted(found.parts.items()) for field, tensor in vars(part).items()
    }


def assert_same(first: ImageStatistics, second: ImageStatistics) -> None:
    assert (first.extractor, first.count) == (second.extractor, second.count)
    ours, others = tensors_of(first), tensors_of(second)
    assert ours.keys() == others.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, others[name]), name  # all values are integers or halves: float64 sums are exact


@given(data=st.data(), most=st.sampled_from([7, 1000]))
@settings(max_examples=30)
def test_any_division_and_any_order_of_additions_give_the_same(data: st.DataObject, most: int) -> None:
    images = random_images(0, 40)
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=5)))
    bounds = list(pairwise([0, *cuts, 40]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "MOST_ROWS", most)
        whole = image_statistics(Levels(), [images], parts=PARTS)
        pieces = [
            image_statistics(Levels(), images[start:stop].split(3), parts=PARTS, first=start)
            for start, stop in data.draw(st.permutations(bounds))
        ]
        while len(pieces) > 1:  # any grouping
            place = data.draw(st.integers(0, len(pieces) - 2))
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    assert_same(pickle.loads(pickle.dumps(pieces[0])), whole)


def test_statistics_are_those_of_the_outputs() -> None:
    images = random_images(1, 9)
    found = image_statistics(Levels(), images.split(4), parts=PARTS, first=5)
    pixels = images.flatten(1).numpy().astype(np.float64)
    assert found.count == 9
    for name, values in (("features.moments", pixels), ("spatial.moments", pixels**2)):
        moments: Any = found.parts[name]
        assert int(moments.count) == 9
        np.testing.assert_array_equal(moments.total, values.sum(0))
        np.testing.assert_array_equal(moments.outer, values.T @ values)
    for name, values in (("features.rows", pixels), ("logits.rows", pixels / 2)):
        rows: Any = found.parts[name]
        np.testing.assert_array_equal(rows.indices, range(5, 14))
        np.testing.assert_array_equal(rows.values, values)


def test_the_rows_that_are_kept_are_an_even_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "MOST_ROWS", 1000)
    everything = Rows(torch.arange(4000), torch.arange(4000).double()[:, None])
    kept = Rows(everything.indices[:0], everything.values[:0]) + everything
    assert len(kept.indices) == 1000
    assert torch.equal(kept.indices.double()[:, None], kept.values)
    assert torch.equal(kept.indices, kept.indices.sort().values)
    # Each quarter of the set holds 250 of the kept rows, give or take 4 standard deviations of 13.
    assert torch.histc(kept.indices.double(), 4, 0, 4000).sub(250).abs().max() < 52


def test_metrics_name_what_they_need() -> None:
    assert parts_of(["fid", "kid"]) == {"features.moments", "features.rows"}
    assert parts_of(["sfid", "is", "recall"]) == {"spatial.moments", "logits.rows", "features.rows"}
    with pytest.raises(ConfigError, match="one of fid, sfid, kid, is, precision, recall, received 'fit'"):
        parts_of(["fit"])


def test_an_extractor_without_an_output_is_refused() -> None:
    class Plain(nn.Module):
        num_features = 4

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).float()

    for output, metrics in (("spatial", "sfid"), ("logits", "is")):
        with pytest.raises(ConfigError, match=f"The metrics {metrics} need {output}.*Plain has none"):
            extract(Plain(), random_images(0, 3), {output})
    assert extract(Plain(), random_images(0, 3), {"features"})["features"].shape == (3, 4)


def test_an_extractor_that_breaks_its_promise_is_refused() -> None:
    class Wrong(Levels):
        num_features = 5

    with pytest.raises(DataError, match=r"features of shape \[3, 5\] for 3 images, and levels gave \[3, 4\]"):
        extract(Wrong(), random_images(0, 3), {"features"})


def test_an_extractor_may_give_all_its_outputs_in_one_pass() -> None:
    class Together(Levels):
        passes = 0

        def outputs(self, images: Tensor, wanted: set[str]) -> dict[str, Tensor]:
            self.passes += 1
            return {"features": self(images), "spatial": self.spatial(images), "logits": self.logits(images)}

    extractor = Together()
    found = image_statistics(extractor, [random_images(0, 6)], parts=PARTS)
    assert extractor.passes == 1
    assert_same(found, image_statistics(Levels(), [random_images(0, 6)], parts=PARTS))


def test_statistics_of_two_extractors_are_not_compared() -> None:
    class Other(Levels):
        id = "other"

    first, second = (
        image_statistics(extractor, [random_images(0, 6)], parts=parts_of(["fid"])) for extractor in (Levels(), Other())
    )
    with pytest.raises(DataError, match="reference is of other and the images of levels"):
        compute(["fid"], first, second)


def test_a_metric_needs_its_part_on_both_sides() -> None:
    full = image_statistics(Levels(), [random_images(0, 6)], parts=PARTS)
    moments = image_statistics(Levels(), [random_images(0, 6)], parts=parts_of(["fid"]))
    with pytest.raises(DataError, match=r"needs features\.rows of the reference, and it holds features\.moments"):
        compute(["recall"], full, moments)
    with pytest.raises(DataError, match=r"fid needs features\.moments of the reference, and there is none"):
        compute(["fid"], full, None)
    assert compute(["is"], full, None, MetricSettings(is_splits=2)).keys() == {"is", "is_std"}


def test_sfid_is_the_frechet_distance_of_the_spatial_features() -> None:
    class Spatial(Levels):
        def forward(self, images: Tensor) -> Tensor:
            return self.spatial_features(images)

        def spatial_features(self, images: Tensor) -> Tensor:
            return images.flatten(1).double().square()

    def distance(metric: str, extractor: nn.Module) -> float:
        first, second = (
            image_statistics(extractor, [random_images(seed, 50)], parts=parts_of([metric])) for seed in (2, 3)
        )
        return compute([metric], first, second)[metric]

    assert distance("sfid", Levels()) == distance("fid", Spatial()) > 0


def test_moments_of_a_gaussian_give_its_frechet_distance() -> None:
    rng = np.random.default_rng(0)
    mean, scale = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    first = FeatureMoments.of_gaussian(torch.zeros(5), torch.eye(5))
    second = FeatureMoments.of_gaussian(torch.from_numpy(mean), torch.diag(torch.from_numpy(scale**2)), count=900)
    given_first, given_second = (
        ImageStatistics("given", None, {"features.moments": moments}) for moments in (first, second)
    )
    # Commuting covariances: |m|^2 + sum (s - 1)^2. Float64, so 1e-12 is what sums of a few terms leave.
    assert compute(["fid"], given_first, given_second)["fid"] == pytest.approx(
        (mean**2).sum() + ((scale - 1) ** 2).sum(), rel=1e-12
    )


def test_kid_of_all_pairs_follows_the_definition() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + 1
    kernel = lambda x, y: (x @ y / 3 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(6)]
    within = [np.mean([kernel(side[i], side[j]) for i, j in pairs if i != j]) for side in (first, second)]
    expected = sum(within) - 2 * np.mean([kernel(first[i], second[j]) for i, j in pairs])
    mean, deviation = kernel_distance(torch.from_numpy(first), torch.from_numpy(second), subsets=3, subset_size=6)
    assert mean == pytest.approx(expected, rel=1e-12)  # a subset of everything is everything
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_of_two_halves_of_one_gaussian_is_zero_on_average() -> None:
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 4)))
    mean, deviation = kernel_distance(features[:2000], features[2000:], subsets=50, subset_size=200)
    assert abs(mean) < deviation  # of one subset; the mean of all is far less uncertain
    shifted, _ = kernel_distance(features[:2000], features[2000:] + 0.5, subsets=50, subset_size=200)
    assert shifted > 10 * abs(mean)


def test_kid_refuses_a_set_smaller_than_its_subsets() -> None:
    with pytest.raises(DataError, match="subsets of 1000 images, and a side has 20"):
        kernel_distance(torch.zeros(20, 2), torch.zeros(2000, 2))


def test_inception_score_of_certain_classes_is_their_number() -> None:
    certain = 1000 * torch.eye(4).repeat(25, 1)
    assert inception_score(certain, splits=1) == pytest.approx((4, 0))
    assert inception_score(torch.zeros(100, 4), splits=5) == pytest.approx((1, 0))
    with pytest.raises(DataError, match="at least 10 images, got 9"):
        inception_score(torch.zeros(9, 4))


def test_inception_score_of_a_mixture_follows_the_definition() -> None:
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    score, _ = inception_score(torch.from_numpy(np.log(p) + 5), splits=1)  # logits are free up to a constant
    assert score == pytest.approx(expected, rel=1e-12)


def test_precision_and_recall_on_a_line() -> None:
    reference = torch.tensor([0.0, 1.0, 2.0, 10.0]).double()[:, None]  # radii to the nearest: 1, 1, 1, 8
    generated = torch.tensor([-1.5, 0.5, 2.5, 3.5, 19.0]).double()[:, None]  # radii: 2, 2, 1, 1, 15.5
    precision, recall = precision_recall(generated, reference, neighbours=1)
    assert precision == 3 / 5  # 0.5 and 2.5 are near 0 to 2; 3.5 is within 8 of 10; -1.5 and 19 are outside
    assert recall == 1  # 0, 1, 2 lie within 2 of -1.5 and 0.5; 10 within 15.5 of 19
    with pytest.raises(DataError, match="at least 4 images on either side, got 3"):
        precision_recall(torch.zeros(3, 1), torch.zeros(9, 1))


def test_blocks_of_distances_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sides = torch.from_numpy(rng.normal(size=(50, 3)) + 1), torch.from_numpy(rng.normal(size=(60, 3)))
    whole = precision_recall(*sides)
    monkeypatch.setattr("eqm_dist.evaluate.metrics.POINTS_AT_ONCE", 7)
    monkeypatch.setattr("eqm_dist.evaluate.metrics.OTHERS_AT_ONCE", 11)
    assert precision_recall(*sides) == whole
    assert 0 < min(whole) < max(whole) < 1
