"""The arithmetic of the sampler study: what it plots is what the samplers of the package do."""

import torch
from torch import Tensor

from benchmarks.study_samplers import SHAPE, spread, stopped, trajectory
from eqm_dist import rng
from eqm_dist.core.samplers import GradientDescent, NesterovGradientDescent
from eqm_dist.core.sampling import GradientNormStop, SamplingMethod, sample


def pull(x: Tensor, labels: Tensor, time: Tensor) -> Tensor:
    return (labels.view(-1, 1, 1, 1) / 10 - x) * (1 + labels.view(-1, 1, 1, 1) % 3)


def test_one_trajectory_holds_the_samples_of_every_schedule() -> None:
    labels = torch.arange(300) % 10  # more than one batch
    start = rng.normal(5, rng.Stream.START_NOISE, torch.arange(300), SHAPE)
    sampler = NesterovGradientDescent(0.1, 0.3)
    points, _ = zip(*trajectory(pull, sampler, 20, seed=5, samples=300), strict=True)
    for count in (1, 7, 20):
        expected = sample(lambda x: pull(x, labels, x), start, SamplingMethod(sampler, count))
        assert torch.equal(points[count - 1], expected.samples)


def test_one_trajectory_holds_the_samples_of_every_stopping_limit() -> None:
    labels = torch.arange(30) % 10
    start = rng.normal(5, rng.Stream.START_NOISE, torch.arange(30), SHAPE)
    points, norms = zip(*trajectory(pull, GradientDescent(0.1), 20, seed=5, samples=30), strict=True)
    nfe = stopped(torch.stack(norms) < 0.5)
    expected = sample(
        lambda x: pull(x, labels, x), start, SamplingMethod(GradientDescent(0.1), 20, GradientNormStop(norm=0.5))
    )
    assert nfe.unique().numel() > 2
    assert torch.equal(nfe, expected.nfe)
    assert torch.equal(torch.stack(points)[nfe - 1, torch.arange(30)], expected.samples)


def test_a_setting_becomes_its_mean_and_its_extremes() -> None:
    rows = [{"nfe": 10, "fid": 2.0}, {"nfe": 4, "fid": 7.0}, {"nfe": 10, "fid": 3.0}]
    assert spread(rows) == [(4, 7.0, 7.0, 7.0), (10, 2.5, 2.0, 3.0)]
    limits = [{"limit": 0.4, "nfe": 30, "fid": 1.0}, {"limit": 0.4, "nfe": 32, "fid": 2.0}]
    assert spread(limits) == [(31, 1.5, 1.0, 2.0)]
