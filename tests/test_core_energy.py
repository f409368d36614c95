import pytest
import torch

from benchmarks.bench_energy import forward_mode, plain, with_plain_norms
from eqm_dist.core.energy import EnergyKind, ExplicitEnergy
from eqm_dist.errors import ConfigError
from eqm_dist.models import SiT

KINDS: tuple[EnergyKind, ...] = ("dot", "l2")


@pytest.fixture
def model() -> SiT:
    """A small model in float64 none of whose layers is zero."""
    model = SiT(4, 2, 2, 8, 2, 2, 3, zero_init=False).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LABELS = torch.tensor([0, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_field_is_minus_the_slope_of_the_energy(kind: EnergyKind, model: SiT, x: torch.Tensor) -> None:
    energy = ExplicitEnergy(model, kind)
    field = energy(x, LABELS)
    step = 1e-5
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = (energy.energy(x + step * direction, LABELS) - energy.energy(x - step * direction, LABELS)) / (2 * step)
    # Central difference: error step^2 = 1e-10 from the third derivative, 1e-16 / step = 1e-11 from rounding.
    torch.testing.assert_close((field * direction).flatten(1).sum(1), -slope, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives_pass_gradcheck(kind: EnergyKind, model: SiT, x: torch.Tensor) -> None:
    energy = ExplicitEnergy(model, kind)
    x = x[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: energy.energy(x, LABELS[:1]), x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: energy(x, LABELS[:1]), x, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradients_of_the_field_agree_with_a_finite_difference(
    kind: EnergyKind, model: SiT, x: torch.Tensor
) -> None:
    energy = ExplicitEnergy(model, kind)
    weight = model.get_parameter("blocks.0.attn.qkv.weight")

    def loss() -> torch.Tensor:
        return energy(x, LABELS).square().sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        weight.add_(direction, alpha=step)
        above = loss()
        weight.sub_(direction, alpha=2 * step)
        below = loss()
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_field_is_the_same_and_carries_no_graph(
    kind: EnergyKind, model: SiT, x: torch.Tensor
) -> None:
    energy = ExplicitEnergy(model, kind)
    training = energy(x, LABELS)
    with torch.no_grad():
        inference = energy(x, LABELS)
    assert training.requires_grad
    assert not inference.requires_grad
    assert not x.requires_grad
    assert torch.equal(training.detach(), inference)
    assert not torch.allclose(inference, model(x, LABELS))  # not the raw field


def test_dot_energy_of_a_linear_field_in_closed_form() -> None:
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    x = torch.tensor([[1.0, -2.0]])

    def linear(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x @ matrix.T

    labels = torch.zeros(1, dtype=torch.int64)
    dot, squared = ExplicitEnergy(linear, "dot"), ExplicitEnergy(linear, "l2")
    assert dot.energy(x, labels).item() == -((x @ matrix.T) * x).sum().item()
    torch.testing.assert_close(dot(x, labels), x @ (matrix + matrix.T))
    assert squared.energy(x, labels).item() == (x @ matrix.T).square().sum().item() / 2
    torch.testing.assert_close(squared(x, labels), -x @ matrix.T @ matrix)


def test_l2_energy_moves_only_with_a_final_layer_that_is_not_zero(x: torch.Tensor) -> None:
    for zero_init in (True, False):
        model = SiT(4, 2, 2, 8, 1, 2, 3, zero_init=zero_init).double()
        ExplicitEnergy(model, "l2")(x, LABELS).square().sum().backward()
        moved = any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        assert moved is not zero_init


def test_inference_mode_is_refused_in_a_sentence(model: SiT, x: torch.Tensor) -> None:
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"no_grad"):
        ExplicitEnergy(model, "dot")(x, LABELS)


def test_an_unknown_kind_is_refused(model: SiT) -> None:
    with pytest.raises(ConfigError, match="cubic"):
        ExplicitEnergy(model, "cubic")  # pyright: ignore[reportArgumentType]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in its forward-mode rules
@pytest.mark.parametrize("kind", KINDS)
def test_weight_gradients_are_those_of_one_forward_mode_product(kind: EnergyKind, model: SiT, x: torch.Tensor) -> None:
    # <v, g> has the gradient of minus the slope of the energy along v: no graph of the inner derivative is needed.
    energy = ExplicitEnergy(model, kind)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = plain(energy, x, LABELS, target)
    with_plain_norms(model)
    other = forward_mode(model, x, LABELS, target, energy)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    share = torch.tensor([0.3, 0.7], dtype=torch.float64)
    expected = torch.autograd.grad(loss @ share, weights, allow_unused=True)
    found = torch.autograd.grad(other @ share, weights, allow_unused=True)
    for one, two in zip(found, expected, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    assert sum(gradient is not None and bool(gradient.any()) for gradient in expected) > 20


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_forward_mode_product_in_closed_form() -> None:
    # f = W x: g = (W + W^T) x, and the gradient of <v, g> by W is v x^T + x v^T.
    weight = torch.tensor([[2.0, 1.0], [0.0, 3.0]], requires_grad=True)
    x, target = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.25]])
    loss = forward_mode(lambda x, labels: x @ weight.T, x, torch.zeros(1, dtype=torch.int64), target)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    error = (x @ (weight + weight.T) - target).detach()
    outer = error.T @ x
    torch.testing.assert_close(loss.detach(), error.square().mean(1))
    torch.testing.assert_close(gradient, outer + outer.T)  # 2 / dimensions = 1
