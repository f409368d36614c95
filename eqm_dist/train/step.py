"""From a batch of moments to the loss of each sample: the random part of training, keyed by position.

Everything drawn here is a function of (seed, stream, position of the sample in the run), so it is the same number
whoever computes it (docs/decisions/0003).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eqm_dist import rng
from eqm_dist.data.loader import Batch
from eqm_dist.models.autoencoder import moments_to_latents

SampleLoss = Callable[..., Tensor]
"""``(model, latents, labels, *, gamma, noise) -> loss [B]``"""


class Draws(NamedTuple):
    """What is random of a batch, before it meets the data."""

    mirrored: Tensor | None
    """[B] bool; None where nothing is flipped."""
    posterior: Tensor
    """[B, *shape], standard normal."""
    gamma: Tensor
    """[B] in (0, 1)."""
    noise: Tensor
    """[B, *shape], standard normal."""
    dropped: Tensor
    """[B] bool: gets the null label."""


DrawBatch = Callable[[int, Tensor, Sequence[int], float, bool], Draws]
"""``(seed, positions, shape, label_dropout, flip) -> draws``"""


def draw_batch(seed: int, positions: Tensor, shape: Sequence[int], label_dropout: float, flip: bool) -> Draws:
    """All draws of the samples at ``positions`` [B], for latents of ``shape``."""
    return Draws(
        mirrored=rng.uniform(seed, rng.Stream.FLIP, positions) < 0.5 if flip else None,
        posterior=rng.normal(seed, rng.Stream.POSTERIOR, positions, shape),
        gamma=rng.uniform(seed, rng.Stream.GAMMA, positions),
        noise=rng.normal(seed, rng.Stream.NOISE, positions, shape),
        dropped=rng.uniform(seed, rng.Stream.LABEL_DROPOUT, positions) < label_dropout,
    )


@dataclass(frozen=True)
class BatchLoss:
    """Draws what is random of a batch, and gives the loss of each of its samples.

    Attributes:
        loss: the objective, per sample.
        seed: seed of all streams.
        latent_scale, latent_shift: latents = (posterior sample - shift) * scale.
        label_dropout: probability of the null label.
        null_label: the label of "no class", equal to the number of classes.
        flip: draw the mirrored moments half of the time.
        draw: ``draw_batch``, or the same compiled.
    """

    loss: SampleLoss
    seed: int
    latent_scale: float
    latent_shift: float
    label_dropout: float
    null_label: int
    flip: bool
    draw: DrawBatch = draw_batch

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Loss of each sample [B]; ``batch.moments`` is [B, V, 2C, H, W] with V = 1, or 2 with the mirror second."""
        moments = batch.moments[:, 0]
        channels, height, width = moments.shape[1] // 2, *moments.shape[2:]
        draws = self.draw(self.seed, batch.positions, (channels, height, width), self.label_dropout, self.flip)
        if draws.mirrored is not None:
            moments = torch.where(draws.mirrored[:, None, None, None], batch.moments[:, 1], moments)
        latents = moments_to_latents(moments, draws.posterior, self.latent_scale, self.latent_shift)
        labels = torch.where(draws.dropped, self.null_label, batch.labels)
        return self.loss(model, latents, labels, gamma=draws.gamma, noise=draws.noise)


class ModelWithLoss(nn.Module):
    """Model and loss as one module: batch -> loss of each sample [n].

    Engines wrap this rather than the model, so that all that a loss does with its model lies inside one forward pass:
    the inner derivative of an explicit energy must not meet the hooks that DeepSpeed puts on a forward pass's output.
    """

    def __init__(self, model: nn.Module, loss: BatchLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        """Loss of each sample [n]."""
        return self.loss(self.model, batch)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by their names in the model."""
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    def frozen_parameters(self) -> dict[str, Tensor]:
        """Copies in host memory of those that it does not change."""
        parameters = self.model.named_parameters()
        return {name: param.detach().cpu().clone() for name, param in parameters if not param.requires_grad}
