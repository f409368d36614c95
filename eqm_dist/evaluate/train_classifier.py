"""Training of the classifiers whose features an FID compares (``pipelines/train_classifier.py``).

The images are shuffled with a fixed seed; every image is slightly turned, scaled and moved anew in each epoch.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eqm_dist.data.loader import ShardReader
from eqm_dist.data.sources import Digits
from eqm_dist.errors import DataError
from eqm_dist.evaluate.features import ImageClassifier
from eqm_dist.models.autoencoder import IdentityAutoencoder

SEED = 0
BATCH = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05


def digits() -> tuple[Tensor, Tensor]:
    """All images, uint8 ``[1797, 8, 8, 1]``, and labels, int64 ``[1797]``, in a fixed random order."""
    source = Digits()
    samples = list(source.read(0, len(source)))
    images = torch.stack([torch.from_numpy(sample.image) for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    return _shuffled(images, labels)


def images_of(directory: str) -> tuple[Tensor, Tensor]:
    """All images of a data set of pixels, uint8 ``[N, H, W, C]``, and labels, int64 ``[N]``, in a fixed random order.

    Raises:
        DataError: there is no such data set, or it holds latents of an autoencoder.
    """
    reader = ShardReader(directory)
    if reader.manifest.autoencoder != IdentityAutoencoder.id:
        raise DataError(
            f"A classifier is trained on pixels, and {directory} holds latents of {reader.manifest.autoencoder};"
            " prepare the images with --autoencoder identity too."
        )
    moments, labels = reader.read(np.arange(reader.manifest.num_samples))
    images = IdentityAutoencoder().decode(moments[:, 0].float().chunk(2, dim=1)[0])
    return _shuffled(images, labels)


def _shuffled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    return images[order], labels[order]


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images, each turned by up to 8 degrees, scaled by up to 8 % and moved by up to half a pixel."""

    def uniform(bound: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * bound

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.08)
    _, height, width, channels = images.shape
    shift_x, shift_y = uniform(1 / width), uniform(1 / height)  # affine_grid spans the image by [-1, 1]
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    transforms = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transforms, [len(images), channels, height, width], align_corners=False)
    moved = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8).permute(0, 2, 3, 1)


def train(images: Tensor, labels: Tensor, num_classes: int, steps: int) -> ImageClassifier:
    """A classifier trained on ``images`` from a fixed seed, for at least so many steps."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classifier = ImageClassifier(tuple(images.shape[1:]), num_classes)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches_per_epoch = len(images) // BATCH
    epochs = math.ceil(steps / batches_per_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches_per_epoch)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)[: batches_per_epoch * BATCH]
        for batch in order.split(BATCH):
            logits = classifier.logits(jitter(images[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(classifier: ImageClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images that the classifier names correctly."""
    named = torch.cat([classifier.logits(batch).argmax(1) for batch in images.split(1024)])
    return (named == labels).double().mean().item()
