"""Tell images of another kind from those that a model knows, by field norm and, for EqM-E, by energy (AUROC).

python pipelines/ood.py                                        the newest run in runs/, against made-up images
python pipelines/ood.py --model runs/mine --against noise,inverted,constant,data/fashion,photos/

A foreign set is noise, inverted, constant, or any images of the model's size: shards, tars, an .npz, a folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.documents import to_json
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.logs import setup_logging

MADE_UP = "noise,inverted,constant"


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument(
        "--out", metavar="DIR", help="directory for the picture and the record (default: ood/NAME-stepN)"
    )
    parser.add_argument("--images", metavar="PATH", help="the known images (default: the model's training data)")
    parser.add_argument(
        "--against", default=MADE_UP, metavar="LIST", help="the foreign sets of images (default: %(default)s)"
    )
    parser.add_argument(
        "--label", type=cli.seed, metavar="N", help="class whose field is asked for (default: the null label)"
    )
    parser.add_argument(
        "--samples",
        type=cli.count,
        default=1000,
        metavar="N",
        help="number of images of each set (default: %(default)s)",
    )
    cli.add_work_flags(parser, batch=256, seeds="the made-up images")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)

    import torch

    from eqm_dist.core.energy import ExplicitEnergy
    from eqm_dist.evaluate.images import first_images
    from eqm_dist.pretrained import load
    from eqm_dist.provenance import provenance
    from eqm_dist.storage.files import atomic_write, make_writable, storage_errors
    from eqm_dist.tasks.ood import detect, detection_figure, field_norm, made_up_sets

    model = load(options.model, **cli.model_arguments(options))
    objective, classes = model.config.objective, model.config.data.num_classes
    if objective.kind == "flow_matching":
        raise ConfigError("Detection needs a field that is blind to time, which objective.kind=flow_matching is not.")
    label = classes if options.label is None else options.label
    if not 0 <= label <= classes:
        raise ConfigError(f"--label must be a class below {classes}, or {classes} for none, got {label}; correct it.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    location = options.images or model.training_data("--images")
    model.model  # noqa: B018 (whatever is wrong with it is said before anything is made)
    out = Path(options.out or f"ood/{model.name}")
    make_writable(out)
    known = first_images(location, options.samples)
    made_up, foreign = made_up_sets(known, options.seed), {}
    for name in options.against.split(","):
        foreign[name] = made_up[name] if name in made_up else first_images(name, options.samples, known.shape[3])
        if foreign[name].shape[1:] != known.shape[1:]:
            raise DataError(
                f"Images must have one size, and those of {location} have {list(known.shape[1:])}, those of {name}"
                f" {list(foreign[name].shape[1:])}; prepare them with the same resolution."
            )

    def labels(x: torch.Tensor) -> torch.Tensor:
        return torch.full(x.shape[:1], label, dtype=torch.int64, device=device)

    field, nowhere = model.field(device), torch.zeros((), device=device)
    scores = {"field norm": field_norm(lambda x: field(x, labels(x), nowhere.expand(len(x))))}
    if objective.energy != "none":
        energy = ExplicitEnergy(model.model, objective.energy)
        scores["energy"] = lambda x: energy.energy(x, labels(x))
    latents = {name: model.encode(images.to(device)) for name, images in foreign.items()}
    detections = detect(scores, model.encode(known.to(device)), latents, options.batch)

    with storage_errors("write", out):
        detection_figure(detections).savefig(out / "scores.png", dpi=120)
    rows = [{"score": found.score, "foreign": found.foreign, "auroc": found.auroc} for found in detections]
    record = {"model": model.source, "known": location, "samples": len(known), "label": label, "auroc": rows}
    atomic_write(out / "ood.json", (to_json({**record, **provenance()}, 1) + "\n").encode())
    print(f"{'AUROC of':<14} {'  '.join(f'{name:>10}' for name in foreign)}")
    for score in scores:
        figures = [f"{found.auroc:10.3f}" for found in detections if found.score == score]
        print(f"{score:<14} {'  '.join(figures)}")
    print(f"\n{out / 'scores.png'}\n{out / 'ood.json'}")


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
