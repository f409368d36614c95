"""Features from a small classifier: the one of 8x8 handwritten digits that ships, or one of other images.

One extractor among others (``extractors``), for images that Inception was not made for.
"""

import hashlib
import json
from importlib import resources

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from eqm_dist.documents import from_json, mapping_from_json, read_bounded
from eqm_dist.errors import DataError
from eqm_dist.storage.location import local_path

WEIGHTS_FILE = "digit_classifier.safetensors"
WEIGHTS_SHA256 = "92201c7a43287786de50e73b64c899b40b14896d48672bee6d2163ce64071127"


class ImageClassifier(nn.Module):
    """Small convolutional classifier of small images; its features are the penultimate layer.

    The features are taken before the activation, so they are smooth, unbounded and do not saturate; there are few
    enough of them that the covariance of 898 images, half of the digits, has full rank with room to spare.

    Args:
        image_shape: height, width and channels.
        num_classes: number of classes.
    """

    num_features = 48
    id: str | None = None
    """Names the weights, once they are those of a file."""

    def __init__(self, image_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.num_classes = num_classes
        height, width, channels = image_shape
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * ((height + 1) // 2) * ((width + 1) // 2), self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 48]`` of images, uint8 ``[B, H, W, C]``.

        Raises:
            DataError: images of another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            received = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise DataError(
                f"The classifier takes uint8 images of shape [B, {', '.join(map(str, self.image_shape))}], got"
                f" {received}; train one for these images with `python pipelines/train_classifier.py --shards"
                " DIR --out FILE` and give it as evaluation.extractor, or set evaluation.every=0."
            )
        x = images.permute(0, 3, 1, 2).to(self.conv1.weight.dtype) / 127.5 - 1
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        x = F.gelu(self.conv3(x))
        return self.hidden(x.flatten(1))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores ``[B, num_classes]`` of images, uint8 ``[B, H, W, C]``."""
        return self.head(F.gelu(self(images)))


def load_digit_classifier() -> ImageClassifier:
    """The packaged classifier of the digits, frozen and in evaluation mode.

    Trained by ``python pipelines/train_classifier.py`` on 1,437 of scikit-learn's 1,797 digits; it names 359 of
    the 360 held-out ones correctly.

    Raises:
        DataError: the packaged weights are damaged.
    """
    return _packaged((resources.files("eqm_dist.evaluate") / WEIGHTS_FILE).read_bytes())


def load_classifier(path: str) -> ImageClassifier:
    """A classifier that ``train_classifier`` wrote, frozen and in evaluation mode.

    Raises:
        DataError: no such file, or another kind of file.
    """
    try:
        return _classifier(read_bounded(local_path(path)))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(
            "An extractor must be digits, inception, dinov2-vit-l-14 (or s, b, g), module:factory or a file of `python"
            f" pipelines/train_classifier.py`, and {path} cannot be read as one"
            f" ({' '.join(str(error).split())[:200]}); write it, or correct the path."
        ) from error


def save_classifier(classifier: ImageClassifier) -> bytes:
    """The safetensors file that ``load_classifier`` reads."""
    metadata = {"image_shape": json.dumps(classifier.image_shape), "num_classes": str(classifier.num_classes)}
    return save(classifier.state_dict(), metadata)


def _packaged(content: bytes) -> ImageClassifier:
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise DataError(
            f"The packaged {WEIGHTS_FILE} must have sha256 {WEIGHTS_SHA256}, got {found}; install eqm-dist again."
        )
    return _classifier(content)


def _classifier(content: bytes) -> ImageClassifier:
    # A safetensors file begins with the length of its header; load() leaves the metadata in there.
    header = mapping_from_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata, weights = header["__metadata__"], load(content)
    with torch.device("meta"):  # nothing is allocated for what the file only claims
        classifier = ImageClassifier(tuple(from_json(metadata["image_shape"])), int(metadata["num_classes"]))
    classifier.load_state_dict(weights, assign=True)
    classifier.id = f"classifier (weights {hashlib.sha256(content).hexdigest()[:16]})"
    return classifier.eval().requires_grad_(False)
