"""Train a model: parse, check, run, report.

python pipelines/train.py                                      the embedded digits, on this machine
python pipelines/train.py --run.name mine --train.steps 500    any key of the config is a flag
python pipelines/train.py --launcher local                     one process, plain torch, no Ray
ray job submit --working-dir . -- python pipelines/train.py    on a cluster
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from eqm_dist import cli


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="print the config and the numbers that follow from it, and run nothing"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    parsed = make_parser().parse_args(arguments)
    config = cli.config_from(parsed)

    # From here on it takes seconds to import: --help and a wrong flag need not wait.
    from eqm_dist.launch.training import describe, train

    print(describe(config) if parsed.dry_run else train(config))


def start() -> NoReturn:
    """Run the command as a program."""
    cli.run(main)
