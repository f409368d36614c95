"""Our numerics against values of the official implementation, in float64 (tests/golden/README.md).

Both sides add the same numbers in different orders, which moves the last of 16 digits; 1e-10 leaves room for the 249
steps of a sampler run and is far below any difference in meaning.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from eqm_dist.core.decay import PiecewiseDecay, TruncatedDecay
from eqm_dist.core.dispersive import dispersive_loss
from eqm_dist.core.energy import EnergyKind, ExplicitEnergy
from eqm_dist.core.guidance import guided
from eqm_dist.core.objective import eqm_loss
from eqm_dist.core.samplers import GradientDescent, NesterovGradientDescent, Sampler
from eqm_dist.core.sampling import SamplingMethod, sample
from eqm_dist.models import SiT
from eqm_dist.train.optimizer import EmaAdamW

GOLDEN = {
    name: torch.from_numpy(value)
    for name, value in np.load(Path(__file__).parent / "golden" / "eqm_reference.npz", allow_pickle=False).items()
}
X, LABELS, GAMMA, NOISE = (GOLDEN[name] for name in ("x", "y", "gamma", "eps"))
NULL_LABEL = 10
DECAY = TruncatedDecay(decay_start=0.8, gradient_scale=4.0)


@pytest.fixture
def model() -> SiT:
    model = SiT(8, 2, 4, hidden_size=48, depth=2, num_heads=4, num_classes=10, learn_sigma=True).double()
    weights = {name.removeprefix("param/"): value for name, value in GOLDEN.items() if name.startswith("param/")}
    model.load_state_dict(weights, strict=True)
    return model


def assert_golden(result: torch.Tensor, name: str) -> None:
    expected = GOLDEN[name]
    torch.testing.assert_close(result.detach(), expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def gradient_norm(model: SiT) -> torch.Tensor:
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


def test_the_position_table_is_the_official_one() -> None:
    model = SiT(8, 2, 4, hidden_size=48, depth=1, num_heads=4, num_classes=1)
    assert torch.equal(model.pos_embed.double(), GOLDEN["param/pos_embed"])  # recorded from float32


def test_forward(model: SiT) -> None:
    assert_golden(model(X, LABELS), "forward")


def test_dispersive_loss_of_the_last_blocks_tokens(model: SiT) -> None:
    _, tokens = model(X, LABELS, return_tokens=True)
    assert_golden(dispersive_loss(tokens), "dispersive")


def test_decay() -> None:
    assert_golden(DECAY(GOLDEN["ct_grid"]), "ct")
    assert_golden(PiecewiseDecay(0.8, decay_value=1.0, gradient_scale=4.0)(GOLDEN["ct_grid"]), "ct")


def test_loss(model: SiT) -> None:
    assert_golden(eqm_loss(model, X, LABELS, gamma=GAMMA, noise=NOISE, decay=DECAY), "loss")


@pytest.mark.parametrize(("official", "kind"), [("dot", "dot"), ("mean", "dot"), ("l2", "l2")])
@pytest.mark.parametrize("gradients", [True, False])
def test_explicit_energy(official: str, kind: EnergyKind, gradients: bool, model: SiT) -> None:
    energy = ExplicitEnergy(model, kind)
    with torch.set_grad_enabled(gradients):
        assert_golden(energy(X, LABELS), f"ebm_{official}/field")
        assert_golden(energy.energy(X, LABELS), f"ebm_{official}/energy")


@pytest.mark.parametrize("kind", ["dot", "l2"])
def test_training_an_explicit_energy(kind: EnergyKind, model: SiT) -> None:
    loss = eqm_loss(ExplicitEnergy(model, kind), X, LABELS, gamma=GAMMA, noise=NOISE, decay=DECAY)
    assert_golden(loss, f"ebm_{kind}/loss")
    loss.mean().backward()
    assert_golden(gradient_norm(model), f"ebm_{kind}/grad_norm")


@pytest.mark.parametrize(
    ("name", "sampler", "cfg_scale", "nfe"),
    [
        ("gd_250", GradientDescent(0.003), 1.0, 249),
        ("nag_250", NesterovGradientDescent(0.0017, 0.3), 1.0, 249),
        ("nag_cfg1.5_50", NesterovGradientDescent(0.0017, 0.3), 1.5, 49),
        ("gd_cfg4_50", GradientDescent(0.003), 4.0, 49),
    ],
)
def test_sampling(name: str, sampler: Sampler, cfg_scale: float, nfe: int, model: SiT) -> None:
    field = guided(model, cfg_scale=cfg_scale, null_label=NULL_LABEL, guided_channels=3)
    result = sample(lambda x: field(x, LABELS), start=X, method=SamplingMethod(sampler, nfe))
    assert_golden(result.samples, name)
    assert result.nfe.tolist() == [nfe] * len(X)


def test_three_updates_of_training(model: SiT) -> None:
    optimizer = EmaAdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        ema_decays=(0.9999,),
    )
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = eqm_loss(model, X, LABELS, gamma=GAMMA, noise=NOISE, decay=DECAY).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    weights = dict(model.named_parameters())
    emas = {name: optimizer.state[p]["ema_0.9999"] if p.requires_grad else p for name, p in weights.items()}
    assert_golden(torch.stack(losses), "train3/losses")
    assert_golden(torch.stack([p.norm() for p in weights.values()]), "train3/param_norms")
    assert_golden(torch.stack([ema.norm() for ema in emas.values()]), "train3/ema_norms")
    assert_golden(emas["final_layer.linear.weight"], "train3/ema_final_linear_weight")
    for name, weight in weights.items():
        if weight.requires_grad:
            assert_golden(weight, f"train3/param/{name}")
