import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.core.dispersive import Dispersed, dispersive_loss
from eqm_dist.errors import DataError
from eqm_dist.models import SiT


@given(st.integers(1, 6), st.floats(0.1, 10))
def test_it_is_the_log_of_the_mean_over_the_whole_matrix(samples: int, temperature: float) -> None:
    tokens = torch.randn(samples, 3, 4, generator=torch.Generator().manual_seed(samples), dtype=torch.float64)
    points = tokens.flatten(1)
    distances = (points[:, None] - points[None]).square().mean(2)  # divided by the number of values
    expected = (-distances / temperature).exp().mean().log()
    torch.testing.assert_close(dispersive_loss(tokens, temperature), expected, rtol=1e-12, atol=1e-14)


@given(st.integers(2, 8))
def test_it_runs_from_zero_to_minus_log_of_the_batch(samples: int) -> None:
    same = torch.ones(samples, 5, dtype=torch.float64)
    apart = 1e3 * torch.arange(samples, dtype=torch.float64)[:, None].expand(-1, 5)
    assert dispersive_loss(same).item() == pytest.approx(0, abs=1e-15)
    assert dispersive_loss(apart).item() == pytest.approx(-math.log(samples))


def test_its_gradient_drives_samples_apart_and_is_finite_where_they_coincide() -> None:
    points = torch.tensor([[0.0], [0.5], [0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dispersive_loss, torch.tensor([[0.0], [0.5], [1.2]]).double().requires_grad_())
    (gradient,) = torch.autograd.grad(dispersive_loss(points), points)
    assert gradient.isfinite().all()
    assert gradient[0] > 0 > gradient[1]  # descent moves the first down and the others up


def test_a_low_precision_input_is_summed_in_fp32() -> None:
    tokens = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert dispersive_loss(tokens).dtype == torch.float32
    torch.testing.assert_close(dispersive_loss(tokens), dispersive_loss(tokens.float()), rtol=0, atol=0)


@pytest.fixture
def model() -> SiT:
    return SiT(4, 2, 2, 8, 2, 2, 3, zero_init=False).double()


X = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def squares(field: Callable[..., torch.Tensor], x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return field(x, labels).square().flatten(1).sum(1)


def test_each_sample_carries_the_value_of_its_group(model: SiT) -> None:
    found = Dispersed(squares, weight=0.5, temperature=2.0, group=3)(model, X, LABELS)
    _, tokens = model(X, LABELS, return_tokens=True)
    first, second = dispersive_loss(tokens[:3], 2.0), dispersive_loss(tokens[3:], 2.0)
    expected = squares(model, X, LABELS) + 0.5 * torch.stack([first] * 3 + [second] * 3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert first != second


def test_a_batch_may_be_cut_between_groups_and_nowhere_else(model: SiT) -> None:
    loss = Dispersed(squares, weight=0.5, temperature=1.0, group=2)
    whole = loss(model, X, LABELS)
    parts = torch.cat([loss(model, X[at], LABELS[at]) for at in (slice(0, 4), slice(4, 6))])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="groups of 2 samples, and a batch of 3"):
        loss(model, X[:3], LABELS[:3])
