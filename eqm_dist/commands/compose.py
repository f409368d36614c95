"""Draw images of several classes at once, by descending the weighted sum of their fields; see how that looks.

python pipelines/compose.py --labels 3,8                       the newest run in runs/, into compose/NAME-stepN
python pipelines/compose.py --model runs/mine --labels 207,360 --weights 0.6,0.4
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.documents import to_json
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_model_flags(parser, "evaluation.extractor")
    parser.add_argument(
        "--out", metavar="DIR", help="directory for the picture and the record (default: compose/NAME-stepN)"
    )
    parser.add_argument(
        "--labels", default="3,8", metavar="LIST", help="the classes that are composed (default: %(default)s)"
    )
    parser.add_argument("--weights", metavar="LIST", help="weights of their fields (default: equal, 1 in all)")
    parser.add_argument(
        "--samples", type=cli.count, default=200, metavar="N", help="number of images (default: %(default)s)"
    )
    cli.add_work_flags(parser, batch=256, seeds="the noise")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    labels = [int(value) for value in _numbers("--labels", options.labels)]
    weights = _numbers("--weights", options.weights) if options.weights else [1 / len(labels)] * len(labels)
    if len(labels) != len(weights):
        raise ConfigError(f"Every condition needs one weight, got {len(labels)} labels and {len(weights)} weights.")

    import torch

    from eqm_dist.build import load_extractor
    from eqm_dist.evaluate.features import ImageClassifier
    from eqm_dist.evaluate.grid import sample_grid
    from eqm_dist.pretrained import load
    from eqm_dist.provenance import provenance
    from eqm_dist.storage.files import atomic_write, make_writable, storage_errors
    from eqm_dist.tasks.compose import composed, share_of_both

    model = load(options.model, **cli.model_arguments(options))
    _check_labels(labels, model.config.data.num_classes)
    model.require_pictures()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = load_extractor(*model.extractor("--evaluation.extractor")).to(device)
    model.model  # noqa: B018 (whatever is wrong with it is said before anything is made)
    out = Path(options.out or f"compose/{model.name}")
    make_writable(out)
    together = composed(model.field(device), labels, weights)
    indices = torch.arange(options.samples)
    rows = []
    for field, label in [*((None, label) for label in labels), (together, labels[0])]:
        asked = torch.full_like(indices, label)
        rows.append(model.generate(indices, asked, options.seed, options.batch, device, field=field).images)

    columns = min(12, options.samples)
    names = [*(model.class_names[label] if model.class_names else str(label) for label in labels), "together"]
    picture = sample_grid(
        torch.cat([row[:columns] for row in rows]), torch.arange(len(rows)).repeat_interleave(columns), columns, names
    )
    with storage_errors("write", out):
        picture.save(out / "composed.png")
    record = {"model": model.source, "labels": labels, "weights": weights, "seed": options.seed, **provenance()}
    if isinstance(extractor, ImageClassifier):
        with torch.no_grad():
            shares = [share_of_both(extractor.logits(row), labels) for row in rows]
        record["both_named"] = dict(zip(names, shares, strict=True))
        print(f"the classifier's likeliest {len(labels)} classes are the conditions:")
        print("\n".join(f"  {name:<10} {share:6.1%}" for name, share in zip(names, shares, strict=True)))
    atomic_write(out / "compose.json", (to_json(record, 1) + "\n").encode())
    print(f"{out / 'composed.png'}\n{out / 'compose.json'}")


def _numbers(flag: str, text: str) -> list[float]:
    try:
        found = [float(part) if flag == "--weights" else cli.seed(part.strip()) for part in text.split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise ConfigError(f"{flag} must be numbers like 3,8, got {text[:100]}; correct it.") from None
    return found


def _check_labels(labels: Sequence[int], classes: int) -> None:
    """Whether all labels are classes, and each another one. The null label is none: it has no share in a picture."""
    for label in labels:
        if label >= classes:
            raise ConfigError(f"--labels must be classes from 0 to {classes - 1}, got {label}; correct it.")
    if len(set(labels)) < len(labels):
        raise ConfigError(f"--labels must differ from each other, got {labels}; drop the repeats.")


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
