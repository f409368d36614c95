"""Look at what Equilibrium Matching learns, on two-dimensional toy data, beside flow matching.

python pipelines/landscape.py --out DIR

Trains three small networks on one thread, about a minute: flow matching, Equilibrium Matching, and its explicit
energy EqM-E. Writes landscape.png (fields, trajectories, samples) and descent.gif (samples on their way) to DIR, and
prints how far each one's samples are from data.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from eqm_dist import cli

SAMPLES = 1500


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="landscape",
        help="directory for the pictures, made if absent (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        choices=["moons", "gaussians", "checkerboard"],
        default="gaussians",
        help="distribution that the networks learn (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=cli.count, default=2000, help="number of updates of each network (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="seed of weights, draws and samples (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)

    # After parsing, for these import torch and --help must answer at once.
    from pathlib import Path

    import torch

    from eqm_dist.logs import setup_logging
    from eqm_dist.storage.files import atomic_write, make_writable
    from eqm_dist.tasks.landscape import METHODS, energy_distance, toy_data, train
    from eqm_dist.tasks.landscape_figure import Descent, animation, figure

    directory = Path(options.out).absolute()
    make_writable(directory)
    setup_logging()
    torch.set_num_threads(1)  # one thread: the same sums in the same order, hence the same pictures
    generator = torch.Generator().manual_seed(options.seed)
    data, others = (toy_data(options.data, SAMPLES, generator) for _ in range(2))
    start = torch.randn(SAMPLES, 2, generator=generator)
    descents = []
    for method in METHODS:
        landscape = train(method, options.data, options.steps, options.seed)
        trajectories = landscape.trajectories(start)
        descents.append(Descent(landscape, trajectories, energy_distance(trajectories[-1], data)))
    for descent in descents:
        print(f"{descent.landscape.method:13}  energy distance to data {descent.distance:.4f}")
    print(f"{'data':13}  energy distance to data {energy_distance(others, data):.4f}")
    for name, content in (("landscape.png", figure(descents, data)), ("descent.gif", animation(descents))):
        atomic_write(directory / name, content)
        print(f"{directory / name}: {len(content):,} bytes")


def start() -> NoReturn:
    """Run the command as a program."""
    cli.run(main)
