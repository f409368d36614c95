"""Many samplers of one trained model, from the plan to the pictures: what ``tuning/sweep_stepsize.py`` calls."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from eqm_dist.derived import step_size_bound
from eqm_dist.launch.evaluation import Reference
from eqm_dist.logs import clock
from eqm_dist.options import dump, required, to_yaml
from eqm_dist.runs import runs_root
from eqm_dist.storage.files import atomic_write
from eqm_dist.sweeps.cost import measured_seconds
from eqm_dist.sweeps.halving import Halving
from eqm_dist.sweeps.plan import PREFIX, Plan
from eqm_dist.sweeps.plots import fid_against_nfe, fid_against_step_size
from eqm_dist.sweeps.results import BEST_FILE, CSV_FILE, Ledger, Result, ranked, shown, table, write_csv
from eqm_dist.sweeps.spaces import Overrides
from eqm_dist.text import labelled
from eqm_dist.track.mlflow import SweepRecord, default_uri, open_run

MOST_SERIES = 10
"""Lines in a picture: the best ones."""


def check(plan: Plan) -> None:
    """Build every trial's sampler, and whatever else can fail before anything is computed.

    Raises:
        EqmDistError: one sentence for the user.
    """
    for point in plan.points():
        plan.model_of(point)
    plan.model.autoencoder  # noqa: B018 (fails here, in one sentence, and not on every actor)


def describe(plan: Plan) -> str:
    """The plan and what it will cost on this machine, measured with a few images."""
    points = plan.points()
    descents = list(plan.descents(points))
    count = plan.trials if plan.search == "optuna" else len(points)
    each = sum(plan.nfe(descent[-1]) for descent in descents) / len(descents)
    ways = len(descents) if plan.search == "grid" else count
    lines = {
        "model": plan.model.source,
        "trials": f"{count:,} ({plan.search}{f', on {ways:,} descents' * (plan.search == 'grid')})",
        "axes": ", ".join(key.removeprefix(PREFIX) for key in plan.space.varying()),
    }
    spent, kept, before = 0.0, count, 0
    for number, samples in enumerate(plan.rungs, start=1):
        spent += (samples - before) * each * min(ways, kept)
        lines[f"rung {number}"] = f"{'about ' * (number > 1)}{kept:,} trials with {samples:,} samples"
        kept, before = -(-kept // plan.reduction), samples
    bound = step_size_bound(plan.model.config)
    if bound is not None:
        lines["largest stable step"] = f"{bound:.4g} (plain descent near data)"
    workers = 1 if plan.launcher == "local" else plan.actors or torch.cuda.device_count() or os.cpu_count() or 1
    seconds = spent * _seconds_per_evaluation(plan, points[0]) / workers
    lines["cost"] = f"about {spent:,.0f} evaluations of the field, of one image each"
    lines["time"] = f"about {clock(seconds)} on {workers} actor{'s' * (workers > 1)} like this machine"
    lines["results"] = str(plan.out)
    return "\n".join(labelled(lines))


def sweep(plan: Plan, reference: Reference, hours: float | None) -> str:
    """Measure all trials, or go on with a sweep that was begun; returns the closing report.

    Args:
        plan: what is measured.
        reference: what the images are compared with.
        hours: no task is begun after so long; None sets no limit.

    Raises:
        EqmDistError: one sentence for the user.
    """
    ledger = Ledger(plan.out, _settings(plan, reference), Result, may_change=["trials"])
    record = _open_record(plan)

    def log(result: Result) -> None:
        if record is not None:
            _log(record, result, plan.space.varying())

    for result in ledger.results:  # what a killed attempt may not have sent; the rest is not sent twice
        log(result)
    status, files, best = "FAILED", [], {}
    try:
        complete = Halving(plan, ledger, reference.statistics, log, hours).measure_all()
        order = ranked(ledger.results)
        files = _write(plan, order, ledger.results)
        best = _metrics(order[0]) if order else {}
        status = "FINISHED" if complete else "KILLED"
        return _report(plan, order, complete)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if record is not None:
            record.finish(files, best, status)


def _seconds_per_evaluation(plan: Plan, point: Overrides) -> float:
    """Of one image."""
    model = plan.model.with_sampler(**(plan.sampler(point) | {"nfe": 4}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    indices = torch.arange(plan.batch)
    labels = indices % model.config.data.num_classes

    def draw() -> torch.Tensor:
        return model.generate(indices, labels, 0, plan.batch, device).images.sum()

    return measured_seconds(draw, device) / (4 * plan.batch)


def _settings(plan: Plan, reference: Reference) -> dict[str, Any]:
    """What decides the results of a sweep."""
    return {
        "model": plan.model.source,
        "weights_sha256": plan.model.sha256,
        "sampler": dump(plan.model.config.sampler),
        "space": [{key: vars(axis) for key, axis in part.items()} for part in plan.space.alternatives],
        "search": plan.search,
        "trials": plan.trials,
        "samples": list(plan.rungs),
        "reduction": plan.reduction,
        "labels": plan.labels,
        "seed": plan.seed,
        "reference": reference.location,
        "reference_samples": reference.statistics.count,
        "extractor": reference.statistics.extractor,
    }


def _open_record(plan: Plan) -> SweepRecord | None:
    config = plan.model.config
    if not config.track.mlflow:
        return None
    root = plan.model.run.parent if plan.model.run else runs_root()
    parent = open_run(
        plan.out,
        name=plan.out.name,
        tracking_uri=config.track.mlflow_uri or default_uri(root),
        experiment=f"{config.track.experiment}-sweeps",
        params={"model": plan.model.source, "search": plan.search, "seed": plan.seed, "samples": list(plan.rungs)},
        config_yaml=to_yaml(config),
        timeout_s=required(config.track.timeout_s),
        artifacts=root,
    )
    return SweepRecord(parent)


def _log(record: SweepRecord, result: Result, keys: Sequence[str]) -> None:
    record.log_trial(
        result.trial, shown(result.overrides, keys), result.overrides, _metrics(result), result.samples, result.failure
    )


def _metrics(result: Result) -> dict[str, float]:
    figures = {
        "eval/fid": result.fid,
        "eval/nfe": result.nfe,
        "eval/samples": float(result.samples),
        "time/trial_s": result.seconds,
    }
    return {key: value for key, value in figures.items() if value is not None}


def _write(plan: Plan, order: Sequence[Result], results: Sequence[Result]) -> list[Path]:
    """The files of a sweep; ``results`` are of all rungs, ``order`` the last of each trial."""
    write_csv(plan.out, order)
    files = [plan.out / CSV_FILE]
    if not order or order[0].fid is None:
        return files
    best = order[0]
    sampler = dump(plan.model_of(best.overrides).config.sampler)
    text = yaml.safe_dump({"sampler": sampler}, sort_keys=False)
    origin = f"# FID {best.fid:.3f} with {best.samples:,} samples of {plan.model.source}, the best of {len(order):,}\n"
    atomic_write(plan.out / BEST_FILE, f"{origin}{text}".encode())
    files.append(plan.out / BEST_FILE)
    series = _series(plan, results)
    pictures = {"fid_nfe.png": fid_against_nfe(series)}
    with_steps: dict[str, list[tuple[float, Result]]] = {}
    for name, found in series.items():
        for result in found:
            if (step_size := _step_size(plan, result)) is not None:
                with_steps.setdefault(name, []).append((step_size, result))
    if with_steps:
        bound = step_size_bound(plan.model.config)
        pictures["fid_step_size.png"] = fid_against_step_size(with_steps, bound)
    for name, picture in pictures.items():
        picture.savefig(plan.out / name)
        files.append(plan.out / name)
    return files


def _series(plan: Plan, results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results by sampler, that is by everything but step size and NFE; the best samplers."""
    keys = [key for key in plan.space.varying() if key.removeprefix(PREFIX) not in ("step_size", "nfe")]
    measured = [result for result in results if result.fid is not None]
    names = {result.trial: shown(result.overrides, keys) or "all" for result in measured}
    best = list(dict.fromkeys(names[result.trial] for result in ranked(measured)))[:MOST_SERIES]
    return {name: [result for result in measured if names[result.trial] == name] for name in sorted(best)}


def _step_size(plan: Plan, result: Result) -> float | None:
    sampler = plan.model_of(result.overrides).config.sampler
    return sampler.step_size


def _report(plan: Plan, order: Sequence[Result], complete: bool) -> str:
    title = f"{plan.out} is complete" if complete else f"{plan.out}: the time is up; the same command goes on"
    lines = [table(order, plan.space.varying())]
    if order and order[0].fid is not None:
        best = order[0]
        config = {"best": shown(best.overrides, plan.space.varying()), "config": str(plan.out / BEST_FILE),
                  "draw": f"python pipelines/sample.py --model {plan.model.run or plan.model.source} --config"
                          f" {plan.out / BEST_FILE}"}  # fmt: skip
        lines += labelled(config, "  ")
    return "\n".join(["", title, "", *lines])
