"""Say what a run on N GPUs takes before it is started: memory, time by part, traffic, days and money.

python pipelines/plan.py --preset eqm-xl2 --gpus 64 --gpu h100           any key of the config is a flag
python pipelines/plan.py --preset eqm-xl2 --table                        on 1 to 1,024 GPUs
python pipelines/plan.py --preset eqm-xl2 --table --images-per-gpu 32    32 images for each, as many in all
python pipelines/plan.py --preset eqm-b2 --gpus 8 --spot --failure-hours 200

Counted and derived, and held against what others have published; nothing was timed on a GPU (docs/scaling.md).
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.documents import to_json
from eqm_dist.errors import ConfigError
from eqm_dist.planner.hardware import FAILURE_HOURS, GPUS
from eqm_dist.planner.model import Work
from eqm_dist.planner.plan import plan
from eqm_dist.planner.report import SIZES, as_table, one, table

MOST_GPUS = 100_000


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.parser(__doc__)
    parser.add_argument("--gpus", type=cli.count, default=8, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="which (default: %(default)s)")
    parser.add_argument(
        "--images-per-gpu",
        type=cli.count,
        metavar="N",
        help="make the global batch N images for each GPU, and see as many",
    )
    parser.add_argument(
        "--price", type=cli.non_negative, metavar="USD", help="of an hour of a GPU (default: a range of 2026)"
    )
    parser.add_argument("--spot", action="store_true", help="take the prices of machines that may be taken away")
    parser.add_argument(
        "--failure-hours",
        type=cli.hours,
        default=FAILURE_HOURS,
        metavar="H",
        help="mean time between failures of one GPU (default: %(default)s)",
    )
    parser.add_argument(
        "--table", action="store_true", help="on 1, 2, 4 ... 1,024 GPUs, as Markdown; --gpus has no effect"
    )
    parser.add_argument("--json", action="store_true", help="all figures as JSON")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    config = cli.config_from(options)
    gpu, gpus, images = GPUS[options.gpu], options.gpus, options.images_per_gpu
    price = gpu.spot if options.spot else gpu.on_demand
    if options.price is not None:
        price = options.price, options.price
    elif options.spot and price is None:
        raise ConfigError(f"--spot has no effect with --gpu {gpu.name}, of which no such price is known; give --price.")
    if gpus > MOST_GPUS:
        raise ConfigError(f"--gpus must be at most {MOST_GPUS:,}, got {gpus:,}.")

    if config.launch.launcher == "local" and (gpus > 1 or options.table):
        raise ConfigError("--launch.launcher local is one process with one GPU; leave it out, or plan for --gpus 1.")

    first = Work.of(config, 1)
    if options.table:
        plans = table([first.on(size, images) for size in SIZES], gpu, options.failure_hours, price)
        print(to_json([each.record() for each in plans], indent=1) if options.json else as_table(plans))
        return
    work = first.on(gpus, images)
    work.check()
    found = plan(work, gpu, options.failure_hours, price)
    print(to_json(found.record(), indent=1) if options.json else one(found))


def start() -> NoReturn:
    """Run the command as a program."""
    cli.run(main)
