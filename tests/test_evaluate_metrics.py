from itertools import combinations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eqm_dist.errors import DataError
from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance, half_split_fid
from eqm_dist.evaluate.train_classifier import digits


class Pixels(nn.Module):
    """Pixels as features: what comes out is known without any network."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def moments(mean: np.ndarray, covariance: np.ndarray, count: int = 100) -> FeatureMoments:
    """The moments of ``count`` features whose sample mean and covariance are exactly these."""
    outer = (count - 1) * covariance + count * np.outer(mean, mean)
    return FeatureMoments(torch.tensor(float(count)).double(), torch.tensor(count * mean), torch.tensor(outer))


def random_images(seed: int, count: int, side: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 1), dtype=torch.uint8, generator=generator)


def random_gaussian(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    factor = rng.normal(size=(size, size))
    return rng.normal(size=size), factor @ factor.T + 0.1 * np.eye(size)


def test_independent_normal_features_have_the_elementary_distance():
    mean_1, mean_2 = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.5])
    deviation_1, deviation_2 = np.array([1.0, 2.0, 3.0]), np.array([1.5, 0.5, 3.0])
    expected = ((mean_1 - mean_2) ** 2 + (deviation_1 - deviation_2) ** 2).sum()
    distance = frechet_distance(moments(mean_1, np.diag(deviation_1**2)), moments(mean_2, np.diag(deviation_2**2)))
    assert distance == pytest.approx(expected, rel=1e-12)  # float64 throughout: float32 would show at 1e-7


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_distance_equals_the_formula_with_scipys_matrix_root(seed, size):
    rng = np.random.default_rng(seed)
    (mean_1, cov_1), (mean_2, cov_2) = random_gaussian(rng, size), random_gaussian(rng, size)
    root = np.real(scipy.linalg.sqrtm(cov_1 @ cov_2))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    scale = np.trace(cov_1 + cov_2)  # the terms cancel, so errors are relative to them, not to the difference
    assert frechet_distance(moments(mean_1, cov_1), moments(mean_2, cov_2)) == pytest.approx(
        expected, rel=1e-6, abs=1e-9 * scale
    )


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_distance_is_symmetric_zero_on_itself_and_blind_to_rotation(seed):
    rng = np.random.default_rng(seed)
    (mean_1, cov_1), (mean_2, cov_2) = random_gaussian(rng, 5), random_gaussian(rng, 5)
    first, second = moments(mean_1, cov_1), moments(mean_2, cov_2)
    distance, scale = frechet_distance(first, second), np.trace(cov_1 + cov_2)
    assert frechet_distance(second, first) == pytest.approx(distance, abs=1e-9 * scale)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9 * scale)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    turned = [moments(turn @ mean, turn @ cov @ turn.T) for mean, cov in ((mean_1, cov_1), (mean_2, cov_2))]
    assert frechet_distance(*turned) == pytest.approx(distance, abs=1e-9 * scale)


def test_moments_are_those_of_the_features():
    images = random_images(0, 50)
    found = feature_moments(Pixels(4), images.split(16))
    features = images.flatten(1).numpy().astype(np.float64)
    assert found.count == 50
    np.testing.assert_array_equal(found.total, features.sum(0))  # sums of integers are exact
    np.testing.assert_array_equal(found.outer, features.T @ features)
    assert {found.count.dtype, found.total.dtype, found.outer.dtype} == {torch.float64}


@given(cuts=st.lists(st.integers(0, 60), min_size=2, max_size=2), batch=st.integers(1, 60))
@settings(max_examples=15, deadline=None)
def test_three_workers_together_equal_one_pass(cuts, batch):
    images, reference = random_images(1, 60), feature_moments(Pixels(4), [random_images(2, 40)])
    whole = feature_moments(Pixels(4), [images])
    low, high = sorted(cuts)  # parts may be empty: a worker without images
    workers = [feature_moments(Pixels(4), part.split(batch)) for part in images.tensor_split([low, high])]

    sent: list[Tensor] = []
    for worker in workers:
        worker.merged(lambda tensor: sent.append(tensor) or tensor)
    merged = [worker.merged(lambda _: torch.stack(sent).sum(0)) for worker in workers]

    for moments_of_all in (*merged, workers[0] + workers[1] + workers[2]):
        assert frechet_distance(reference, moments_of_all) == frechet_distance(reference, whole)  # integer sums


def test_merging_real_features_agrees_to_rounding():
    classifier, (images, _) = load_digit_classifier(), digits()
    reference = feature_moments(classifier, images[:600].split(256))
    whole = feature_moments(classifier, [images[600:1200]])
    first, second, third = (feature_moments(classifier, [part]) for part in images[600:1200].tensor_split(3))
    # Features are float32, and their last bit may depend on the size of the batch.
    assert frechet_distance(reference, first + second + third) == pytest.approx(
        frechet_distance(reference, whole), rel=1e-5
    )


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_are_refused(count):
    many = feature_moments(Pixels(4), [random_images(0, 10)])
    few = feature_moments(Pixels(4), [random_images(0, count)])
    with pytest.raises(DataError, match=f"at least two images on either side, and the generated images are {count}"):
        frechet_distance(many, few)


def test_half_split_uses_halves_and_all_of_them():
    images = torch.tensor([0, 10, 30, 100], dtype=torch.uint8).view(4, 1, 1, 1)
    values = {0.0, 10.0, 30.0, 100.0}
    expected = set()
    for half in combinations(values, 2):
        rest = tuple(values - set(half))
        means = np.mean(half) - np.mean(rest)
        deviations = np.std(half, ddof=1) - np.std(rest, ddof=1)
        expected.add(round(means**2 + deviations**2, 6))
    assert len(expected) == 3
    found = {round(half_split_fid(Pixels(1)(images), seed, splits=1), 6) for seed in range(40)}
    assert found == expected
    singles = half_split_fid(Pixels(1)(images), seed=5, splits=1), half_split_fid(Pixels(1)(images), seed=5, splits=8)
    assert min(expected) <= singles[1] <= max(expected)
    assert half_split_fid(Pixels(1)(images), seed=5, splits=8) == singles[1]


def test_half_split_of_too_few_images_is_refused():
    with pytest.raises(DataError, match="at least two images"):
        half_split_fid(Pixels(4)(random_images(0, 3)), seed=0)


def test_fid_of_the_digits_grows_with_the_damage():
    classifier, (images, labels) = load_digit_classifier(), digits()
    reference = feature_moments(classifier, images.split(512))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))

    def fid(damaged: Tensor) -> float:
        return frechet_distance(reference, feature_moments(classifier, damaged.split(512)))

    noisy = [fid((images + level * noise).round().clamp(0, 255).to(torch.uint8)) for level in (8, 16, 32, 64)]
    assert noisy == sorted(noisy)
    assert noisy[0] > 0
    yardstick = half_split_fid(classifier(images), seed=0)
    assert noisy[0] < yardstick < noisy[-1]  # the yardstick lies in the range that matters
    assert fid(images[labels != 0]) > yardstick  # a class that is missing
