"""Find the step size, momentum and NFE that draw the best images from a trained model.

python tuning/sweep_stepsize.py              the newest run in runs/, the default space
python tuning/sweep_stepsize.py --dry-run    the plan and what it will cost
python tuning/sweep_stepsize.py --model runs/mine --space mine.yaml --search optuna --trials 100 --hours 1

Every trial is measured by its FID with few samples, the best of them with more, and the last few with other seeds, on
all actors of a cluster. Killed and started again, the command goes on. What it writes, and how to read it:
docs/tuning.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.logs import setup_logging

SPACE = Path(__file__).parents[1] / "sweeps" / "stepsize" / "space.yaml"
MOST_SAMPLES = 50_000
RUNGS = [500, 2000]
TRIALS = 50
FINALISTS = 4
SEEDS = 5


def make_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = cli.command_parser(__doc__)
    cli.add_search_flags(
        parser,
        "stepsize",
        ["grid", "random", "optuna"],
        f"points of a random or Optuna search (default: {TRIALS})",
        "sweeps/stepsize-NAME-stepN",
    )
    parser.add_argument(
        "--rungs", type=_counts, metavar="N,N",
        help="numbers of samples of the first rungs (default: 500,2000, as far as they are below --samples)",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=cli.count, metavar="N",
        help=f"number of samples of the last rung (default: as many as the reference has, at most {MOST_SAMPLES:,})",
    )  # fmt: skip
    parser.add_argument(
        "--reduction", type=cli.count, default=8, metavar="N",
        help="the best 1/N of the trials, and the Pareto front, go on to the next rung (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--finalists", type=cli.count, default=FINALISTS, metavar="N",
        help="the best N trials of the last rung are compared with other seeds; 1 compares none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=cli.count, metavar="N",
        help=f"number of seeds that compare the finalists, those that follow --seed (default: {SEEDS})",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="URL",
        help="where Optuna's study is kept for its dashboard: sqlite:///FILE or another database, or a file for its"
        " journal (default: nowhere)",
    )  # fmt: skip
    cli.add_model_flags(parser, "evaluation.extractor", "track.")
    parser.add_argument(
        "--reference", metavar="PATH", help="what images are compared with (default: the model's training data)"
    )
    parser.add_argument(
        "--cache", default="~/.cache/eqm-dist/statistics", metavar="DIR",
        help="directory that keeps the statistics of references; none keeps none (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--labels",
        default="balanced",
        metavar="RULE",
        help="classes of the images: balanced, random, or in turn like 3,1,4 (default: %(default)s)",
    )
    cli.add_work_flags(parser, batch=256, seeds="images and search")
    cli.add_actor_flags(parser)
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        EqmDistError: one sentence for the user.
    """
    options = make_parser().parse_args(arguments)
    cli.check_actors(options)
    if options.search == "grid" and options.trials is not None:
        raise ConfigError("--trials has no effect on --search grid, which tries all points; use random or optuna.")
    if options.search != "optuna" and options.storage is not None:
        raise ConfigError(f"--storage has no effect on --search {options.search}; leave it out, or use optuna.")
    if options.seeds is not None and options.finalists == 1:
        raise ConfigError("--seeds has no effect with --finalists 1, which compares nothing; leave one of them out.")
    if options.seeds == 1:
        raise ConfigError("--seeds must be at least 2, got 1, which has no spread; leave it out.")

    from eqm_dist.launch.evaluation import Judge
    from eqm_dist.pretrained import load
    from eqm_dist.runs import sweep_directory
    from eqm_dist.sweeps.search import Search
    from eqm_dist.sweeps.spaces import read_space
    from eqm_dist.sweeps.stepsize.dry_run import describe
    from eqm_dist.sweeps.stepsize.plan import AXES, Plan, check
    from eqm_dist.sweeps.stepsize.sweep import sweep

    space, track = read_space(options.space or str(SPACE), AXES), cli.track_from(options)
    model = load(options.model, **cli.model_arguments(options))
    extractor, weights = model.extractor("--evaluation.extractor")
    judge = Judge(
        extractor=extractor,
        weights=weights,
        metrics=["fid"],
        batch=options.batch,
        launcher=options.launcher,
        actors=options.actors,
        cache=None if options.cache == "none" else options.cache,
    )

    search = Search(
        space=space,
        how=options.search,
        trials=options.trials or TRIALS,
        seed=options.seed,
        out=Path(options.out) if options.out else sweep_directory(f"stepsize-{model.name}"),
    )

    def plan(samples: int) -> Plan:
        above = [rung for rung in options.rungs or [] if rung > samples]
        if above:
            raise ConfigError(
                f"--rungs must not be above the {samples:,} samples of the last rung, got {above[0]:,}; lower it, or"
                " give more --samples."
            )
        return Plan(
            model=model,
            search=search,
            track=track,
            rungs=(*sorted({rung for rung in options.rungs or RUNGS if rung < samples}), samples),
            reduction=options.reduction,
            finalists=options.finalists,
            seeds=options.seeds or SEEDS,
            storage=options.storage,
            labels=options.labels,
            batch=options.batch,
            launcher=options.launcher,
            actors=options.actors,
        )

    judge.check_samples(min(options.rungs or RUNGS), "--rungs")
    judge.check_samples(options.samples or MOST_SAMPLES)
    check(plan(options.samples or MOST_SAMPLES))
    reference = judge.reference(options.reference or model.training_data("--reference"))
    assert reference is not None  # the FID has one
    known = reference.statistics.count or MOST_SAMPLES
    planned = plan(options.samples or min(known, MOST_SAMPLES))
    print(describe(planned) if options.dry_run else sweep(planned, reference, options.hours))


def _counts(text: str) -> list[int]:
    return [cli.count(part) for part in text.split(",")]


def start() -> NoReturn:
    """Run the command as a program."""
    setup_logging()
    cli.run(main)
