"""Runs of a sweep as trials of Ray Tune, each into the ledger when it is over."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eqm_dist.launch.ray_tune import EarlyStop, Ending, Trial, history, run_trials
from eqm_dist.logs import log_file
from eqm_dist.run_directory import METRICS_FILE
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.results import Trained
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.live import Live
from eqm_dist.sweeps.report import shown
from eqm_dist.sweeps.spaces import Overrides
from eqm_dist.track.jsonl import last_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run of a sweep: what is trained, and the point that it is."""

    trial: Trial
    point: Overrides

    @property
    def name(self) -> str:
        return self.trial.name

    @property
    def seed(self) -> int:
        return self.trial.config.run.seed


@dataclass(frozen=True)
class Trainer:
    """Trains runs that the ledger does not have.

    Attributes:
        plan: whose runs they are.
        ledger: gets each of them.
        deadline: no run goes on after it.
        parent: MLflow run below which theirs are shown, or None.
    """

    plan: Plan
    ledger: Ledger[Trained]
    deadline: Deadline
    parent: str | None

    def known(self) -> dict[str, Trained]:
        """The runs that are over, by name."""
        return {trained.name: trained for trained in self.ledger.results}

    def train(self, runs: Sequence[Run], early_stop: EarlyStop | None = None) -> bool:
        """Train those that are not over; whether all are then.

        Raises:
            LaunchError: there is no cluster, or it has no room for a run.
        """
        known = self.known()
        missing = {run.name: run for run in runs if run.name not in known}
        if missing and not self.deadline.passed:
            news = _News(missing, self.ledger, self.plan.search.keys)

            def end(ending: Ending) -> None:
                news.end(ending)
                self.ledger.add(_trained(missing[ending.trial.name], ending))

            run_trials(
                [run.trial for run in missing.values()],
                workspace=self.plan.search.out.absolute() / "tune",
                cpus=self.plan.cpus,
                gpus=self.plan.gpus,
                parent=self.parent,
                early_stop=early_stop,
                hours=self.deadline.hours_left,
                on_result=news.result,
                on_end=end,
            )
        return {run.name for run in runs} <= self.known().keys()


def _trained(run: Run, ending: Ending) -> Trained:
    evaluated = history(run.trial.directory)
    step, fid = evaluated[-1] if evaluated else (0, None)
    return Trained(
        name=run.name,
        overrides=dict(run.point),
        seed=run.seed,
        how=ending.how,
        step=step,
        fid=None if ending.reason else fid,
        seconds=last_values(run.trial.directory / METRICS_FILE).get("time/step_s", 0.0) * step,
        failure=ending.reason,
        parent=run.trial.origin[0].name if run.trial.origin else None,
    )


class _News:
    """Tells the live view of every evaluation, and of what failed."""

    def __init__(self, runs: Mapping[str, Run], ledger: Ledger[Trained], keys: Sequence[str]) -> None:
        self._runs, self._keys = runs, keys
        self._steps = {name: run.trial.config.train.steps for name, run in runs.items()}
        self._done: dict[str, int] = {}
        self._over: dict[str, str] = {}
        found = [(trained.fid, trained.overrides) for trained in ledger.results if trained.fid is not None]
        self._best = min(found, key=lambda one: one[0], default=None)
        self._live = Live(len(runs), sum(self._steps.values()), keys, lambda: self._best)

    def result(self, trial: Trial, step: int, fid: float) -> None:
        """A trial has an FID."""
        point = self._runs[trial.name].point
        if self._best is None or fid < self._best[0]:
            self._best = fid, point
        self._done[trial.name] = step
        news = f"{trial.name} ({shown(point, self._keys)}, seed {trial.config.run.seed}), step {step:,}: FID {fid:.3f}"
        self._live.show(news, sum(self._done.values()), self._trials())

    def end(self, ending: Ending) -> None:
        """A trial is over."""
        name = ending.trial.name
        self._over[name], self._done[name] = ending.how, self._steps[name]
        if ending.reason:
            run = self._runs[name]
            point = f" ({found})" if (found := shown(run.point, self._keys)) else ""
            log = log_file(run.trial.directory, 0)
            logger.warning("%s%s %s: %s; its log is %s", name, point, ending.how, ending.reason, log)

    def _trials(self) -> Mapping[str, int]:
        running = len(self._done.keys() - self._over.keys())
        return {"running": running, **Counter(self._over.values())}
