"""EqM-E: a scalar energy made from a field model, and the field that is exactly its negative gradient."""

from collections.abc import Callable
from typing import Literal, assert_never, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eqm_dist.core.objective import ConditionalField
from eqm_dist.errors import ConfigError

EnergyKind = Literal["dot", "l2"]


class ExplicitEnergy:
    """A scalar energy and its negative gradient, from a model f(x, labels).

    ``dot``: energy = -x . f(x).  ``l2``: energy = ||f(x)||^2 / 2. The signs are those of the official code. In the
    paper's text f points uphill, which turns the first into the same energy, but the second has a minus sign there.

    With ``l2`` a model that starts at f = 0 never moves, for the gradient of the squared norm is zero there: build
    it with ``zero_init=False``.

    Args:
        model: (x [B, ...], labels [B]) -> [B, ...], twice differentiable.
        kind: "dot" or "l2".

    Raises:
        ConfigError: the kind is unknown.
    """

    def __init__(self, model: ConditionalField, kind: EnergyKind) -> None:
        if kind not in get_args(EnergyKind):
            raise ConfigError(f"The kind of an explicit energy is one of {get_args(EnergyKind)}, got {kind!r}.")
        self.model = model
        self.kind: EnergyKind = kind

    def energy(self, x: Tensor, labels: Tensor) -> Tensor:
        """The energy [B] of samples x [B, ...]."""
        predicted = self.model(x, labels)
        match self.kind:
            case "dot":
                density = -x * predicted
            case "l2":
                density = predicted.square() / 2
            case _:
                assert_never(self.kind)
        return density.flatten(1).sum(1)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """The field [B, ...]: minus the gradient of the energy at x [B, ...].

        Where the caller records gradients, the result carries the graph for a second derivative. Under
        ``torch.no_grad`` the gradient of the energy is taken all the same, and its graph is freed at once.

        Raises:
            ConfigError: called under ``torch.inference_mode``, where no gradient can be taken.
        """
        if torch.is_inference_mode_enabled():
            raise ConfigError(
                "An explicit energy differentiates its model and cannot run under torch.inference_mode(); "
                "use torch.no_grad()."
            )
        training = torch.is_grad_enabled()
        # Only the plain attention kernel has a second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x = x if training and x.requires_grad else x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.energy(x, labels).sum(), x, create_graph=training)
        return -gradient


def of_energy(loss: Callable[..., Tensor], kind: EnergyKind) -> Callable[..., Tensor]:
    """A loss ``(model, *inputs, **draws) -> [B]`` of the field that the model's energy has."""

    def energy_loss(model: ConditionalField, *inputs: Tensor, **draws: Tensor) -> Tensor:
        return loss(ExplicitEnergy(model, kind), *inputs, **draws)

    return energy_loss
