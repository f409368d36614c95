"""A VAE with random weights, saved as diffusers saves the real ones."""

from pathlib import Path
from typing import Any

import torch

from eqm_dist.hidden import hidden

TINY: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}


def save_tiny_vae(folder: Path, *, seed: int = 0, **config: float) -> Path:
    """An AutoencoderKL of 3 channels that halves the sides twice, with 4 latent channels and random weights."""
    with hidden("torchvision"):
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**{**TINY, **config})
    vae.save_pretrained(folder)
    return folder
