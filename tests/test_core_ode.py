"""Integrators against closed forms, scipy's tableau and torchdiffeq."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import RK45
from torch import Tensor

from eqm_dist.core import ode
from eqm_dist.core.corruption import corrupt
from eqm_dist.core.ode import Dopri5, Euler, Heun
from eqm_dist.core.samplers import GradientDescent, Sampler
from eqm_dist.core.sampling import SampleResult, SamplingMethod, in_order, sample, sample_queue
from eqm_dist.errors import ConfigError

START = torch.tensor([[1.0, -2.0], [0.5, 4.0], [0.3, -1.0]], dtype=torch.float64)


def swing(x: Tensor, time: Tensor) -> Tensor:
    """dx/dt = 3 cos(3 t) x, whose solution is x(0) exp(sin(3 t))."""
    return 3 * torch.cos(3 * time)[:, None] * x


def integrate(sampler: Sampler, nfe: int, field=swing, start: Tensor = START, **options) -> SampleResult:
    rows = torch.arange(len(start))
    parts = sample_queue(
        lambda x, rows, time: field(x, time),
        start.__getitem__,
        rows,
        SamplingMethod(sampler, nfe),
        **{"slots": len(start), **options},
    )
    return in_order(list(parts))


def error(result: SampleResult) -> float:
    return ((result.samples - START * math.exp(math.sin(3))) / START).abs().max().item()


@pytest.mark.parametrize(("sampler", "order"), [(Euler(), 1), (Heun(), 2)])
def test_halving_the_steps_divides_the_error_by_two_to_the_order(sampler: Sampler, order: int) -> None:
    errors = [error(integrate(sampler, nfe)) for nfe in (200, 400, 800)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)  # the next term of the series is a per cent of this


def test_dopri5_is_of_order_five() -> None:
    results = [integrate(Dopri5(rtol=tolerance, atol=tolerance), 10_000) for tolerance in (1e-5, 1e-7, 1e-9, 1e-11)]
    slope, _ = np.polyfit(
        [math.log(float(result.nfe[0])) for result in results], [math.log(error(r)) for r in results], 1
    )
    assert slope == pytest.approx(-5, abs=0.5)  # the step control rounds the number of steps
    assert all(result.complete.all() for result in results)


def test_the_tableau_is_that_of_scipy() -> None:
    table = ode.DORMAND_PRINCE
    np.testing.assert_allclose(np.array(table.matrix)[:6, :5], RK45.A, rtol=1e-15)
    np.testing.assert_allclose(table.nodes[:6], RK45.C, rtol=1e-15)
    np.testing.assert_allclose(table.weights[:6], RK45.B, rtol=1e-15)
    np.testing.assert_allclose(table.matrix[6], table.weights)
    np.testing.assert_allclose(-np.array(ode.DORMAND_PRINCE_ERROR), RK45.E, atol=1e-16)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
def test_dopri5_agrees_with_torchdiffeq_and_costs_no_more(tolerance: float) -> None:
    calls = 0

    def field(time: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return swing(x, time.expand(len(x)))

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = torchdiffeq.odeint(field, START, ends, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
    result = integrate(Dopri5(rtol=tolerance, atol=tolerance), 1000)
    # Both keep the error of a step to the tolerance; over the few steps of this way it adds up to some of these.
    torch.testing.assert_close(result.samples, expected, rtol=10 * tolerance, atol=10 * tolerance)
    assert result.nfe.max() <= calls + 12  # two steps: the first is guessed from one slope instead of two


def test_each_sample_has_its_own_steps_and_is_the_same_in_any_company() -> None:
    stiffness = torch.tensor([0.1, 5.0, 100.0], dtype=torch.float64)
    start = torch.stack(
        [START[:, 0], stiffness], dim=1
    )  # the second coordinate, which stays, says how stiff the first is

    def field(x: Tensor, time: Tensor) -> Tensor:
        return torch.stack([-x[:, 1] * (x[:, 0] - time), torch.zeros_like(time)], dim=1)

    together = integrate(Dopri5(), 5000, field, start)
    assert together.nfe.unique().numel() == 3
    for slots in (1, 2):
        apart = integrate(Dopri5(), 5000, field, start, slots=slots)
        assert torch.equal(apart.samples, together.samples)
        assert torch.equal(apart.nfe, together.nfe)
    time_lag = 1 / stiffness  # x(1) = 1 - 1/s + (x(0) + 1/s) exp(-s)
    exact = 1 - time_lag + (START[:, 0] + time_lag) * torch.exp(-stiffness)
    torch.testing.assert_close(together.samples[:, 0], exact, rtol=1e-2, atol=1e-2)  # rtol is 1e-3 a step


def test_a_step_that_is_too_long_is_repeated() -> None:
    times = []

    def wave(x: Tensor, time: Tensor) -> Tensor:
        times.append(time[0].item())
        return 50 * torch.sin(50 * time)[:, None].expand_as(x)

    result = integrate(Dopri5(rtol=1e-8, atol=1e-8), 10_000, wave)
    torch.testing.assert_close(result.samples, START + 1 - math.cos(50), rtol=0, atol=1e-5)
    assert times[6] == 1  # the field is zero at first, so the first step is the whole way
    assert times[7] < 0.2


def test_the_limit_of_evaluations_is_kept_and_told() -> None:
    result = integrate(Dopri5(rtol=1e-9), 30)
    assert result.nfe.tolist() == [30] * 3
    assert not result.complete.any()


@pytest.mark.parametrize(("sampler", "nfe"), [(Euler(), 10), (Heun(), 10), (Dopri5(), 100)])
@pytest.mark.parametrize("gamma", [0.0, 0.4, 0.9])
def test_the_straight_field_of_one_datum_leads_from_any_gamma_to_it(sampler, nfe, gamma) -> None:
    datum, noise = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = []

    def field(x: Tensor, time: Tensor) -> Tensor:
        times.append(time)
        return datum - noise

    start = corrupt(datum, noise, torch.full((4,), gamma, dtype=torch.float64))
    result = integrate(sampler, nfe, field, start, start_time=gamma)
    torch.testing.assert_close(result.samples, datum, rtol=0, atol=1e-12)
    assert times[0].eq(gamma).all()
    assert torch.stack(times).max() <= 1


def test_euler_on_a_field_without_time_is_gradient_descent() -> None:
    euler = sample(torch.cos, START, SamplingMethod(Euler(horizon=2.0), 20)).samples
    torch.testing.assert_close(
        euler, sample(torch.cos, START, SamplingMethod(GradientDescent(0.1), 20)).samples, rtol=1e-13, atol=1e-13
    )


def test_the_horizon_is_how_long_the_field_is_followed() -> None:
    for sampler, nfe in [(Heun(2.5), 2000), (Dopri5(2.5, 1e-8, 1e-8), 2000)]:
        result = sample(lambda x: -x, START, SamplingMethod(sampler, nfe))
        torch.testing.assert_close(result.samples, math.exp(-2.5) * START, rtol=1e-5, atol=0)


def test_single_precision_stays_single() -> None:
    for sampler in (Euler(), Heun(), Dopri5()):
        result = integrate(sampler, 100, start=START.float())
        assert result.samples.dtype == torch.float32
        assert result.complete.all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Euler(0.0), "horizon"),
        (lambda: Dopri5(rtol=0.0), "rtol"),
        (lambda: Dopri5(atol=math.inf), "atol"),
        (lambda: integrate(Heun(), 3), "multiple of 2.*use 4"),
        (lambda: integrate(Dopri5(), 30, start_time=1.0), "start_time"),
    ],
)
def test_parameters_out_of_range_are_refused(make, name) -> None:
    with pytest.raises(ConfigError, match=name):
        make()
