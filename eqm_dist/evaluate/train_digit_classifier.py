"""Train the packaged digit classifier: ``python -m eqm_dist.evaluate.train_digit_classifier [FILE]``.

Data: scikit-learn's 1,797 digits, shuffled with a fixed seed; the first 1,437 train, the last 360 are held out.
Every image is slightly turned, scaled and moved anew in each epoch. About half a minute on one core. Writes the
weights to FILE (default: into the package) and prints the accuracies and the sha256 that ``features`` checks.
"""

import hashlib
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from eqm_dist.data.sources import Digits
from eqm_dist.evaluate.features import WEIGHTS_FILE, DigitClassifier

SEED = 0
HELD_OUT = 360
EPOCHS = 150
BATCH = 128
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05


def digits() -> tuple[Tensor, Tensor]:
    """All images, uint8 ``[1797, 8, 8, 1]``, and labels, int64 ``[1797]``, in a fixed random order."""
    source = Digits()
    samples = list(source.read(0, len(source)))
    images = torch.stack([torch.from_numpy(sample.image) for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    return images[order], labels[order]


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images, each turned by up to 8 degrees, scaled by up to 8 % and moved by up to half a pixel."""

    def uniform(bound: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * bound

    angle, scale = uniform(math.radians(8)), 1 + uniform(0.08)
    shift_x, shift_y = uniform(0.5 / 4), uniform(0.5 / 4)  # affine_grid spans 8 pixels by [-1, 1]
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    transforms = torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(transforms, [len(images), 1, 8, 8], align_corners=False)
    moved = F.grid_sample(images.permute(0, 3, 1, 2).float(), grid, padding_mode="border", align_corners=False)
    return moved.round().to(torch.uint8).permute(0, 2, 3, 1)


def train(images: Tensor, labels: Tensor) -> DigitClassifier:
    """A classifier trained on ``images`` from a fixed seed."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches_per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=EPOCHS * batches_per_epoch)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)[: batches_per_epoch * BATCH]
        for batch in order.split(BATCH):
            logits = classifier.logits(jitter(images[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Fraction of images that the classifier names correctly."""
    return (classifier.logits(images).argmax(1) == labels).double().mean().item()


def main() -> None:
    torch.set_num_threads(1)  # one thread: the same sums in the same order, hence the same weights
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name(WEIGHTS_FILE)
    images, labels = digits()
    classifier = train(images[:-HELD_OUT], labels[:-HELD_OUT])
    content = save(classifier.state_dict())
    path.write_bytes(content)
    for name, part in (("training", slice(None, -HELD_OUT)), ("held-out", slice(-HELD_OUT, None))):
        print(f"accuracy on the {name} images {accuracy(classifier, images[part], labels[part]):.4f}")
    print(f"{path}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
