"""From a batch of moments to the loss of each sample: the random part of training, keyed by position.

Everything drawn here is a function of (seed, stream, position of the sample in the run), so it is the same number
whoever computes it (docs/decisions/0003).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eqm_dist import rng
from eqm_dist.data.loader import Batch
from eqm_dist.models.autoencoder import moments_to_latents

SampleLoss = Callable[..., Tensor]
"""``(model, latents, labels, *, gamma, noise) -> loss [B]``"""


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
    """

    loss: SampleLoss
    seed: int
    latent_scale: float
    latent_shift: float
    label_dropout: float
    null_label: int
    flip: bool

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Loss of each sample [B]; ``batch.moments`` is [B, V, 2C, H, W] with V = 1, or 2 with the mirror second."""
        positions = batch.positions
        moments = batch.moments[:, 0]
        if self.flip:
            mirrored = rng.uniform(self.seed, rng.Stream.FLIP, positions) < 0.5
            moments = torch.where(mirrored[:, None, None, None], batch.moments[:, 1], moments)
        channels, height, width = moments.shape[1] // 2, *moments.shape[2:]
        shape = (channels, height, width)
        posterior_noise = rng.normal(self.seed, rng.Stream.POSTERIOR, positions, shape)
        latents = moments_to_latents(moments, posterior_noise, self.latent_scale, self.latent_shift)
        gamma = rng.uniform(self.seed, rng.Stream.GAMMA, positions)
        noise = rng.normal(self.seed, rng.Stream.NOISE, positions, shape)
        dropped = rng.uniform(self.seed, rng.Stream.LABEL_DROPOUT, positions) < self.label_dropout
        labels = torch.where(dropped, self.null_label, batch.labels)
        return self.loss(model, latents, labels, gamma=gamma, noise=noise)


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
