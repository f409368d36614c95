"""Images <-> moments <-> latents.

images   [B, H, W, C] uint8   what people look at
  | encode
moments  [B, 2C', h, w]       mean, then log-variance, of the posterior over latents: what shards hold
  | moments_to_latents
latents  [B, C', h, w]        what the model sees, near unit scale
  | decode
images   [B, H, W, C] uint8
"""

from typing import Protocol

import torch
from torch import Tensor


class Autoencoder(Protocol):
    """Both directions between images and latents, with the numbers that bring latents near unit scale."""

    id: str
    """Names the weights; written to the manifest, so that shards and decoder can be matched."""
    latent_scale: float
    latent_shift: float

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, C], uint8 -> moments [B, 2C', h, w], float32: means, then log-variances."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C', h, w], in the scale of ``moments_to_latents`` -> images [B, H, W, C], uint8."""
        ...


class IdentityAutoencoder:
    """Pixels as latents: 0..255 <-> [-1, 1]. Its posterior is a point (log-variance -inf); the round trip is exact."""

    id = "identity"
    latent_scale = 1.0
    latent_shift = 0.0

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, C], uint8 -> moments [B, 2C, H, W], float32."""
        mean = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        return torch.cat([mean, torch.full_like(mean, -torch.inf)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, H, W, C], uint8: the nearest of the 256 values, clamped to the ends."""
        pixels = (latents.to(torch.float32) + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def moments_to_latents(moments: Tensor, noise: Tensor, scale: float, shift: float) -> Tensor:
    """Draw latents from the posterior: ``(mean + exp(logvar / 2) * noise - shift) * scale``.

    The parameters and the draw are those of diffusers' DiagonalGaussianDistribution, shift and scale those of its VAE
    configs (0.18215 for Stable Diffusion's, as in the official EqM script). A log-variance of -inf gives the mean.

    Args:
        moments: [B, 2C, h, w], mean then log-variance.
        noise: [B, C, h, w], standard normal.
        scale: the manifest's ``latent_scale``.
        shift: the manifest's ``latent_shift``.

    Returns:
        Latents [B, C, h, w].
    """
    mean, log_variance = moments.chunk(2, dim=1)
    return (mean + torch.exp(0.5 * log_variance) * noise - shift) * scale
