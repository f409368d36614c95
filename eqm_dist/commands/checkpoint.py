"""Look at the checkpoints of a run, check them, and take weights out of them.

python pipelines/checkpoint.py ls [RUN]                                     which there are, and why they are kept
python pipelines/checkpoint.py verify [RUN] [--all]                         read all; exit code 1 if one is damaged
python pipelines/checkpoint.py export [RUN] [--ema DECAY] [--out DIR]   any EMA as safetensors, with a card
python pipelines/checkpoint.py convert [RUN] [--out FILE.pt]                weights and EMA for the official code

RUN is the directory or s3:// prefix of a run, of which the newest checkpoint is taken, or of a checkpoint;
default: the newest run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from eqm_dist import cli
from eqm_dist.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from eqm_dist.storage.location import Location


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{ls,verify,export,convert}")
    ls, verify, export, convert = (actions.add_parser(name) for name in ("ls", "verify", "export", "convert"))
    for action in (ls, verify, export, convert):
        cli.add_root_flag(action)
        action.add_argument(
            "place", nargs="?", metavar="RUN", help="directory of a run or of a checkpoint (default: the newest run)"
        )
    verify.add_argument("--all", action="store_true", help="verify all checkpoints of the run, not only the newest")
    export.add_argument("--ema", type=_decay, metavar="DECAY",
                        help="decay of the EMA, one of optimizer.ema_decays; none for the weights themselves"
                        " (default: the first)")  # fmt: skip
    export.add_argument("--out", metavar="DIR", help="directory that does not exist yet (default: exports/NAME-stepN)")
    convert.add_argument("--out", metavar="FILE", help="file for the weights (default: NAME-stepN.pt)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
        SystemExit: with 1; a checkpoint is damaged.
    """
    options = make_parser().parse_args(arguments)

    from eqm_dist import inventory
    from eqm_dist.export import export as write_export
    from eqm_dist.pretrained import load, newest_run
    from eqm_dist.runs import runs_location
    from eqm_dist.storage.location import to_location

    root = cli.root_from(options)
    place = to_location(options.place) if options.place else newest_run(runs_location(root))
    if options.action == "ls":
        print(inventory.table(inventory.entries(place)))
    elif options.action == "verify":
        if options.all and not inventory.is_run(place):
            raise ConfigError(f"--all has no effect on {place}, which is no run; leave it out.")
        sys.exit(_verify(inventory.checkpoints_of(place, options.all)))
    elif options.action == "export":
        model = load(place, ema=options.ema, root=root)
        name = model.name if options.ema is None else f"{model.name}-{model.state}"
        print(f"{write_export(model, Path(options.out or f'exports/{name}'))} is complete.")
    else:
        model = load(place, root=root)
        print(f"{inventory.convert(to_location(model.source), Path(options.out or f'{model.name}.pt'))} is complete.")


def _verify(checkpoints: "Sequence[Location]") -> int:
    from eqm_dist.inventory import verify

    code = 0
    for checkpoint in checkpoints:
        try:
            print(f"{checkpoint} is whole: {verify(checkpoint)}")
        except CheckpointError as error:
            print(error)
            code = 1
    return code


def _decay(text: str) -> float | str:
    try:
        return text if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a decay like 0.9999, or none, got {text}") from None


def start() -> NoReturn:
    """Run the command as a program."""
    cli.run(main)
