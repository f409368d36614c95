"""A sweep over trainings, piece by piece: what ``tuning/sweep_decay.py`` calls."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eqm_dist.logs import log_file
from eqm_dist.options import dump, flatten, with_overrides
from eqm_dist.run_directory import CHECKPOINTS, MLFLOW_FILE
from eqm_dist.runs import runs_root
from eqm_dist.sweeps.comparison import Standing, figures, others
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.decay.pictures import pictures
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.points import train_points
from eqm_dist.sweeps.decay.population import train_population
from eqm_dist.sweeps.decay.results import (
    LINEAGE_FILE,
    Summary,
    Trained,
    lineage,
    ranked,
    summaries,
    table,
    told,
    write_csv,
    write_lineage,
)
from eqm_dist.sweeps.decay.training import Trainer
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.pictures import save_pictures
from eqm_dist.sweeps.record import Record
from eqm_dist.sweeps.report import BEST_FILE, CSV_FILE, shown, write_best
from eqm_dist.sweeps.sweep import Findings, Sweep, run_sweep
from eqm_dist.text import counted, labelled
from eqm_dist.track.mlflow import SweepRecord, recorded_run
from eqm_dist.train.checkpoint import Checkpoints

PORTABLE = ("data", "model", "objective", "optimizer", "train", "sampler", "evaluation")
"""The sections of ``best.yaml``: all but where to run."""


def sweep(plan: Plan, hours: float | None) -> str:
    """Train all trials, or go on with a sweep that was begun; returns the closing report.

    Raises:
        EqmDistError: one sentence for the user.
    """
    record = Record(
        track=plan.config.track,
        root=runs_root(plan.config.run.root),
        config=plan.config,
        params={"seeds": plan.seeds},
    )

    def work(ledger: Ledger[Trained], deadline: Deadline, opened: SweepRecord | None) -> bool:
        placed = plan if opened is None else _recorded_beside(plan, opened, record.experiment)
        trainer = Trainer(placed, ledger, deadline, opened.parent.run_id if opened else None)
        return (train_population if plan.search.how == "pbt" else train_points)(placed, trainer)

    return run_sweep(
        Sweep(
            search=plan.search,
            settings=_settings(plan),
            kind=Trained,
            record=record,
            log=partial(_log, plan),
            work=work,
            conclude=partial(_conclude, plan),
            may_change=() if plan.search.how == "pbt" else ("seeds",),
        ),
        hours,
    )


def _settings(plan: Plan) -> dict[str, Any]:
    """Where and how a sweep runs may change."""
    elsewhere = ("launch.", "track.", "run.name", "run.root")
    config = {key: value for key, value in flatten(dump(plan.config)).items() if not key.startswith(elsewhere)}
    return {**config, "seeds": plan.seeds, "reduction": plan.reduction, "grace": plan.grace}


def _recorded_beside(plan: Plan, record: SweepRecord, experiment: str) -> Plan:
    """The plan of trials that are recorded where the sweep is."""
    where = {"track.mlflow_uri": record.parent.tracking_uri, "track.experiment": experiment}
    return replace(plan, config=with_overrides(plan.config, where))


def _log(plan: Plan, record: SweepRecord, trained: Trained) -> None:
    """A training keeps its record itself, but for how it ended where it was stopped or died, and where it came from."""
    directory = plan.runs / trained.name
    if (directory / MLFLOW_FILE).exists():
        status = {"complete": "FINISHED", "stopped": "KILLED"}.get(trained.how, "FAILED")
        tags = {"eqm_dist.parent": trained.parent} if trained.parent else {}
        record.close_trial(recorded_run(directory), status, tags)


def _conclude(plan: Plan, results: Sequence[Trained]) -> Findings:
    out, population = plan.search.out, plan.search.how == "pbt"
    if not population:  # an earlier attempt may have had more seeds
        results = [one for one in results if one.seed in plan.seed_numbers]
    rows = summaries(results, (lambda one: one.name) if population else (lambda one: one.point))
    order = ranked(rows, plan.cost)
    files, lines = [write_csv(out, order, results)], table(order, results, plan.search.keys)
    if any(one.failure for one in results):
        lines.append(f"Their logs lie in {plan.runs}/RUN/logs.")
    if not population and any(one.how == "lost" for one in results):
        lines.append("The same command tries the lost ones again.")
    if not order:
        return Findings(lines, files, failure=_all_failed(plan, results))
    best, standings = order[0][0], [standing for row, standing in order if row.step == rows[0].step]
    files += save_pictures(out, pictures(plan, standings))
    next_steps = {"best": f"{shown(best.overrides, plan.search.keys)}, FID {standings[0].point.said}"}
    next_steps |= others(standings, plan.search.keys)
    if population:
        runs = lineage(results, best.runs[0])
        files.append(write_lineage(out, runs))
        next_steps["schedule"] = str(out / LINEAGE_FILE)
        next_steps["draw it"] = f"python pipelines/sample.py --model {plan.runs / best.runs[0]}"
        lines += ["", f"What led to {best.runs[0]}:", *_schedule(plan, runs)]
        origin = ["The schedule that led to it, for these keys are its last part only; its weights are the result:"]
        origin += [*_schedule(plan, runs), f"checkpoint: {_checkpoint(plan, best)}"]
    else:
        origin = [f"{label} {said}" for label, said in others(standings, plan.search.keys).items()]
        next_steps["train it"] = f"python pipelines/train.py --config {out / BEST_FILE} --run.name best"
    files.append(_write_best(plan, best, standings[0], len(order), origin))
    return Findings([*lines, "", *labelled(next_steps, "  ")], files, figures(standings[0].point))


def _schedule(plan: Plan, runs: Sequence[Trained]) -> list[str]:
    """A line for each part of a population's training: its steps, its run, its keys."""
    starts = [0, *(one.step for one in runs)]
    return [
        f"steps {start:,} to {one.step:,}: {one.name}, {shown(one.overrides, plan.search.keys)}"
        for start, one in zip(starts, runs, strict=False)
    ]


def _checkpoint(plan: Plan, best: Summary) -> Path:
    return Checkpoints(plan.runs / best.runs[0] / CHECKPOINTS, keep=1).path(best.step)


def _all_failed(plan: Plan, results: Sequence[Trained]) -> str | None:
    """The sentence for a sweep without an FID."""
    failed = [one for one in results if one.failure]
    if not failed:
        return None
    first = failed[0]
    return (
        f"A sweep needs one run that gives an FID, and none of {counted(len(results), 'run')} in {plan.search.out} did,"
        f" the first, {told(first, plan.search.keys)}, for this: {first.failure}; its log is"
        f" {log_file(plan.runs / first.name, 0)}, and {plan.search.out / CSV_FILE} has every reason; put it right and"
        " run the same command again, with another --out where the space changes."
    )


def _write_best(plan: Plan, best: Summary, standing: Standing, points: int, more: Sequence[str]) -> Path:
    origin = [f"FID {standing.point.said}, step {best.step:,}, the best of {counted(points, 'point')}", *more]
    config = dump(plan.config_of(best.overrides, "best", plan.search.seed))
    return write_best(plan.search.out, origin, {section: config[section] for section in PORTABLE})
