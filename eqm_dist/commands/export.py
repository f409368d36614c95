"""Write a trained model as safetensors with a model card, for others to use with ``eqm_dist.load``.

python pipelines/export.py                                         the newest run in runs/, into exports/NAME-stepN
python pipelines/export.py --model runs/mine --license cc-by-4.0 --out exports/mine
python pipelines/export.py --model EqM-B-2.pt --autoencoder stabilityai/sd-vae-ft-ema
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--out", metavar="DIR", help="directory that does not exist yet (default: exports/NAME-stepN)")
    parser.add_argument("--license", metavar="ID", help="SPDX id of the weights' license, for the model card")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)

    from eqm_dist.export import export
    from eqm_dist.pretrained import load

    model = load(options.model, **cli.model_arguments(options))
    out = export(model, Path(options.out or f"exports/{model.name}"), license=options.license)
    print(f"{out} is complete. Draw from it with:\n\n  import eqm_dist\n\n  model = eqm_dist.load({str(out)!r})\n"
          "  images = model.sample(labels=[0, 1, 2])  # [3, H, W, C] uint8")  # fmt: skip


def start() -> NoReturn:
    """Run the command as a program."""
    cli.run(main)
