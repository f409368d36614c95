"""Train a classifier whose features an FID compares.

python pipelines/train_classifier.py --shards DIR --out FILE     for your own small images
python pipelines/train_classifier.py --out FILE                  the one of the digits, as packaged

Give FILE to training as --evaluation.extractor. A fifth of the images is held out (of the 1,797 digits, 360). The
digits take half a minute on one core. Prints the accuracies and the sha256, which the package checks for its own.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.errors import DataError

STEPS = 1650
FEWEST_IMAGES = 160


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    parser.add_argument("--shards", metavar="DIR", help="data set of images (default: the embedded digits)")
    parser.add_argument("--out", metavar="FILE", required=True, help="file for the weights, as safetensors")
    parser.add_argument(
        "--steps", type=cli.count, default=STEPS, metavar="N", help="smallest number of updates (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)

    # After parsing, for these import torch and --help must answer at once.
    import hashlib
    from pathlib import Path

    import torch

    from eqm_dist.evaluate.features import save_classifier
    from eqm_dist.evaluate.train_classifier import accuracy, digits, images_of, train
    from eqm_dist.storage.files import atomic_write, make_writable

    path = Path(options.out).absolute()
    if path.is_dir():
        raise DataError(f"--out must be a file, got the directory {options.out}; correct it.")
    make_writable(path.parent)  # now, and not when the weights are there
    torch.set_num_threads(1)  # one thread: the same sums in the same order, hence the same weights
    images, labels = images_of(options.shards) if options.shards else digits()
    if len(images) < FEWEST_IMAGES:
        raise DataError(f"A classifier needs at least {FEWEST_IMAGES} images, got {len(images)}; bring more.")
    held_out = -(-len(images) // 5)
    classifier = train(images[:-held_out], labels[:-held_out], int(labels.max()) + 1, options.steps)
    content = save_classifier(classifier)
    atomic_write(path, content)
    for name, part in (("training", slice(None, -held_out)), ("held-out", slice(-held_out, None))):
        print(f"accuracy on the {name} images {accuracy(classifier, images[part], labels[part]):.4f}")
    print(f"{path}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


def start() -> NoReturn:
    """Run the command as a program."""
    cli.run(main)
