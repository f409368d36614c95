"""Draw images of several classes at once, by descending the weighted sum of their fields; see how that looks.

python pipelines/compose.py --labels 3,8                       the newest run in runs/, into compose/NAME-stepN
python pipelines/compose.py --model runs/mine --labels 207,360 --weights 0.6,0.4
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_model_flags(parser)
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

    import torch

    from eqm_dist.build import load_extractor
    from eqm_dist.evaluate.features import ImageClassifier
    from eqm_dist.evaluate.grid import sample_grid
    from eqm_dist.pretrained import load
    from eqm_dist.provenance import provenance
    from eqm_dist.storage.files import atomic_write, storage_errors
    from eqm_dist.tasks.compose import composed, share_of_both

    model = load(options.model, autoencoder=options.autoencoder, overrides=cli.model_overrides(options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    together = composed(model.field(device), labels, weights)
    indices = torch.arange(options.samples)
    rows = []
    for field, label in [*((None, label) for label in labels), (together, labels[0])]:
        asked = torch.full_like(indices, label)
        rows.append(model.generate(indices, asked, options.seed, options.batch, device, field=field).images)

    out, columns = Path(options.out or f"compose/{model.name}"), min(12, options.samples)
    names = [*(model.class_names[label] if model.class_names else str(label) for label in labels), "together"]
    picture = sample_grid(
        torch.cat([row[:columns] for row in rows]), torch.arange(len(rows)).repeat_interleave(columns), columns, names
    )
    with storage_errors("write", out):
        out.mkdir(parents=True, exist_ok=True)
        picture.save(out / "composed.png")
    record = {"model": model.source, "labels": labels, "weights": weights, "seed": options.seed, **provenance()}
    evaluation = model.config.evaluation
    extractor = load_extractor(evaluation.extractor, evaluation.extractor_weights).to(device)
    if isinstance(extractor, ImageClassifier):
        with torch.no_grad():
            shares = [share_of_both(extractor.logits(row), labels) for row in rows]
        record["both_named"] = dict(zip(names, shares, strict=True))
        print(f"the classifier's likeliest {len(labels)} classes are the conditions:")
        print("\n".join(f"  {name:<10} {share:6.1%}" for name, share in zip(names, shares, strict=True)))
    atomic_write(out / "compose.json", (json.dumps(record, indent=1) + "\n").encode())
    print(f"{out / 'composed.png'}\n{out / 'compose.json'}")


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) if flag == "--weights" else int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} must be numbers like 3,8, got {text}; correct it.") from None


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
