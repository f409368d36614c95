from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.core.corruption import corrupt, per_sample
from eqm_dist.core.decay import ConstantDecay, TruncatedDecay
from eqm_dist.core.objective import eqm_loss, flow_matching_loss, target_field
from eqm_dist.errors import DataError

SHAPE = (5, 3, 4, 4)


@pytest.fixture
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(SHAPE, generator=generator, dtype=torch.float64),
        "noise": torch.randn(SHAPE, generator=generator, dtype=torch.float64),
        "gamma": torch.rand(SHAPE[0], generator=generator, dtype=torch.float64),
        "labels": torch.arange(SHAPE[0]),
    }


def test_corruption_runs_from_noise_to_data(batch: dict[str, Any]) -> None:
    latents, noise = batch["latents"], batch["noise"]
    ends = torch.tensor([0, 1, 0, 1, 0], dtype=torch.float64)
    expected = torch.stack([(noise, latents)[int(end)][i] for i, end in enumerate(ends)])
    assert torch.equal(corrupt(latents, noise, ends), expected)


@given(st.floats(0, 0.999))
def test_a_step_along_the_target_reaches_the_data(gamma: float) -> None:
    # With c = 1 the distance left is (1 - gamma) times the target: the field points downhill, towards the data.
    latents, noise = torch.tensor([[2.0, -1.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    gammas = torch.tensor([gamma], dtype=torch.float64)
    reached = corrupt(latents, noise, gammas) + (1 - gamma) * target_field(latents, noise, gammas, ConstantDecay())
    torch.testing.assert_close(reached, latents, rtol=1e-14, atol=1e-14)


def test_loss_is_zero_for_the_target_itself_and_a_mean_over_dimensions(batch: dict[str, Any]) -> None:
    decay = TruncatedDecay()
    labels, arguments = batch.pop("labels"), batch
    target = target_field(decay=decay, **arguments)
    offsets = torch.arange(SHAPE[0]).double()

    def model(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return target + per_sample(labels.double(), x)

    latents = arguments.pop("latents")
    loss = eqm_loss(model, latents, labels, decay=decay, **arguments)
    torch.testing.assert_close(loss, offsets.square(), rtol=1e-12, atol=1e-12)


def test_the_network_sees_x_gamma_and_labels_and_never_gamma(batch: dict[str, Any]) -> None:
    seen = []

    def model(*inputs: torch.Tensor) -> torch.Tensor:
        seen.extend(inputs)
        return inputs[0]

    eqm_loss(
        model, batch["latents"], batch["labels"], gamma=batch["gamma"], noise=batch["noise"], decay=TruncatedDecay()
    )
    assert len(seen) == 2
    assert torch.equal(seen[0], corrupt(batch["latents"], batch["noise"], batch["gamma"]))
    assert torch.equal(seen[1], batch["labels"])


def test_flow_matching_passes_gamma_and_is_time_free_flow_matching_otherwise(batch: dict[str, Any]) -> None:
    def timed(x: torch.Tensor, labels: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return x * per_sample(gamma, x)

    def blind(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return timed(x, labels, batch["gamma"])

    arguments: dict[str, Any] = {"gamma": batch["gamma"], "noise": batch["noise"]}
    flow = flow_matching_loss(timed, batch["latents"], batch["labels"], **arguments)
    free = eqm_loss(blind, batch["latents"], batch["labels"], decay=ConstantDecay(1.0), **arguments)
    assert torch.equal(flow, free)


@pytest.mark.parametrize("gamma", [torch.rand(()), torch.rand(1), torch.rand(SHAPE[0], 1, 1, 1)])
def test_gamma_must_be_one_number_per_sample(gamma: torch.Tensor, batch: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="one value per sample"):
        corrupt(batch["latents"], batch["noise"], gamma)
