"""Images <-> moments <-> latents."""

import math

import numpy as np
import pytest
import torch

from eqm_dist.models.autoencoder import IdentityAutoencoder, moments_to_latents


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_identity_round_trip_is_exact_for_every_pixel_value(stored: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 8, 8, 2)
    autoencoder = IdentityAutoencoder()
    moments = autoencoder.encode(images).to(stored).to(torch.float32)
    latents = moments_to_latents(moments, torch.randn(2, 2, 8, 8), autoencoder.latent_scale, autoencoder.latent_shift)
    assert torch.equal(autoencoder.decode(latents), images)


def test_identity_encodes_pixels_to_the_unit_range_channels_first() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    mean, log_variance = IdentityAutoencoder().encode(images).chunk(2, dim=1)
    # 51 / 127.5 - 1 = -0.6; float32 holds it to 2^-24.
    torch.testing.assert_close(mean, torch.tensor([-1.0, -0.6, 1.0]).reshape(1, 3, 1, 1), rtol=0, atol=2**-23)
    assert torch.equal(log_variance, torch.full((1, 3, 1, 1), -torch.inf))


def test_identity_decodes_to_the_nearest_pixel_and_clamps() -> None:
    values = [-7.0, -1.0, (100.4 / 127.5) - 1, (100.6 / 127.5) - 1, 1.0, 1.5]
    latents = torch.tensor(values).reshape(1, 1, 1, 6)
    assert IdentityAutoencoder().decode(latents).flatten().tolist() == [0, 0, 100, 101, 255, 255]


def test_latents_follow_the_posterior_formula() -> None:
    mean, log_variance, noise = np.random.default_rng(0).normal(size=(3, 2, 4, 3, 3))
    moments = torch.from_numpy(np.concatenate([mean, log_variance], axis=1))
    latents = moments_to_latents(moments, torch.from_numpy(noise), scale=0.18215, shift=0.1)
    for place in np.ndindex(latents.shape):
        std = math.sqrt(math.exp(log_variance[place]))
        # Float64 on both sides; only the order of a few roundings differs.
        assert float(latents[place]) == pytest.approx((mean[place] + std * noise[place] - 0.1) * 0.18215, rel=1e-12)


def test_a_point_posterior_ignores_the_noise() -> None:
    mean = torch.randn(3, 2, 4, 4)
    moments = torch.cat([mean, torch.full_like(mean, -torch.inf)], dim=1)
    assert torch.equal(moments_to_latents(moments, 1e6 * torch.randn_like(mean), 1.0, 0.0), mean)
