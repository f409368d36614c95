"""What features are taken from: the extractors by their names, and the contract of one's own.

An extractor is a ``torch.nn.Module`` with an integer ``num_features`` that maps images (uint8 ``[B, H, W, C]``) to
features (``[B, num_features]``). It may also have

- ``spatial(images)`` -> ``[B, S]``: features that keep places, for the sFID;
- ``logits(images)`` -> ``[B, K]``: class scores, for the inception score;
- ``outputs(images, wanted)`` -> mapping of "features", "spatial" and "logits" to tensors: several in one pass;
- ``image_shape``: the (H, W, C) that it takes, if it takes no other;
- ``id``: a string that changes when its features do. Without one, statistics made with it are never cached.

"module:factory" names a callable without arguments in an importable module that returns such a module.
"""

import hashlib
import importlib
import os
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.features import load_classifier, load_digit_classifier
from eqm_dist.storage.files import storage_errors
from eqm_dist.storage.location import local_path

INCEPTION = "inception"
DINOV2 = {"dinov2-vit-s-14": 384, "dinov2-vit-b-14": 768, "dinov2-vit-l-14": 1024, "dinov2-vit-g-14": 1536}
"""torch-fidelity's names, and their numbers of features."""
EXTRACTORS = ("digits", INCEPTION, *DINOV2, "a file of pipelines/train_classifier.py", "module:factory")
"""What ``load_extractor`` takes."""


def load_extractor(name: str, weights: str | None = None) -> nn.Module:
    """An extractor, frozen and in evaluation mode.

    Args:
        name: of ``EXTRACTORS``.
        weights: file with the weights of inception; default: where torch-fidelity keeps them, downloaded at first use.

    Raises:
        ConfigError: no such extractor, or what it needs is not installed.
        DataError: its weights are missing or damaged.
    """
    if weights is not None and name != INCEPTION:
        raise ConfigError(f"Weights can be given for the extractor inception, received some for {name}; drop them.")
    if name == "digits":
        extractor: nn.Module = load_digit_classifier()
    elif name == INCEPTION:
        extractor = Inception(_inception_weights(weights))
    elif name in DINOV2:
        extractor = Dino(name)
    elif is_file_name(name):
        extractor = load_classifier(name)
    else:
        extractor = _of_factory(name)
    return extractor.eval().requires_grad_(False)


def is_file_name(name: str) -> bool:
    """Whether an extractor's name is that of a file, and so depends on the directory that it is read in."""
    return name not in ("digits", INCEPTION, *DINOV2) and ":" not in name


class Inception(nn.Module):
    """The Inception v3 of the published FIDs, as torch-fidelity ports it from TensorFlow.

    Its sFID is ADM's: the first 7 channels of TensorFlow's ``mixed_6/conv``, which is ``Mixed_6d.branch1x1`` here, all
    17x17 places as one vector (Nash et al., arXiv 2103.03841; guided-diffusion's evaluator). Its class scores are those
    without the bias, as in every published inception score.

    Args:
        weights: file of the state dict, as torch-fidelity publishes it.

    Raises:
        ConfigError: torch-fidelity is not installed, or does not import.
        DataError: another kind of file.
    """

    num_features = 2048
    adm_statistics = True
    """Published statistics (mu and sigma in an .npz) are of its features."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        module = _torch_fidelity("feature_extractor_inceptionv3")
        with storage_errors("read", weights):
            digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            # The class would read the file itself, and execute what is in it.
            with patch.object(module, "load_state_dict_from_url", lambda *_, **__: state):
                self.network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        except Exception as error:  # whatever a damaged file makes torch raise, it is the file that is bad
            raise DataError(
                f"{weights} must hold the weights of torch-fidelity's Inception ({_line(error)}); fetch"
                f" {module.URL_INCEPTION_V3} again."
            ) from error
        self.id = f"inception (torch-fidelity {version('torch-fidelity')}, weights {digest[:16]})"

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 2048]`` of images, uint8 ``[B, H, W, 3]`` or ``[B, H, W, 1]``."""
        return self.outputs(images, {"features"})["features"]

    def outputs(self, images: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Features ``[B, 2048]``, spatial features ``[B, 2023]`` and class scores ``[B, 1008]`` in one pass."""
        found: list[Tensor] = []
        branch = self.network.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(lambda _module, _inputs, output: found.append(output[:, :7].flatten(1)))
        try:
            features, logits = self.network(_rgb(images))
        finally:
            hook.remove()
        return {"features": features, "spatial": found[0], "logits": logits}


class Dino(nn.Module):
    """DINOv2 as torch-fidelity runs it, for the FD-DINOv2 (Stein et al., arXiv 2306.04675).

    Its code and weights come from torch.hub: the repository facebookresearch/dinov2 is executed.

    Args:
        name: of ``DINOV2``.

    Raises:
        ConfigError: torch-fidelity is not installed, or does not import.
        DataError: the hub cannot be reached, and has not been before.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        module = _torch_fidelity("feature_extractor_dinov2")
        model = module.MODEL_METADATA[name]
        try:
            self.network = module.FeatureExtractorDinoV2(name, ["dinov2"])
        except Exception as error:  # torch.hub lets through whatever the network and the repository raise
            hub = torch.hub.get_dir()
            raise DataError(
                f"{name} needs its code and weights ({_line(error)}); where there is a network, fetch and unpack"
                f" https://github.com/facebookresearch/dinov2/archive/main.zip as {hub}/facebookresearch_dinov2_main,"
                f" and put https://dl.fbaipublicfiles.com/dinov2/{model}/{model}_pretrain.pth into {hub}/checkpoints."
            ) from error
        self.num_features = DINOV2[name]
        self.id = f"{name} (torch-fidelity {version('torch-fidelity')}, weights {_digest(self)[:16]})"

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, num_features]`` of images, uint8 ``[B, H, W, 3]`` or ``[B, H, W, 1]``."""
        return self.network(_rgb(images))[0]


def _inception_weights(path: str | None) -> Path:
    """The file of the weights; fetched where there is none and none is named."""
    url: str = _torch_fidelity("feature_extractor_inceptionv3").URL_INCEPTION_V3
    name = url.rpartition("/")[2]
    if path is not None:
        file = local_path(path)
        if not file.is_file():
            raise DataError(f"The weights of inception must be a file, and {file} is none; fetch {url} to there.")
        return file
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not file.exists():
        with storage_errors("create", file.parent):
            os.makedirs(file.parent, exist_ok=True)
        try:
            hash_prefix = name.removesuffix(".pth").rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(file), hash_prefix=hash_prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"The weights of inception cannot be fetched ({_line(error)}); where there is a network, fetch {url}"
                f" and put it at {file}, or name it with --extractor-weights."
            ) from error
    return file


def _torch_fidelity(module: str) -> Any:
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises a RuntimeError
        raise ConfigError(
            f"Inception and DINOv2 need torch-fidelity and the torchvision that belongs to torch ({_line(error)});"
            " install both with: pip install 'eqm-dist[inception]', from the index that torch came from."
        ) from error


def _of_factory(name: str) -> nn.Module:
    module, _, factory = name.partition(":")
    try:
        extractor = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # the user's code: whatever it raises is to be mended there
        raise ConfigError(
            f"An extractor module:factory must name what can be imported and called, and {name} fails with"
            f" {type(error).__name__}: {_line(error)}; correct it, or set PYTHONPATH to where the module lies."
        ) from error
    if not isinstance(extractor, nn.Module) or not isinstance(getattr(extractor, "num_features", None), int):
        raise ConfigError(
            f"An extractor must be a torch.nn.Module with an integer num_features, and {name} made"
            f" {type(extractor).__name__}; see eqm_dist/evaluate/extractors.py for the contract."
        )
    if isinstance(own := getattr(extractor, "id", None), str):
        extractor.id = f"{name} ({own}, weights {_digest(extractor)[:16]})"  # pyright: ignore[reportArgumentType]
    return extractor


def _rgb(images: Tensor) -> Tensor:
    """Images [B, H, W, C] uint8 as [B, 3, H, W]; grey ones as grey colours."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        received = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise DataError(f"Inception and DINOv2 take uint8 images of shape [B, H, W, 1 or 3], got {received}.")
    return images.expand(-1, -1, -1, 3).permute(0, 3, 1, 2)


def _digest(module: nn.Module) -> str:
    """sha256 of the weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {list(content.shape)}\n".encode())
        digest.update(content.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
