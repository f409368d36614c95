from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.core.corruption import SelfStoppingPath, constant_pace, corrupt
from eqm_dist.core.decay import ConstantDecay, LinearDecay, TruncatedDecay
from eqm_dist.core.objective import eqm_loss, target_field
from eqm_dist.core.weighting import MinSnrWeighting, RelativeWeighting, weighted
from eqm_dist.errors import ConfigError

GAMMAS = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


@given(st.floats(0, 0.95), st.floats(0.1, 10))
def test_relative_weights_make_the_zero_field_cost_the_same_until_the_floor(start: float, scale: float) -> None:
    decay = TruncatedDecay(start, scale)
    weighting = RelativeWeighting(decay, floor=0.1 * scale)
    latents, noise = torch.full((999, 4), 2.0).double(), torch.full((999, 4), -1.0).double()
    loss = weighted(lambda x, **draws: target_field(x, decay=decay, **draws).square().mean(1), weighting)
    cost = loss(latents, gamma=GAMMAS, noise=noise)
    above = decay(GAMMAS) >= 0.1 * scale
    torch.testing.assert_close(cost[above], torch.full_like(cost[above], 9.0), rtol=1e-12, atol=0)
    # From start 0 one gamma lies at the floor but for a rounding, and so does its cost.
    assert (cost[~above] <= 9 * (1 + 1e-12)).all()
    assert (cost[decay(GAMMAS) < 0.0995 * scale] < 9).all()
    assert weighting(GAMMAS).max() <= (0.1 * scale) ** -2 * (1 + 1e-12)


@pytest.mark.parametrize("path", [constant_pace, SelfStoppingPath(0.5)])
@pytest.mark.parametrize("limit", [1.0, 5.0])
def test_min_snr_weighs_the_error_of_the_datum_by_the_capped_ratio(path: SelfStoppingPath, limit: float) -> None:
    decay = path.pace if isinstance(path, SelfStoppingPath) else TruncatedDecay(0.8, 4.0)
    latents, noise = torch.full((999, 1), 2.0).double(), torch.full((999, 1), -1.0).double()
    # A field that is off by 0.1 everywhere, and the datum it points to: x_gamma + (1 - d) * field / c.
    field = target_field(latents, noise, GAMMAS, decay) + 0.1
    data = path(GAMMAS)
    datum = corrupt(latents, noise, GAMMAS, path) + ((1 - data) / decay(GAMMAS))[:, None] * field
    snr = data**2 / (1 - data) ** 2
    expected = snr.clamp(max=limit) * (datum - latents).square().squeeze(1)
    found = MinSnrWeighting(decay, limit, path)(GAMMAS) * 0.1**2
    # Near data the difference datum - latents keeps few of its 16 digits.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    assert snr.min() < limit < snr.max()


def test_min_snr_of_a_linear_decay_in_closed_form() -> None:
    # c = 1 - gamma: w = min(SNR, limit), the weight of the datum's own error.
    gamma = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    torch.testing.assert_close(
        MinSnrWeighting(LinearDecay(1.0), 5.0)(gamma), torch.tensor([1 / 9, 1.0, 5.0], dtype=torch.float64)
    )


def test_weights_are_finite_for_every_gamma_that_is_drawn() -> None:
    last = torch.tensor([torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps / 2])
    for decay in (ConstantDecay(), LinearDecay(4.0), TruncatedDecay(0.999, 4.0)):
        assert MinSnrWeighting(decay, 5.0)(last).isfinite().all()
        assert RelativeWeighting(decay, 0.1)(last).isfinite().all()
    path = SelfStoppingPath(0.8)
    assert MinSnrWeighting(path.pace, 5.0, path)(last).isfinite().all()


def test_a_weight_belongs_to_its_sample() -> None:
    decay, gamma = TruncatedDecay(), torch.tensor([0.3, 0.95])
    inputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, dtype=torch.int64)
    noise = torch.zeros(2, 3)

    def zero(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    plain = partial(eqm_loss, decay=decay)
    both = weighted(plain, RelativeWeighting(decay, 0.5))(zero, *inputs, gamma=gamma, noise=noise)
    # c is 4 and 1 there, the second with the rounding of 0.95 in fp32.
    expected = plain(zero, *inputs, gamma=gamma, noise=noise) * torch.tensor([1 / 16, 1.0])
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_floor_or_limit_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="floor of a loss weighting must be positive"):
        RelativeWeighting(TruncatedDecay(), value)
    with pytest.raises(ConfigError, match="limit of a loss weighting must be positive"):
        MinSnrWeighting(TruncatedDecay(), value)
