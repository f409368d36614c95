"""Images <-> moments <-> latents."""

import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqm_dist.build import build_autoencoder
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.shards import write_shards
from eqm_dist.data.sources import LabelledImage
from eqm_dist.errors import DataError
from eqm_dist.models.autoencoder import IdentityAutoencoder, load_autoencoder, moments_to_latents
from tests.vae import save_tiny_vae


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


# --- diffusers' AutoencoderKL: random weights, the very path of the real ones ---


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae(tmp_path_factory.mktemp("vae") / "tiny")


def diffusers_vae(folder: Path) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval().requires_grad_(False)


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8))


def test_moments_are_the_parameters_of_diffusers_posterior(vae_folder: Path) -> None:
    autoencoder = load_autoencoder(str(vae_folder))
    pixels = IMAGES.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    with torch.no_grad():
        expected = diffusers_vae(vae_folder).encode(pixels).latent_dist.parameters
    moments = autoencoder.encode(IMAGES)
    assert moments.shape == (3, 8, 4, 6)
    assert expected.chunk(2, dim=1)[1].abs().max() < 20  # so the clamp to [-30, 20] changes nothing here
    assert torch.equal(moments, expected)


def test_latents_are_those_of_the_official_script(vae_folder: Path) -> None:
    """``vae.encode(x).latent_dist.sample().mul_(0.18215)``, x as torchvision's ToTensor and Normalize give it."""
    autoencoder = load_autoencoder(str(vae_folder))
    x = (IMAGES.permute(0, 3, 1, 2).to(torch.float32).div(255) - 0.5) / 0.5
    with torch.no_grad():
        expected = (
            diffusers_vae(vae_folder)
            .encode(x)
            .latent_dist.sample(torch.Generator().manual_seed(7))
            .mul_(autoencoder.latent_scale)
        )
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    latents = moments_to_latents(autoencoder.encode(IMAGES), noise, autoencoder.latent_scale, autoencoder.latent_shift)
    assert (autoencoder.latent_scale, autoencoder.latent_shift) == (0.18215, 0.0)
    # Pixels are scaled in another order of operations, an error of 2^-23 that the network carries on.
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


def test_decoding_rounds_as_the_official_script(vae_folder: Path) -> None:
    autoencoder = load_autoencoder(str(vae_folder))
    latents = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(1)) * 5
    with torch.no_grad():
        samples = diffusers_vae(vae_folder).decode(latents / 0.18215).sample
    expected = torch.clamp(127.5 * samples + 128.0, 0, 255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8)
    images = autoencoder.decode(latents)
    assert images.shape == (3, 16, 24, 3)
    assert torch.equal(images, expected)


def test_large_batches_are_encoded_in_parts_that_change_nothing(
    vae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoencoder = load_autoencoder(str(vae_folder))
    moments, images = autoencoder.encode(IMAGES), autoencoder.decode(torch.ones(3, 4, 4, 6))
    monkeypatch.setattr("eqm_dist.models.autoencoder.ENCODE_PIXELS", 1)
    # The order of sums may depend on the batch.
    torch.testing.assert_close(autoencoder.encode(IMAGES), moments, rtol=1e-4, atol=1e-5)
    assert (autoencoder.decode(torch.ones(3, 4, 4, 6)).int() - images.int()).abs().max() <= 1


def test_the_shift_of_newer_vaes_is_undone_by_decoding(tmp_path: Path) -> None:
    folder = save_tiny_vae(tmp_path / "shifted", scaling_factor=0.36, shift_factor=0.116)
    autoencoder = load_autoencoder(str(folder))
    assert (autoencoder.latent_scale, autoencoder.latent_shift) == (0.36, 0.116)
    unscaled = torch.randn(1, 4, 4, 4)
    latents = moments_to_latents(torch.cat([unscaled, torch.full_like(unscaled, -torch.inf)], 1), unscaled, 0.36, 0.116)
    with torch.no_grad():
        expected = (127.5 * diffusers_vae(folder).decode(unscaled).sample + 128).clamp(0, 255).to(torch.uint8)
    # A rounding of the latents may carry a pixel over a border between levels.
    assert (autoencoder.decode(latents).permute(0, 3, 1, 2).int() - expected.int()).abs().max() <= 1


def test_the_id_names_the_weights(vae_folder: Path, tmp_path: Path) -> None:
    autoencoder = load_autoencoder(str(vae_folder))
    copy, other = tmp_path / "a" / "tiny", tmp_path / "b" / "tiny"
    shutil.copytree(vae_folder, copy)
    save_tiny_vae(other, seed=1)
    assert autoencoder.id.startswith("tiny (sha256 ")
    assert load_autoencoder(str(copy)).id == autoencoder.id
    assert load_autoencoder(str(other)).id != autoencoder.id
    with pytest.raises(DataError, match="The moments were made with the autoencoder tiny"):
        load_autoencoder(str(other), autoencoder.id)
    again = pickle.loads(pickle.dumps(autoencoder))
    assert torch.equal(again.encode(IMAGES), autoencoder.encode(IMAGES))


def test_a_hub_id_is_recorded_with_its_revision(vae_folder: Path, tmp_path: Path) -> None:
    """From a cache laid out as the hub's client lays it out, with the network off."""
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--someone--some-vae"
    shutil.copytree(vae_folder, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    program = (
        "from eqm_dist.models.autoencoder import load_autoencoder\n"
        "first = load_autoencoder('someone/some-vae')\n"
        "print(first.id, first.location, load_autoencoder(first.location, first.id).latent_scale)\n"
        "load_autoencoder('someone/other-vae')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    pinned = f"someone/some-vae@{commit}"
    assert done.stdout == f"{pinned} {pinned} 0.18215\n", done.stderr
    assert "someone/other-vae is no local folder, and the hub does not give it" in done.stderr


def test_what_is_no_autoencoder_is_refused(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="but /no/such/folder is neither"):
        load_autoencoder("/no/such/folder")
    with pytest.raises(DataError, match=r"must hold .* but config.json is missing"):
        load_autoencoder(str(tmp_path))
    shutil.copytree(vae_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "pickled" / "model.bin")
    with pytest.raises(DataError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        load_autoencoder(str(tmp_path / "pickled"))
    shutil.copytree(vae_folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    with pytest.raises(DataError, match="must hold a diffusers AutoencoderKL"):
        load_autoencoder(str(tmp_path / "damaged"))
    for images in (IMAGES[:, :15], IMAGES[..., :1]):
        with pytest.raises(DataError, match="takes images of 3 channels with sides that are multiples of 4"):
            load_autoencoder(str(vae_folder)).encode(images)


def test_shards_of_a_vae_decode_again_until_its_folder_is_gone(tmp_path: Path) -> None:
    folder = save_tiny_vae(tmp_path / "tiny")
    autoencoder = load_autoencoder(str(folder))
    write_shards(tmp_path / "x", "x", Noise(), autoencoder, samples_per_shard=4, dtype="float32", mirror=True)
    reader = ShardReader(tmp_path / "x")
    moments, _ = reader.read(np.arange(6))
    images = torch.from_numpy(np.stack([sample.image for sample in Noise().read(0, 6)]))
    for view, expected in enumerate((images, images.flip(2))):  # the mirror is encoded after the flip
        parts = torch.cat([autoencoder.encode(expected[:4]), autoencoder.encode(expected[4:])])
        assert torch.equal(moments[:, view], parts)
    latents = moments_to_latents(moments[:, 0], torch.zeros(6, 4, 4, 4), 0.18215, 0.0)
    assert torch.equal(build_autoencoder(reader.manifest).decode(latents), autoencoder.decode(latents))
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"but {folder} is neither; restore the folder"):
        build_autoencoder(reader.manifest)


class Noise:
    """Six images of random pixels [16, 16, 3]."""

    id, num_classes = "noise", 1

    def __len__(self) -> int:
        return 6

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        for index in range(start, stop):
            image = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            yield LabelledImage(f"{index}", image, 0)
