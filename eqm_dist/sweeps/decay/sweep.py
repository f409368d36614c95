"""A sweep over trainings, piece by piece: what ``tuning/sweep_decay.py`` calls."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from eqm_dist.options import dump, flatten, with_overrides
from eqm_dist.run_directory import MLFLOW_FILE
from eqm_dist.runs import runs_root
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.decay.pictures import pictures
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.points import train_points
from eqm_dist.sweeps.decay.population import train_population
from eqm_dist.sweeps.decay.results import Summary, Trained, summaries, table, write_csv
from eqm_dist.sweeps.decay.training import Trainer
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.pictures import save_pictures
from eqm_dist.sweeps.record import Record
from eqm_dist.sweeps.report import BEST_FILE, write_best
from eqm_dist.sweeps.sweep import Findings, Sweep, run_sweep
from eqm_dist.track.mlflow import SweepRecord, recorded_run

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
    """A training keeps its record itself, but for how it ended where it was stopped or died."""
    directory = plan.runs / trained.name
    if (directory / MLFLOW_FILE).exists():
        status = {"complete": "FINISHED", "stopped": "KILLED"}.get(trained.how, "FAILED")
        record.close_trial(recorded_run(directory), status)


def _conclude(plan: Plan, results: Sequence[Trained]) -> Findings:
    out, order = plan.search.out, summaries(results)
    files, lines = [write_csv(out, order, results)], table(order, results, plan.search.keys)
    if plan.search.how != "pbt" and any(one.how == "lost" for one in results):
        lines.append("The same command tries the lost ones again.")
    if not order:
        return Findings(lines, files)
    files.append(_write_best(plan, order[0], len(order)))
    files += save_pictures(out, pictures(plan, order))
    lines += ["", f"  train it  python pipelines/train.py --config {out / BEST_FILE} --run.name best"]
    return Findings(lines, files, {"eval/fid": order[0].mean})


def _write_best(plan: Plan, best: Summary, points: int) -> Path:
    origin = f"FID {best.mean:.3f} +- {best.spread:.3f} over {len(best.fids)} seeds, the best of {points:,} points"
    config = dump(plan.config_of(best.overrides, "best", plan.search.seed))
    return write_best(plan.search.out, origin, {section: config[section] for section in PORTABLE})
