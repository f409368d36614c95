import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eqm_dist.core.corruption import SelfStoppingPath, corrupt
from eqm_dist.core.objective import eqm_loss
from eqm_dist.core.samplers import GradientDescent
from eqm_dist.core.sampling import SamplingMethod, sample
from eqm_dist.errors import ConfigError

STARTS = st.floats(0, 0.99)
GAMMAS = torch.linspace(0, 1, 1001, dtype=torch.float64)


def value(path: SelfStoppingPath, gamma: float) -> float:
    return path(torch.tensor([gamma], dtype=torch.float64)).item()


@given(STARTS)
def test_the_path_runs_from_noise_to_data_and_never_back(start: float) -> None:
    data = SelfStoppingPath(start)(GAMMAS)
    assert data[0] == 0
    assert data[-1] == 1
    assert (data.diff() > 0).all()


@given(STARTS, st.floats(0, 1))
def test_the_pace_is_the_derivative(start: float, gamma: float) -> None:
    path = SelfStoppingPath(start)
    step = 1e-6
    low, high = max(0.0, gamma - step), min(1.0, gamma + step)
    slope = (value(path, high) - value(path, low)) / (high - low)
    expected = path.pace(torch.tensor([gamma], dtype=torch.float64)).item()
    # The pace has a kink at the start of braking, where it changes by 2 / (1 - a^2) per gamma; rounding adds 1e-10.
    assert slope == pytest.approx(expected, abs=2 * step * 2 / (1 - start**2) + 1e-9)


@given(STARTS)
def test_value_and_derivative_agree_where_braking_begins_and_the_derivative_ends_at_zero(start: float) -> None:
    path = SelfStoppingPath(start)
    step = 1e-9
    # The path's Lipschitz constant is at most 2, the pace's 2 / (1 - a^2) <= 101; rounding is 1e-16 of values up to 2.
    assert value(path, start) == pytest.approx(value(path, start + step), abs=3 * step)
    before, after = path.pace(torch.tensor([start, start + step], dtype=torch.float64)).tolist()
    assert before == pytest.approx(2 / (1 + start), rel=1e-14)
    assert after == pytest.approx(before, abs=102 * step)
    assert path.pace(torch.ones(1)).item() == 0


@given(STARTS)
def test_the_pace_adds_up_to_the_whole_way(start: float) -> None:
    pace = SelfStoppingPath(start).pace(torch.linspace(0, 1, 100_001, dtype=torch.float64))
    # The trapezoid rule is exact but for the cell of the kink, whose error is step^2 / 4 * slope <= 1e-8.
    assert torch.trapezoid(pace, dx=1e-5).item() == pytest.approx(1, abs=1e-8)


@given(STARTS, st.floats(0.001, 0.999))
def test_the_target_is_the_velocity_of_what_the_model_sees(start: float, gamma: float) -> None:
    path, step = SelfStoppingPath(start), 1e-6
    latents, noise = torch.tensor([[2.0, -1.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    low, at, high = (torch.tensor([gamma + d], dtype=torch.float64) for d in (-step, 0, step))
    velocity = (corrupt(latents, noise, high, path) - corrupt(latents, noise, low, path)) / (2 * step)
    seen = []

    def model(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return velocity

    labels = torch.zeros(1, dtype=torch.int64)
    loss = eqm_loss(model, latents, labels, gamma=at, noise=noise, decay=path.pace, path=path)
    torch.testing.assert_close(seen[0], corrupt(latents, noise, at, path), rtol=0, atol=0)
    # Within the kink's cell the central difference is off by step * 2 / (1 - a^2) * ||x - e|| <= 1e-3.
    assert loss.item() < 1e-6


@settings(max_examples=30)  # each is a descent of 2,000 steps
@given(st.floats(0, 0.95), st.floats(0.05, 0.9))
def test_descent_settles_at_the_distance_that_is_stated(start: float, share: float) -> None:
    # The field of one datum at 0 on the line to a noise of length 1, where x = r: the pace at the gamma of that r.
    path = SelfStoppingPath(start)
    step_size = share * path.step_size_bound
    edge, full = (1 - start) / (1 + start), 2 / (1 + start)

    def field(x: torch.Tensor) -> torch.Tensor:
        braking = 2 * (x.abs() / (1 - start**2)).sqrt()
        return -x.sign() * torch.where(x.abs() <= edge, braking, full)

    between = torch.tensor([0.123, 0.456, 0.789]) * edge
    gammas = 1 - (between.double() * (1 - start**2)).sqrt()
    torch.testing.assert_close(1 - path(gammas), between.double())
    torch.testing.assert_close(-field(between.double()), path.pace(gammas))
    # From an odd place: a whole number of steps would end on the datum itself, where descent stays.
    settled = sample(
        field, torch.full((1, 1), 0.9137).double(), SamplingMethod(GradientDescent(step_size), 2000)
    ).samples
    assert settled.abs().item() == pytest.approx(path.distance_at_rest(step_size), rel=1e-6)


def test_above_its_bound_descent_swings_over_the_data_at_the_full_pace() -> None:
    path = SelfStoppingPath(0.8)
    full = 2 / 1.8
    step_size = 1.5 * path.step_size_bound
    # The full pace, as beyond r = (1 - a) / (1 + a); a swing of step * pace / 2 on either side lies out there.
    swing = step_size * full / 2
    assert swing > (1 - 0.8) / (1 + 0.8)
    assert swing - step_size * full == pytest.approx(-swing)
    # At the bound itself the swing is where the parabola begins.
    edge = path.distance_at_rest(path.step_size_bound)
    assert edge == pytest.approx((1 - 0.8) / (1 + 0.8))


@pytest.mark.parametrize("start", [-0.1, 1.0, math.nan])
def test_a_start_out_of_range_is_refused(start: float) -> None:
    with pytest.raises(ConfigError, match="braking_start of a self-stopping path must lie in"):
        SelfStoppingPath(start)
