"""Features of images, for the distances of ``metrics``.

An extractor is any ``torch.nn.Module`` with an integer ``num_features`` that maps images (uint8 ``[B, H, W, C]``) to
features (``[B, num_features]``). The one that ships is a classifier of 8x8 handwritten digits.
"""

import hashlib
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from eqm_dist.errors import DataError

WEIGHTS_FILE = "digit_classifier.safetensors"
WEIGHTS_SHA256 = "246524ab6c66c5c886ffa33b35bdd05ee9f3dca99fa16e3198190249454bf904"


class DigitClassifier(nn.Module):
    """Small convolutional classifier of 8x8 grey digits; its features are the penultimate layer.

    The features are taken before the activation, so they are smooth, unbounded and do not saturate; there are few
    enough of them that the covariance of 898 images, half of the digits, has full rank with room to spare.
    """

    num_features = 48
    num_classes = 10
    image_shape = (8, 8, 1)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, self.num_features)
        self.head = nn.Linear(self.num_features, self.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Features ``[B, 48]`` of images, uint8 ``[B, 8, 8, 1]``.

        Raises:
            DataError: images of another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            received = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            raise DataError(
                f"The digit classifier takes uint8 images of shape [B, 8, 8, 1], got {received};"
                " use an extractor made for these images."
            )
        x = images.permute(0, 3, 1, 2).to(self.conv1.weight.dtype) / 127.5 - 1
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))
        x = F.gelu(self.conv3(x))
        return self.hidden(x.flatten(1))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores ``[B, 10]`` of images, uint8 ``[B, 8, 8, 1]``."""
        return self.head(F.gelu(self(images)))


def load_digit_classifier() -> DigitClassifier:
    """The packaged classifier, frozen and in evaluation mode.

    Trained by ``python -m eqm_dist.evaluate.train_digit_classifier`` on 1,437 of scikit-learn's 1,797 digits; it
    names 359 of the 360 held-out ones correctly.

    Raises:
        DataError: the packaged weights are damaged.
    """
    return _classifier((resources.files("eqm_dist.evaluate") / WEIGHTS_FILE).read_bytes())


def _classifier(content: bytes) -> DigitClassifier:
    found = hashlib.sha256(content).hexdigest()
    if found != WEIGHTS_SHA256:
        raise DataError(
            f"The packaged {WEIGHTS_FILE} must have sha256 {WEIGHTS_SHA256}, got {found}; install eqm-dist again."
        )
    classifier = DigitClassifier()
    classifier.load_state_dict(load(content))
    return classifier.eval().requires_grad_(False)
