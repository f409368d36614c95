"""Many short trainings, from the plan to the pictures: what ``tuning/sweep_decay.py`` calls.

A trial is a run in OUT/runs whose name is a function of what it is, so the same command finds it again.
"""

import csv
import io
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from eqm_dist.build import build_decay, build_model
from eqm_dist.config import Config
from eqm_dist.derived import derive
from eqm_dist.errors import ConfigError, LaunchError
from eqm_dist.launch.ray_cluster import cluster
from eqm_dist.launch.ray_tune import EarlyStop, Ending, Trial, history, run_trials
from eqm_dist.logs import clock
from eqm_dist.options import Axis, dump, flatten, keys_with, required, to_yaml, with_overrides
from eqm_dist.run_directory import METRICS_FILE, MLFLOW_FILE
from eqm_dist.runs import runs_root
from eqm_dist.storage.files import atomic_write
from eqm_dist.sweeps.cost import measured_seconds
from eqm_dist.sweeps.plots import c_gamma_curves, fid_with_error_bars, parallel_coordinates
from eqm_dist.sweeps.results import BEST_FILE, CSV_FILE, Ledger, short, shown
from eqm_dist.sweeps.spaces import Choices, Interval, Overrides, Space, trial_name
from eqm_dist.text import aligned, labelled
from eqm_dist.track.jsonl import last_values
from eqm_dist.track.mlflow import MlflowRun, SweepRecord, close_run, default_uri, open_run, recorded_run

logger = logging.getLogger(__name__)

AXES = keys_with(Config, Axis)
"""What can be swept: what decides the numbers of a run, but for its length, its data and its evaluation."""
STATE_KEYS = ("model.", "objective.energy", "optimizer.ema_decays", "optimizer.schedule", "optimizer.warmup_steps")
"""What a checkpoint is bound to, or a part of a run cannot have: no axes of population-based training."""


@dataclass(frozen=True)
class Plan:
    """A sweep, checked.

    Attributes:
        config: of all trials, but for what the space changes.
        space: what is searched.
        search: ``grid``, ``random``, or ``pbt``, population-based training (arXiv 1711.09846).
        trials: points of a random search; members of a population.
        seeds: runs of each point, with seeds that count up from run.seed; 1 for pbt.
        reduction: asynchronous successive halving keeps one of so many trials; 0 trains all to the end. For pbt one of
            so many members is replaced after each generation.
        grace: steps before a trial may be stopped; for pbt the steps of a generation.
        cpus, gpus: of a trial.
        out: directory of the sweep.
    """

    config: Config
    space: Space
    search: str
    trials: int
    seeds: int
    reduction: int
    grace: int
    cpus: int
    gpus: float
    out: Path

    def points(self) -> list[Overrides]:
        """The points; of a population those that it begins with."""
        if self.search == "grid":
            return self.space.grid()
        return self.space.random(self.trials, self.config.run.seed)

    def config_of(self, point: Mapping[str, Any], name: str, seed: int, **others: Any) -> Config:
        """The config of a run.

        Raises:
            ConfigError: the point cannot be.
        """
        place = {"run.root": str(self.out.absolute() / "runs"), "run.name": name, "run.seed": seed}
        return with_overrides(self.config, {**point, **place, **others}, "the space")


@dataclass(frozen=True)
class Trained:
    """How a run of a sweep ended.

    Attributes:
        name: of the run.
        overrides: its point.
        seed: its seed.
        how: ``complete``, ``stopped``, ``failed``, or ``lost`` with its process or machine.
        step: last step that was evaluated.
        fid: there; None where there is none.
        seconds: of its last attempt.
        failure: the reason, or None.
    """

    name: str
    overrides: dict[str, Any]
    seed: int
    how: str
    step: int
    fid: float | None
    seconds: float
    failure: str | None = None


@dataclass(frozen=True)
class Summary:
    """A point with the FIDs of its seeds that were trained longest: their mean and standard deviation."""

    overrides: dict[str, Any]
    step: int
    fids: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.fids)

    @property
    def spread(self) -> float:
        return statistics.stdev(self.fids) if len(self.fids) > 1 else 0.0


def check(plan: Plan) -> None:
    """Build every trial's config, and whatever else can fail before anything is computed.

    Raises:
        ConfigError: one sentence for the user.
    """
    config = plan.config
    if not config.evaluation.every:
        raise ConfigError("A sweep compares FIDs, and evaluation.every=0 measures none; set evaluation.every.")
    if config.evaluation.asynchronous:
        raise ConfigError(
            "evaluation.asynchronous has no effect in a sweep, whose trials share the machine; leave it out."
        )
    if plan.search == "pbt":
        for key in plan.space.varying():
            if key.startswith(STATE_KEYS):
                raise ConfigError(
                    f"{key} cannot change while a population trains, for checkpoints are bound to it; sweep it with"
                    " --search grid or random."
                )
        if config.optimizer.schedule != "constant":
            raise ConfigError(
                f"optimizer.schedule={config.optimizer.schedule} plans the learning rate of a whole run, and a"
                " population finds it on the way; use optimizer.schedule=constant."
            )
        if config.train.steps % plan.grace:
            raise ConfigError(
                f"train.steps={config.train.steps} must be a multiple of the {plan.grace} steps of a generation;"
                " change --grace."
            )
    elif plan.reduction and plan.grace % config.evaluation.every:
        raise ConfigError(
            f"--grace {plan.grace} must be a multiple of evaluation.every={config.evaluation.every}, for trials are"
            " stopped by their FID; change one of them."
        )
    for point in [*plan.points(), *(plan.space.extremes() if plan.search == "pbt" else ())]:
        plan.config_of(point, "check", 0)


def describe(plan: Plan) -> str:
    """The plan and its cost."""
    points, config = plan.points(), plan.config
    runs = len(points) * plan.seeds
    images = runs * config.train.steps * config.train.global_batch
    gflop = derive(config).training_flops / 1e9
    device = torch.device("cuda" if plan.gpus else "cpu")
    seconds = images * _seconds_per_image(config, device)
    at_once = max(1, int(torch.cuda.device_count() / plan.gpus if plan.gpus else (os.cpu_count() or 1) / plan.cpus))
    cores = 1 if plan.gpus else plan.cpus
    lines = {
        "trials": f"{runs:,} ({plan.search}: {len(points):,} points x {plan.seeds} seeds)",
        "axes": ", ".join(plan.space.varying()),
        "steps": f"{config.train.steps:,} each",
        "images": f"{images:,} at most, {images * gflop / 1e6:,.3f} PFLOP",
        "time": f"about {clock(seconds / at_once / cores)} of training, {at_once} at once, on a machine like this",
        "resources": f"{plan.cpus} CPUs and {plan.gpus:g} GPUs a trial, launcher {config.launch.launcher}",
        "results": str(plan.out),
    }
    if plan.search == "pbt":
        lines["generations"] = f"{config.train.steps // plan.grace:,} of {plan.grace:,} steps"
    elif plan.reduction:
        lines["early stopping"] = f"on FID, from step {plan.grace:,} on; one of {plan.reduction} goes on"
    return "\n".join(labelled(lines))


def _seconds_per_image(config: Config, device: torch.device) -> float:
    """Forward and backward."""
    model = build_model(config).to(device)
    count = min(64, config.train.global_batch)
    latents = torch.zeros(count, *config.data.latent_shape, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    gamma = torch.zeros(count, device=device) if config.objective.kind == "flow_matching" else None

    def learn() -> torch.Tensor:
        loss = model(latents, labels, gamma).square().mean()
        loss.backward()
        return loss

    return measured_seconds(learn, device) / count


def sweep(plan: Plan, hours: float | None) -> str:
    """Train all trials, or go on with a sweep that was begun; returns the closing report.

    Raises:
        EqmDistError: one sentence for the user.
    """
    ledger = Ledger(plan.out, _settings(plan), Trained, may_change=["trials"] * (plan.search == "random"))
    parent = _open_record(plan)
    if parent is not None:
        where = {"track.mlflow_uri": parent.tracking_uri, "track.experiment": _experiment(plan)}
        plan = replace(plan, config=with_overrides(plan.config, where))
    status, files, best = "FAILED", [], {}
    try:
        running = _Sweep(plan, ledger, parent, hours)
        if plan.search == "pbt":
            with cluster():  # one for all generations
                complete = running.population()
        else:
            complete = running.points()
        order = summaries(ledger.results)
        files = _write(plan, order, ledger.results)
        best = {"eval/fid": order[0].mean} if order else {}
        status = "FINISHED" if complete else "KILLED"
        return _report(plan, order, ledger.results, complete)
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        if parent is not None:
            SweepRecord(parent).finish(files, best, status)


class _Sweep:
    """Trains what the ledger does not have."""

    def __init__(self, plan: Plan, ledger: Ledger[Trained], parent: MlflowRun | None, hours: float | None) -> None:
        self._plan, self._ledger, self._parent = plan, ledger, parent
        self._deadline = None if hours is None else time.monotonic() + 3600 * hours

    def points(self) -> bool:
        """All points with all their seeds; False where the time was up before."""
        plan, seed = self._plan, self._plan.config.run.seed
        # Another attempt may have better luck; a population has gone on without them.
        self._ledger.results[:] = [trained for trained in self._ledger.results if trained.how != "lost"]
        known = {trained.name: trained for trained in self._ledger.results}
        trials: dict[str, Trial] = {}
        points: dict[str, Overrides] = {}
        for number in range(seed, seed + plan.seeds):
            for point in plan.points():
                name = f"{trial_name(point)}-s{number}"
                trials[name], points[name] = Trial(plan.config_of(point, name, number)), point
        past = {name: history(trials[name].directory) for name in known if name in trials}
        stop = EarlyStop(plan.grace, plan.reduction, past) if plan.reduction else None
        self._train([trial for name, trial in trials.items() if name not in known], points, stop)
        return trials.keys() <= {trained.name for trained in self._ledger.results}

    def population(self) -> bool:
        """Generation after generation: the worst members go on from the best ones, with changed keys.

        A generation of a member is a run that begins with the checkpoint of its parent's last generation, so what a
        member is follows from the ledger alone, and a killed sweep goes on with the generation that it was in.
        """
        plan, steps = self._plan, self._plan.grace
        members: list[tuple[Overrides, str | None]] = [(point, None) for point in plan.points()]
        for generation in range(plan.config.train.steps // steps):
            known = {trained.name: trained for trained in self._ledger.results}
            trials, points = [], {}
            for number, (point, parent) in enumerate(members):
                name = f"g{generation:03d}-m{number:03d}"
                ends = {"train.steps": (generation + 1) * steps, "checkpoint.every": steps, "evaluation.every": steps}
                config = plan.config_of(point, name, plan.config.run.seed, **ends)
                origin = None if parent is None else (Trial(config).directory.parent / parent, generation * steps)
                trials.append(Trial(config, origin))
                points[name] = point
            self._train([trial for trial in trials if trial.name not in known], points, None)
            known = {trained.name: trained for trained in self._ledger.results}
            if not all(trial.name in known for trial in trials):
                return False
            members = self._next([known[trial.name] for trial in trials], generation)
        return True

    def _next(self, trained: Sequence[Trained], generation: int) -> list[tuple[Overrides, str | None]]:
        """The members of the next generation, each with the run that it goes on from."""
        plan = self._plan
        order = sorted(range(len(trained)), key=lambda member: _fid(trained[member]))
        if trained[order[0]].fid is None:
            raise LaunchError(f"No member of generation {generation} gave an FID ({trained[order[0]].failure}).")
        replaced = max(1, len(order) // plan.reduction) if len(order) > 1 else 0
        worst = {*order[len(order) - replaced :], *(member for member in order if trained[member].fid is None)}
        members: list[tuple[Overrides, str | None]] = []
        for member, own in enumerate(trained):
            if member not in worst:
                members.append((own.overrides, own.name))
                continue
            draw = np.random.Generator(np.random.Philox(key=np.array([plan.config.run.seed, generation], np.uint64),
                                                        counter=[0, 0, 0, member]))  # fmt: skip
            better = trained[order[draw.integers(max(1, replaced))]]
            members.append((_explored(plan.space, better.overrides, draw), better.name))
        return members

    def _train(self, trials: Sequence[Trial], points: Mapping[str, Overrides], stop: EarlyStop | None) -> None:
        left = None if self._deadline is None else (self._deadline - time.monotonic()) / 3600
        if not trials or (left is not None and left <= 0):
            return
        plan, live = self._plan, _Live(trials, points, self._plan.space.varying(), self._ledger)

        def end(ending: Ending) -> None:
            trial = ending.trial
            live.end(ending)
            evaluated = history(trial.directory)
            step, fid = evaluated[-1] if evaluated else (0, None)
            seconds = last_values(trial.directory / METRICS_FILE).get("time/step_s", 0.0) * step
            if self._parent is not None and (trial.directory / MLFLOW_FILE).exists():
                status = {"complete": "FINISHED", "stopped": "KILLED"}.get(ending.how, "FAILED")
                close_run(recorded_run(trial.directory), status)
            # Last: what the ledger has is over, whatever kills this process.
            self._ledger.add(
                Trained(
                    name=trial.name,
                    overrides=dict(points[trial.name]),
                    seed=trial.config.run.seed,
                    how=ending.how,
                    step=step,
                    fid=None if ending.reason else fid,
                    seconds=seconds,
                    failure=ending.reason,
                )
            )

        run_trials(
            trials,
            workspace=plan.out.absolute() / "tune",
            cpus=plan.cpus,
            gpus=plan.gpus,
            parent=self._parent.run_id if self._parent else None,
            early_stop=stop,
            hours=left,
            on_result=live.result,
            on_end=end,
        )


class _Live:
    """A line for every evaluation: how far the trial is, the best so far, how many run, are over, when it will end."""

    def __init__(
        self, trials: Sequence[Trial], points: Mapping[str, Overrides], keys: Sequence[str], ledger: Ledger[Trained]
    ) -> None:
        self._points, self._keys, self._ledger = points, keys, ledger
        self._steps = {trial.name: trial.config.train.steps for trial in trials}
        self._done: dict[str, int] = {}
        self._over: dict[str, str] = {}
        self._best = min(map(_fid, ledger.results), default=float("inf"))
        self._started = time.monotonic()

    def result(self, trial: Trial, step: int, fid: float) -> None:
        """A trial has an FID."""
        self._best = min(fid, self._best)
        self._done[trial.name] = step
        share = sum(self._done.values()) / sum(self._steps.values())
        left = clock((time.monotonic() - self._started) * (1 / share - 1))
        how = Counter(self._over.values())
        logger.info(
            "%s (%s, seed %d) | step %s | FID %.3f, best %.3f | %d running, %d complete, %d stopped, %d failed of %d"
            " | at most %s left",
            trial.name, shown(self._points[trial.name], self._keys), trial.config.run.seed, f"{step:,}", fid,
            self._best, len(self._done.keys() - self._over.keys()), how["complete"], how["stopped"],
            how["failed"] + how["lost"], len(self._steps), left,
        )  # fmt: skip

    def end(self, ending: Ending) -> None:
        """A trial is over."""
        name = ending.trial.name
        self._over[name], self._done[name] = ending.how, self._steps[name]
        if ending.reason:
            logger.warning("%s (%s) %s: %s", name, shown(self._points[name], self._keys), ending.how, ending.reason)


def summaries(results: Sequence[Trained]) -> list[Summary]:
    """The points, those that were trained longest first, among them by mean FID; failed runs count for none."""
    found: dict[str, list[Trained]] = {}
    for trained in results:
        if trained.fid is not None:
            found.setdefault(trial_name(trained.overrides), []).append(trained)
    rows = []
    for runs in found.values():
        step = max(trained.step for trained in runs)
        fids = tuple(trained.fid for trained in runs if trained.step == step and trained.fid is not None)
        rows.append(Summary(runs[0].overrides, step, fids))
    return sorted(rows, key=lambda row: (-row.step, row.mean))


def _fid(trained: Trained) -> float:
    return float("inf") if trained.fid is None else trained.fid


def _explored(space: Space, point: Overrides, draw: np.random.Generator) -> Overrides:
    """A point near another: numbers times 0.8 or 1.25 within their interval, choices now and then another one."""
    alternative = next(part for part in space.alternatives if part.keys() == point.keys())
    explored: Overrides = {}
    for key, axis in alternative.items():
        if isinstance(axis, Interval):
            factor = (0.8, 1.25)[draw.integers(2)]
            explored[key] = axis.rounded(min(max(point[key] * factor, axis.low), axis.high))
        else:
            assert isinstance(axis, Choices)
            explored[key] = axis.at(draw.random()) if draw.random() < 0.25 else point[key]
    return explored


def _settings(plan: Plan) -> dict[str, Any]:
    """What decides the results of a sweep; where and how it runs may change."""
    config = flatten(dump(plan.config))
    kept = {
        key: value for key, value in config.items() if not key.startswith(("launch.", "track.", "run.name", "run.root"))
    }
    return {
        **kept,
        "space": [{key: vars(axis) for key, axis in part.items()} for part in plan.space.alternatives],
        "search": plan.search,
        "trials": plan.trials,
        "seeds": plan.seeds,
        "reduction": plan.reduction,
        "grace": plan.grace,
    }


def _open_record(plan: Plan) -> MlflowRun | None:
    track = plan.config.track
    if not track.mlflow:
        return None
    root = runs_root(plan.config.run.root)
    root.mkdir(parents=True, exist_ok=True)
    return open_run(
        plan.out,
        name=plan.out.name,
        tracking_uri=track.mlflow_uri or default_uri(root),
        experiment=_experiment(plan),
        params={"search": plan.search, "trials": len(plan.points()), "seeds": plan.seeds},
        config_yaml=to_yaml(plan.config),
        timeout_s=required(track.timeout_s),
        artifacts=root,
    )


def _experiment(plan: Plan) -> str:
    return f"{plan.config.track.experiment}-sweeps"


def _write(plan: Plan, order: Sequence[Summary], results: Sequence[Trained]) -> list[Path]:
    """The files of a sweep."""
    text = io.StringIO()
    rows, keys = csv.writer(text), list(dict.fromkeys(key for trained in results for key in trained.overrides))
    rows.writerow(["run", "how", "fid", "step", "seed", "seconds", "failure", *keys])
    place = {trial_name(summary.overrides): number for number, summary in enumerate(order)}
    ranked = sorted(results, key=lambda one: (place.get(trial_name(one.overrides), len(place)), one.seed, one.name))
    for one in ranked:
        kept = (one.name, one.how, one.fid, one.step, one.seed, f"{one.seconds:.1f}", one.failure)
        rows.writerow([*kept, *(one.overrides.get(key) for key in keys)])
    atomic_write(plan.out / CSV_FILE, text.getvalue().encode())
    files = [plan.out / CSV_FILE]
    if not order:
        return files
    best = order[0]
    config = dump(plan.config_of(best.overrides, "best", plan.config.run.seed))
    kept = {
        section: config[section]
        for section in ("data", "model", "objective", "optimizer", "train", "sampler", "evaluation")
    }
    origin = (
        f"# FID {best.mean:.3f} +- {best.spread:.3f} over {len(best.fids)} seeds, the best of {len(order):,} points\n"
    )
    atomic_write(plan.out / BEST_FILE, f"{origin}{yaml.safe_dump(kept, sort_keys=False)}".encode())
    files.append(plan.out / BEST_FILE)
    longest = [summary for summary in order if summary.step == best.step]
    keys = plan.space.varying()
    named = [(shown(summary.overrides, keys), summary.fids) for summary in longest]
    pictures = {"fid.png": fid_with_error_bars(named)}
    decays = [(plan.config_of(one.overrides, "best", 0).objective.decay, one.mean) for one in longest]
    if all(decay is not None for decay, _ in decays):
        pictures["c_gamma.png"] = c_gamma_curves([(build_decay(required(decay)), mean) for decay, mean in decays])
    if len(keys) > 1:
        values = [({short(key): summary.overrides.get(key) for key in keys}, summary.mean) for summary in longest]
        pictures["parallel.png"] = parallel_coordinates(values)
    for name, picture in pictures.items():
        picture.savefig(plan.out / name)
        files.append(plan.out / name)
    return files


def _report(plan: Plan, order: Sequence[Summary], results: Sequence[Trained], complete: bool) -> str:
    title = f"{plan.out} is complete" if complete else f"{plan.out}: the time is up; the same command goes on"
    keys = plan.space.varying()
    header = ["rank", "FID", "+-", "seeds", "step", *map(short, keys)]
    body = [
        [str(rank), f"{row.mean:.3f}", f"{row.spread:.3f}", str(len(row.fids)), f"{row.step:,}",
         *(str(row.overrides.get(key, "")) for key in keys)]
        for rank, row in enumerate(order[:20], start=1)
    ]  # fmt: skip
    lines = ["", title, "", *(aligned([header, *body]) if body else ())]
    lines += [f"{one.how}: {one.name} ({shown(one.overrides, keys)}): {one.failure}" for one in results if one.failure]
    if plan.search != "pbt" and any(one.how == "lost" for one in results):
        lines.append("The same command tries the lost ones again.")
    if body:
        lines += ["", f"  train it  python pipelines/train.py --config {plan.out / BEST_FILE} --run.name best"]
    return "\n".join(lines)
