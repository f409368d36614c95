from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.core.decay import ConstantDecay, LinearDecay, PiecewiseDecay, TruncatedDecay, divergence_bound
from eqm_dist.errors import ConfigError

STARTS = st.floats(0.01, 0.99)
VALUES = st.floats(0, 20)
SCALES = st.floats(0.01, 100)
GAMMAS = torch.linspace(0, 1, 101, dtype=torch.float64)

# Rounding in float64: a handful of operations on numbers of the size of the scale, divided by 1 - decay_start >= 0.01.
ROUNDING = 1e-12


@given(STARTS, VALUES, SCALES)
def test_the_field_vanishes_at_data(start: float, value: float, scale: float) -> None:
    one = torch.ones(1, dtype=torch.float64)
    for decay in (LinearDecay(scale), TruncatedDecay(start, scale), PiecewiseDecay(start, value, scale)):
        assert decay(one).item() == 0


@given(STARTS, VALUES, SCALES)
def test_piecewise_decay_starts_at_its_value_and_is_continuous(start: float, value: float, scale: float) -> None:
    decay = PiecewiseDecay(start, value, scale)
    step = 1e-9
    before, at, after = (decay(torch.tensor([start + d], dtype=torch.float64)).item() for d in (-step, 0, step))
    steepest = scale * max(abs(value - 1) / start, 1 / (1 - start))
    assert decay(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(scale * value, rel=1e-14)
    assert at == pytest.approx(scale, rel=1e-13 * max(1, value))
    assert before == pytest.approx(at, abs=2 * step * steepest + ROUNDING * scale * max(1, value))
    assert after == pytest.approx(at, abs=2 * step * steepest + ROUNDING * scale * max(1, value))


@given(STARTS, SCALES)
def test_families_contain_one_another(start: float, scale: float) -> None:
    def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
        torch.testing.assert_close(one, other, rtol=ROUNDING, atol=ROUNDING * scale)

    assert_same(PiecewiseDecay(start, 1.0, scale)(GAMMAS), TruncatedDecay(start, scale)(GAMMAS))
    assert_same(TruncatedDecay(0.0, scale)(GAMMAS), LinearDecay(scale)(GAMMAS))


@given(STARTS, VALUES, SCALES)
def test_the_official_minimum_is_the_definition_by_cases_up_to_a_value(
    start: float, value: float, scale: float
) -> None:
    minimum = scale * torch.minimum(value - (value - 1) / start * GAMMAS, (1 - GAMMAS) / (1 - start))
    by_cases = PiecewiseDecay(start, value, scale)(GAMMAS)
    same = torch.allclose(minimum, by_cases, rtol=ROUNDING, atol=ROUNDING * scale * max(1, value))
    threshold = 1 / (1 - start)
    if value < threshold * (1 - 1e-6):
        assert same
    elif value > threshold * (1 + 1e-6):
        assert not same  # they differ most at gamma = 0, which is on the grid


def test_constant_decay_is_its_scale_everywhere() -> None:
    assert torch.equal(ConstantDecay()(GAMMAS), torch.ones_like(GAMMAS))
    assert torch.equal(ConstantDecay(4.0)(GAMMAS), torch.full_like(GAMMAS, 4.0))


@given(STARTS, VALUES, SCALES)
def test_descent_converges_just_below_the_bound_and_diverges_just_above(
    start: float, value: float, scale: float
) -> None:
    # Near one datum at 0 every x is (1 - gamma) * noise, so the field of that datum is -x * c(gamma) / (1 - gamma).
    for decay in (LinearDecay(scale), TruncatedDecay(start, scale), PiecewiseDecay(start, value, scale)):
        gamma = torch.tensor([1 - 1e-3 * (1 - start)], dtype=torch.float64)
        rate = (decay(gamma) / (1 - gamma)).item()
        bound = divergence_bound(decay)
        assert bound is not None
        assert abs(1 - 0.999 * bound * rate) < 1 < abs(1 - 1.001 * bound * rate)


def test_divergence_bound_of_the_published_choice_and_of_the_baseline() -> None:
    assert divergence_bound(TruncatedDecay()) == pytest.approx(0.1, rel=1e-15)
    assert divergence_bound(ConstantDecay()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decays_keep_the_type(dtype: torch.dtype) -> None:
    gamma = torch.rand(5).to(dtype)
    for decay in (ConstantDecay(), LinearDecay(1.0), TruncatedDecay(), PiecewiseDecay(0.5, 2.0, 1.0)):
        assert decay(gamma).dtype == dtype


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: ConstantDecay(0.0), "gradient_scale"),
        (lambda: LinearDecay(-1.0), "gradient_scale"),
        (lambda: LinearDecay(float("inf")), "gradient_scale"),
        (lambda: TruncatedDecay(decay_start=1.0), "decay_start"),
        (lambda: TruncatedDecay(decay_start=-0.1), "decay_start"),
        (lambda: TruncatedDecay(gradient_scale=float("nan")), "gradient_scale"),
        (lambda: PiecewiseDecay(0.0, 1.0, 1.0), "decay_start"),
        (lambda: PiecewiseDecay(1.0, 1.0, 1.0), "decay_start"),
        (lambda: PiecewiseDecay(0.5, -0.1, 1.0), "decay_value"),
        (lambda: PiecewiseDecay(0.5, float("inf"), 1.0), "decay_value"),
        (lambda: PiecewiseDecay(0.5, 1.0, 0.0), "gradient_scale"),
    ],
)
def test_parameters_out_of_range_are_refused(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make()
