"""Draw images from a trained model with all actors of a cluster; killed and started again, it goes on.

python pipelines/sample.py                                         100 images of the newest run in runs/
python pipelines/sample.py --model runs/mine --samples 50000 --format npz --out samples/mine
python pipelines/sample.py --sampler.nfe 50 --out samples/few
python pipelines/sample.py --config sweeps/stepsize-digits-step2000/best.yaml
python pipelines/sample.py --model EqM-B-2.pt --autoencoder stabilityai/sd-vae-ft-ema --labels 207,360
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.logs import setup_logging


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="directory for the images (default: samples/NAME-stepN)")
    parser.add_argument(
        "--samples", type=cli.count, default=100, metavar="N", help="number of images (default: %(default)s)"
    )
    parser.add_argument(
        "--labels", default="balanced", metavar="RULE",
        help="classes of the images: balanced, random, or in turn like 3,1,4 (default: %(default)s)",
    )  # fmt: skip
    cli.add_work_flags(parser, batch=256, seeds="the start noise")
    parser.add_argument(
        "--format", choices=["png", "tar", "npz"], default="png", help="files that are written (default: %(default)s)"
    )
    cli.add_actor_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    cli.check_actors(options)

    from eqm_dist.launch.sampling import draw
    from eqm_dist.pretrained import load

    model = load(options.model, **cli.model_arguments(options))
    out = Path(options.out or f"samples/{model.name}")
    kept = ("samples", "labels", "seed", "batch", "format", "launcher", "actors")
    print(draw(model, out, **{name: getattr(options, name) for name in kept}))


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
