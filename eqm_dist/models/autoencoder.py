"""Images <-> moments <-> latents.

images   [B, H, W, C] uint8   what people look at
  | encode
moments  [B, 2C', h, w]       mean, then log-variance, of the posterior over latents: what shards hold
  | moments_to_latents
latents  [B, C', h, w]        what the model sees, near unit scale
  | decode
images   [B, H, W, C] uint8
"""

import hashlib
import math
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.hidden import hidden
from eqm_dist.precision import products
from eqm_dist.storage.location import local_path

ENCODE_PIXELS = 32 * 256 * 256
"""Pixels encoded or decoded at once: the widest activations of Stable Diffusion's VAE take 0.5 KiB for each in bf16."""

_MOST_CONFIG_BYTES, _MOST_PARTS, _MOST_SIZE = 1 << 20, 32, 1 << 16
"""Bounds of a VAE's config, far above those of any that there is."""
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


class Autoencoder(Protocol):
    """Both directions between images and latents, with the numbers that bring latents near unit scale."""

    id: str
    """Names the weights; written to the manifest, so that shards and decoder can be matched."""
    location: str | None
    """Where the weights are, as ``load_autoencoder`` takes it; None where there are none."""
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
    location: str | None = None
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


class KLAutoencoder:
    """diffusers' AutoencoderKL, the VAE of Stable Diffusion. It decodes in fp32, and encodes in bf16 on a GPU.

    Pickles as its location and is loaded anew from there: each process must reach it.

    Args:
        vae: a diffusers AutoencoderKL.
        id: names the weights.
        location: where they are.
    """

    def __init__(self, vae: Any, id: str, location: str) -> None:
        self._vae = vae.eval().requires_grad_(False)
        self.id = id
        self.location: str | None = location
        self.latent_channels = int(vae.config.latent_channels)
        self.latent_scale = float(vae.config.scaling_factor)
        self.latent_shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_autoencoder, (self.location, self.id)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, H, W, C], uint8 -> moments [B, 2C', h, w], float32, as diffusers' posterior has them.

        The log-variance is clamped to [-30, 20], as diffusers does before it draws.

        Raises:
            DataError: the images do not fit the network.
        """
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        _, height, width, channels = images.shape
        if channels != self._vae.config.in_channels or height % factor or width % factor:
            raise DataError(
                f"The autoencoder {self.id} takes images of {self._vae.config.in_channels} channels with sides that "
                f"are multiples of {factor}, received {height}x{width}x{channels}; change --resolution or --channels."
            )
        vae = self._vae.to(images.device)
        moments = []
        for part in images.split(max(1, ENCODE_PIXELS // (height * width))):
            pixels = part.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
            with products("fp32"), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
                posterior = vae.encode(pixels).latent_dist
            moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float())
        return torch.cat(moments)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C', h, w] -> images [B, 8h, 8w, C], uint8: ``clamp(127.5 * x + 128, 0, 255)``, truncated.

        The rounding is that of the official sampling script (sample_ddp.py), and fp32 on every device.
        """
        vae = self._vae.to(latents.device)
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        unscaled = latents.to(torch.float32) / self.latent_scale + self.latent_shift
        size = max(1, ENCODE_PIXELS // (unscaled[0, 0].numel() * factor**2))
        with products("fp32"):
            pixels = torch.cat([vae.decode(part).sample for part in unscaled.split(size)])
        return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def load_autoencoder(location: str | None, expected_id: str | None = None) -> Autoencoder:
    """The autoencoder of that location.

    Args:
        location: None for the identity; a folder that diffusers' ``save_pretrained`` wrote (config.json and
            diffusion_pytorch_model.safetensors); or a hub id, ``stabilityai/sd-vae-ft-ema`` or with ``@REVISION``.
        expected_id: the manifest's ``autoencoder``.

    Raises:
        ConfigError: diffusers is not installed.
        DataError: there is no such autoencoder, or it is not the expected one.
    """
    if location is None:
        autoencoder: Autoencoder = IdentityAutoencoder()
    elif (folder := _folder(location)) is not None:
        autoencoder = KLAutoencoder(_read_vae(folder), f"{folder.name} (sha256 {_sha256(folder)[:16]})", str(folder))
    elif match := _HUB_ID.fullmatch(location):
        folder = _download(match[1], match[2])
        id = f"{match[1]}@{folder.name}"  # a snapshot's folder is named after its commit
        autoencoder = KLAutoencoder(_read_vae(folder), id, id)
    else:
        raise DataError(
            f"An autoencoder must be a folder with {_CONFIG} and {_WEIGHTS}, or a hub id like "
            f"stabilityai/sd-vae-ft-ema, but {location} is neither; restore the folder or correct the name."
        )
    if expected_id not in (None, autoencoder.id):
        raise DataError(
            f"The moments were made with the autoencoder {expected_id}, but {location} holds {autoencoder.id}; "
            "restore the one that made them."
        )
    return autoencoder


def _folder(location: str) -> Path | None:
    folder = local_path(location)
    return folder if folder.is_dir() else None


_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")


def is_hub_id(location: str | None) -> bool:
    """Whether a location is the hub's, or that of the identity, and no folder of this machine."""
    return location is None or (_HUB_ID.fullmatch(location) is not None and not Path(location).exists())


def _read_vae(folder: Path) -> Any:
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(
                f"The autoencoder {folder} must hold {_CONFIG} and {_WEIGHTS} as diffusers writes them, but {name} is "
                "missing; correct --autoencoder."
            )
    try:
        with hidden("torchvision"):
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError as error:
        raise ConfigError(
            f"A VAE needs the package diffusers ({error}); install it with: pip install 'eqm-dist[vae]'."
        ) from error
    try:
        _check_sizes(folder, AutoencoderKL)
        return AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except Exception as error:  # whatever a folder of somebody's makes diffusers raise, it is the folder that is bad
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{folder} must hold a diffusers AutoencoderKL ({reason}); correct --autoencoder.") from error


def _check_sizes(folder: Path, kind: Any) -> None:
    """Refuse a config that describes a larger network than the weights beside it are, before it is made.

    Raises:
        ValueError: it does.
    """
    config = mapping_from_json(read_bounded(folder / _CONFIG, _MOST_CONFIG_BYTES))
    for name, value in config.items():
        parts = value if isinstance(value, list) else [value]
        if len(parts) > _MOST_PARTS or any(isinstance(part, int) and part > _MOST_SIZE for part in parts):
            raise ValueError(f"{name} is too large")
    if isinstance(layers := config.get("layers_per_block", 0), int) and layers > _MOST_PARTS:
        raise ValueError("layers_per_block is too large")
    with torch.device("meta"):
        named = sum(parameter.numel() for parameter in kind.from_config(config).parameters())
    with safe_open(folder / _WEIGHTS, framework="pt") as weights:
        held = sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    if named > held:
        raise ValueError(f"{_CONFIG} describes {named:,} parameters, and {_WEIGHTS} has {held:,}")


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256((folder / _CONFIG).read_bytes()) if (folder / _CONFIG).is_file() else hashlib.sha256()
    if (folder / _WEIGHTS).is_file():
        with open(folder / _WEIGHTS, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _download(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise ConfigError(
            f"A VAE from the hub needs the package diffusers ({error}); install it with: pip install 'eqm-dist[vae]'."
        ) from error
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{repository} is no local folder, and the hub does not give it ({reason}); correct the name, or download "
            "it where there is a network and give the folder."
        ) from error


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


def mean_latents(moments: Tensor, scale: float, shift: float) -> Tensor:
    """The latents [B, C, h, w] at the means of the posteriors, without a draw; see ``moments_to_latents``."""
    return moments_to_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]), scale, shift)
