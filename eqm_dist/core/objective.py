"""Training losses of Equilibrium Matching and of its flow-matching baselines.

Sign: the field points downhill. It approximates (latents - noise) * c(gamma), the negative gradient of the energy, as
in the official code and its checkpoints; the paper's text has the opposite sign. Samplers add it.
"""

from collections.abc import Callable

from torch import Tensor

from eqm_dist.core.corruption import Path, constant_pace, corrupt, per_sample
from eqm_dist.core.decay import ConstantDecay, Decay

ConditionalField = Callable[[Tensor, Tensor], Tensor]
"""(x_gamma [B, ...], labels [B]) -> field [B, ...]"""


def target_field(latents: Tensor, noise: Tensor, gamma: Tensor, decay: Decay) -> Tensor:
    """(latents - noise) * c(gamma) (paper, Equation 3, with the sign turned round).

    Args:
        latents, noise: [B, ...].
        gamma: [B] in [0, 1].

    Returns:
        [B, ...].
    """
    return (latents - noise) * per_sample(decay(gamma), latents)


def eqm_loss(
    model: ConditionalField,
    latents: Tensor,
    labels: Tensor,
    *,
    gamma: Tensor,
    noise: Tensor,
    decay: Decay,
    path: Path = constant_pace,
) -> Tensor:
    """Equilibrium Matching, || f(x_gamma) - (latents - noise) * c(gamma) ||^2 (paper, Equation 3).

    The network never sees gamma. ``ConstantDecay(1.0)`` gives time-free flow matching (Equation 2). An
    ``ExplicitEnergy`` as the model gives EqM-E. A ``SelfStoppingPath`` as the path and its pace as the decay give the
    objective of Beckmann Transport Models: the path's true velocity.

    Args:
        model: (x_gamma, labels) -> field.
        latents, noise: [B, ...].
        labels: [B] int64.
        gamma: [B] in [0, 1].
        decay: c(gamma).
        path: how gamma moves x_gamma from noise to data.

    Returns:
        [B]: the squared error of each sample, as a mean over its dimensions.
    """
    predicted_field = model(corrupt(latents, noise, gamma, path), labels)
    return _mean_squared_error(predicted_field, target_field(latents, noise, gamma, decay))


def flow_matching_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], latents: Tensor, labels: Tensor, *, gamma: Tensor, noise: Tensor
) -> Tensor:
    """Flow matching, || f(x_gamma, gamma) - (latents - noise) ||^2 (paper, Equation 1).

    Args:
        model: (x_gamma, labels, gamma) -> field.
        latents, noise: [B, ...].
        labels: [B] int64.
        gamma: [B] in [0, 1], the time of flow matching.

    Returns:
        [B]: the squared error of each sample, as a mean over its dimensions.
    """
    predicted_field = model(corrupt(latents, noise, gamma), labels, gamma)
    return _mean_squared_error(predicted_field, target_field(latents, noise, gamma, ConstantDecay()))


def _mean_squared_error(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().flatten(1).mean(1)
