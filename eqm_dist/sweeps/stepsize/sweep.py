"""A sweep over the samplers of one model, piece by piece: what ``tuning/sweep_stepsize.py`` calls."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eqm_dist.launch.evaluation import Reference
from eqm_dist.options import dump
from eqm_dist.sweeps.comparison import Standing, by_trial, figures, others
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.pictures import save_pictures
from eqm_dist.sweeps.record import Record
from eqm_dist.sweeps.report import BEST_FILE, CSV_FILE, shown, write_best
from eqm_dist.sweeps.stepsize.halving import Halving
from eqm_dist.sweeps.stepsize.pictures import pictures
from eqm_dist.sweeps.stepsize.plan import Plan
from eqm_dist.sweeps.stepsize.results import (
    Result,
    compared,
    comparison_table,
    ordered,
    ranked,
    table,
    write_csv,
)
from eqm_dist.sweeps.sweep import Findings, Sweep, run_sweep
from eqm_dist.text import counted, labelled
from eqm_dist.track.mlflow import SweepRecord


def sweep(plan: Plan, reference: Reference, hours: float | None) -> str:
    """Measure all trials, or go on with a sweep that was begun; returns the closing report.

    Args:
        plan: what is measured.
        reference: what the images are compared with.
        hours: no task is begun after so long; None sets no limit.

    Raises:
        EqmDistError: one sentence for the user.
    """

    def work(ledger: Ledger[Result], deadline: Deadline, _: SweepRecord | None) -> bool:
        return Halving(plan, ledger, reference.statistics, deadline).measure_all()

    record = Record(
        track=plan.track,
        root=plan.root,
        config=plan.model.config,
        params={"model": plan.model.source, "samples": list(plan.rungs)},
    )
    return run_sweep(
        Sweep(
            search=plan.search,
            settings=_settings(plan, reference),
            kind=Result,
            record=record,
            log=partial(_log, plan),
            work=work,
            conclude=partial(_conclude, plan),
            may_change=("finalists", "seeds"),
        ),
        hours,
    )


def _settings(plan: Plan, reference: Reference) -> dict[str, Any]:
    return {
        "model": plan.model.source,
        "weights_sha256": plan.model.sha256,
        "sampler": dump(plan.model.config.sampler),
        "samples": list(plan.rungs),
        "reduction": plan.reduction,
        "labels": plan.labels,
        "seed": plan.search.seed,
        "finalists": plan.finalists,
        "seeds": plan.seeds,
        "reference": reference.location,
        "reference_samples": reference.statistics.count,
        "extractor": reference.statistics.extractor,
    }


def _log(plan: Plan, record: SweepRecord, result: Result) -> None:
    if result.seed is not None:
        if result.fid is not None:
            record.log_seed(result.trial, result.seed, result.fid)
        return
    name = shown(result.overrides, plan.search.keys)
    record.log_trial(result.trial, name, result.overrides, result.figures, result.samples, result.failure)


def _conclude(plan: Plan, results: Sequence[Result]) -> Findings:
    """The results are of all rungs and seeds; in the order each trial has its last one in the search."""
    out, keys = plan.search.out, plan.search.keys
    standings = compared(results, plan.rungs[-1], plan.comparing_seeds)
    order = ordered(ranked(results), standings)
    files, lines = [write_csv(out, order, by_trial(standings))], table(ranked(results), keys)
    if not order or order[0].fid is None:
        return Findings(lines, files, order[0].figures if order else {}, _all_failed(plan, order))
    best = order[0]
    files.append(_write_best(plan, best, standings, len(order)))
    files += save_pictures(out, pictures(plan, results, standings))
    if standings:
        seeds = plan.comparing_seeds
        lines = [f"The search, by seed {plan.search.seed}:", *lines, ""]
        lines += [f"The finalists, by seeds {seeds[0]} to {seeds[-1]}:", *comparison_table(standings, keys), ""]
    next_steps = {
        "best": f"{shown(best.overrides, keys)}, FID {_fid(best, standings)}",
        **others(standings, keys),
        "config": str(out / BEST_FILE),
        "draw": f"python pipelines/sample.py --model {plan.model.run or plan.model.source} --config {out / BEST_FILE}",
    }
    known = figures(standings[0].point) if standings else {}
    return Findings([*lines, *labelled(next_steps, "  ")], files, {**best.figures, **known})


def _all_failed(plan: Plan, order: Sequence[Result]) -> str | None:
    """The sentence for a sweep without an FID."""
    if not order:
        return None
    out, first = plan.search.out, order[0]
    point = shown(first.overrides, plan.search.keys) or "all there is"
    return (
        f"A sweep needs one trial that gives an FID, and none of {counted(len(order), 'trial')} in {out} did, the"
        f" first, {point}, for this: {first.failure}; {out / CSV_FILE} has every reason; change the space, and give"
        " another --out."
    )


def _fid(best: Result, standings: Sequence[Standing]) -> str:
    return standings[0].point.said if standings else f"{best.fid:.3f} with one seed"


def _write_best(plan: Plan, best: Result, standings: Sequence[Standing], trials: int) -> Path:
    origin = [
        f"FID {_fid(best, standings)}, with {best.samples:,} samples of {plan.model.source}, the best of {trials:,}",
        *(f"{label} {said}" for label, said in others(standings, plan.search.keys).items()),
    ]
    sampler = plan.model_of(best.overrides).config.sampler
    return write_best(plan.search.out, origin, {"sampler": dump(sampler)})
