"""Find c(gamma), lambda, learning rate and whatever else decides a training: many short ones, compared by their FID.

python tuning/sweep_decay.py              the families of c(gamma) on the embedded digits, 3 seeds each
python tuning/sweep_decay.py --dry-run    the plan and its cost
python tuning/sweep_decay.py --space mine.yaml --search random --trials 40 --reduction 3 --grace 500 --hours 8
python tuning/sweep_decay.py --space mine.yaml --search pbt --trials 8 --grace 250 --optimizer.schedule constant

Every key of the config is a flag and holds for all trials. Killed and started again, the command goes on. What it
writes, and how to read it: docs/tuning.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging
from eqm_dist.options import required, with_overrides

SPACE = Path(__file__).parents[1] / "sweeps" / "decay" / "space.yaml"
TRIALS = 16
SEEDS = 3
REPLACED = 4


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.parser(__doc__)
    parser.usage = "%(prog)s [--space FILE] [--search NAME] [--preset NAME] [--config FILE] [--SECTION.KEY VALUE ...]"
    parser.epilog = "Precedence: defaults < --preset < --config < flags < the space."
    cli.add_search_flags(
        parser,
        "decay",
        ["grid", "random", "pbt"],
        f"points of a random search, or of members of pbt (default: {TRIALS})",
        "sweeps/decay",
    )
    parser.add_argument(
        "--seeds", type=cli.count, metavar="N", help=f"number of runs of each point (default: {SEEDS}; pbt has 1)"
    )
    parser.add_argument(
        "--reduction", type=cli.count, metavar="N",
        help="at each rung the best 1/N of the points go on, by the FID of their first seed (default: all go on);"
        f" pbt: the worst 1/N of the members are replaced (default: {REPLACED})",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=cli.count, metavar="STEPS",
        help="number of steps before a point may be stopped, or of a generation of pbt (default: evaluation.every)",
    )  # fmt: skip
    parser.add_argument(
        "--cpus-per-trial",
        type=cli.count,
        default=1,
        metavar="N",
        help="CPUs that a trial reserves (default: %(default)s)",
    )
    parser.add_argument(
        "--gpus-per-trial",
        type=cli.non_negative,
        metavar="N",
        help="GPUs that a trial reserves, also a fraction of one (default: 1 where there are GPUs)",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    for flag, searches in (("trials", ("random", "pbt")), ("seeds", ("grid", "random"))):
        if getattr(options, flag) is not None and options.search not in searches:
            raise ConfigError(f"--{flag} has no effect on --search {options.search}; leave it out.")
    if options.reduction == 1:
        raise ConfigError("--reduction must be at least 2, got 1, which stops nothing; leave it out.")
    if options.grace is not None and options.search != "pbt" and options.reduction is None:
        raise ConfigError("--grace has no effect without --reduction; give both or none.")
    if (options.gpus_per_trial or 0) > 1 and options.gpus_per_trial % 1:
        raise ConfigError(
            f"--gpus-per-trial must be a part of one GPU or a whole number of them, got {options.gpus_per_trial:g};"
            " round it."
        )
    config = cli.config_from(options)

    import torch

    from eqm_dist.runs import sweep_directory
    from eqm_dist.sweeps.decay.dry_run import describe
    from eqm_dist.sweeps.decay.plan import AXES, Plan, check
    from eqm_dist.sweeps.decay.sweep import sweep
    from eqm_dist.sweeps.search import Search
    from eqm_dist.sweeps.spaces import read_space

    gpus = options.gpus_per_trial if options.gpus_per_trial is not None else float(torch.cuda.is_available())
    if getattr(options, "launch.launcher") != "ray":
        keys = ("launch.workers", "launch.cpus_per_worker", "engine.kind", "engine.zero_stage")
        given = [key for key in keys if getattr(options, key) is not None]
        if given:
            raise ConfigError(f"{given[0]} has no effect on trials that are one process; add --launcher ray.")
        config = with_overrides(config, {"launch.launcher": "local"})
    else:
        workers, cpus = config.launch.workers, config.launch.cpus_per_worker
        if isinstance(workers, tuple):
            raise ConfigError(f"launch.workers must be one number in a sweep, got {list(workers)}; give a number.")
        workers = max(1, int(gpus)) if workers == "auto" else required(workers)
        cpus = max(1, options.cpus_per_trial // workers) if cpus == "auto" else cpus
        config = with_overrides(config, {"launch.workers": workers, "launch.cpus_per_worker": cpus})
    population = options.search == "pbt"
    search = Search(
        space=read_space(options.space or str(SPACE), AXES),
        how=options.search,
        trials=options.trials or TRIALS,
        seed=config.run.seed,
        out=Path(options.out) if options.out else sweep_directory("decay"),
    )
    plan = Plan(
        config=config,
        search=search,
        seeds=1 if population else options.seeds or SEEDS,
        reduction=options.reduction or (REPLACED if population else 0),
        grace=options.grace or config.evaluation.every or 1,
        cpus=options.cpus_per_trial,
        gpus=gpus,
    )
    check(plan)
    print(describe(plan) if options.dry_run else sweep(plan, options.hours))


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
