from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.core.samplers import Field, GradientDescent, NesterovGradientDescent, Sampler
from eqm_dist.core.sampling import sample
from eqm_dist.errors import ConfigError

START = torch.tensor([[1.0, -2.0], [0.5, 4.0], [0.0, -1.0]], dtype=torch.float64)


def quadratic(curvature: float) -> Field:
    """The field of the energy curvature * ||x||^2 / 2."""
    return lambda x: -curvature * x


@given(step_size=st.floats(0.01, 1.0), curvature=st.floats(0.1, 1.9), evaluations=st.integers(1, 30))
def test_gradient_descent_on_a_quadratic(step_size: float, curvature: float, evaluations: int) -> None:
    result = sample(quadratic(curvature), START, GradientDescent(step_size), evaluations)
    expected = (1 - step_size * curvature) ** evaluations * START
    torch.testing.assert_close(result.samples, expected, rtol=1e-11, atol=1e-13)
    assert result.nfe.tolist() == [evaluations] * len(START)
    assert result.nfe.dtype == torch.int64


@given(
    step_size=st.floats(0.01, 1.0), momentum=st.floats(0, 0.9), curvature=st.floats(0.1, 1.0), steps=st.integers(1, 30)
)
def test_nesterov_on_a_quadratic_is_a_linear_recurrence(
    step_size: float, momentum: float, curvature: float, steps: int
) -> None:
    # Equation 9 with field -k x: x_{k+1} = (1 - eta k (1 + mu)) x_k + eta k mu x_{k-1}, a power of a 2 x 2 matrix.
    shrink = step_size * curvature
    companion = np.array([[1 - shrink * (1 + momentum), shrink * momentum], [1, 0]])
    factor = np.linalg.matrix_power(companion, steps) @ np.ones(2)  # x_{-1} = x_0: the first step has no momentum
    result = sample(quadratic(curvature), START, NesterovGradientDescent(step_size, momentum), steps)
    torch.testing.assert_close(result.samples, factor[0] * START, rtol=1e-10, atol=1e-12)


def test_nesterov_without_momentum_is_gradient_descent() -> None:
    plain = sample(torch.cos, START, GradientDescent(0.1), 7)
    assert torch.equal(sample(torch.cos, START, NesterovGradientDescent(0.1, 0.0), 7).samples, plain.samples)


@pytest.mark.parametrize("sampler", [GradientDescent(0.1), NesterovGradientDescent(0.1, 0.3)])
def test_evaluations_are_counted_where_they_happen(sampler: Sampler[Any]) -> None:
    sizes = []

    def field(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return -x

    result = sample(field, START, sampler, 5)
    assert sizes == [3] * 5
    assert result.nfe.tolist() == [5, 5, 5]


def test_sampling_records_no_graph_and_leaves_the_start_alone() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    start = START.clone()
    result = sample(lambda x: -weight * x, start, NesterovGradientDescent(0.1, 0.3), 3)
    assert not result.samples.requires_grad
    assert torch.equal(start, START)


def test_each_sample_goes_its_own_way() -> None:
    whole = sample(torch.cos, START, NesterovGradientDescent(0.1, 0.3), 9).samples
    alone = [sample(torch.cos, row[None], NesterovGradientDescent(0.1, 0.3), 9).samples for row in START]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GradientDescent(0.0), "step_size"),
        (lambda: GradientDescent(float("inf")), "step_size"),
        (lambda: NesterovGradientDescent(-0.1, 0.3), "step_size"),
        (lambda: NesterovGradientDescent(0.1, 1.0), "momentum"),
        (lambda: NesterovGradientDescent(0.1, -0.1), "momentum"),
        (lambda: sample(torch.cos, START, GradientDescent(0.1), 0), "evaluations"),
    ],
)
def test_parameters_out_of_range_are_refused(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make()
