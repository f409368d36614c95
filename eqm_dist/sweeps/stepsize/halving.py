"""Successive halving on the number of samples: every trial is measured with few, the best of them with more, and the
last few with other seeds too.

Images of an earlier rung are not drawn again: image i depends on (weights, sampler, seed, i) alone, so only new indices
are drawn and their statistics are added to those that lie in OUT/statistics until the sweep is complete.
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path

from eqm_dist.errors import DataError
from eqm_dist.evaluate.references import load_statistics, save_statistics
from eqm_dist.evaluate.statistics import ImageStatistics, compute
from eqm_dist.launch.actors import open_actors
from eqm_dist.launch.descents import Descent, Measured, MeasureDescent, units
from eqm_dist.sweeps.deadline import Deadline
from eqm_dist.sweeps.ledger import Ledger
from eqm_dist.sweeps.live import Live
from eqm_dist.sweeps.spaces import Overrides, trial_name
from eqm_dist.sweeps.stepsize.plan import Plan
from eqm_dist.sweeps.stepsize.results import Result, finalists, measured_with, ranked, survivors
from eqm_dist.sweeps.stepsize.tpe import TpeSearch

SHOW_EVERY_S = 5.0
ASKED_AT_ONCE = 4
"""Points that Optuna proposes before it hears of the first of them."""

Run = Callable[[Iterable[Descent]], Iterator[tuple[Descent, list[Measured] | str]]]


class Halving:
    """Measures the trials of a plan that its ledger does not have yet.

    Args:
        plan: what is measured.
        ledger: gets every result.
        reference: statistics of the images that are compared with.
        deadline: no task is begun after it.
    """

    def __init__(self, plan: Plan, ledger: Ledger[Result], reference: ImageStatistics, deadline: Deadline) -> None:
        self._plan, self._ledger, self._reference, self._deadline = plan, ledger, reference, deadline
        self._statistics = plan.search.out / "statistics"
        self._stack = ExitStack()
        self._run: Run | None = None

    def measure_all(self) -> bool:
        """Go from rung to rung, and compare the finalists; False where the time was up before the end.

        Raises:
            EqmDistError: actors died again and again, or the machine cannot read or write.
        """
        with self._stack:
            if self._plan.search.how == "optuna":
                self._search()
            else:
                self._measure(self._plan.search.points(), 0)
            for rung in range(1, len(self._plan.rungs)):
                known = measured_with(self._ledger.results, self._plan.rungs[rung - 1])
                if not self._deadline.passed:
                    best = survivors(known.values(), self._plan.reduction)
                    self._measure([result.overrides for result in best], rung)
            self._compare()
        if self._deadline.passed:
            return False
        shutil.rmtree(self._statistics, ignore_errors=True)
        return True

    def _compare(self) -> None:
        """Measure the finalists with each of the seeds that compare them."""
        samples, seeds = self._plan.rungs[-1], self._plan.comparing_seeds
        best = finalists(self._ledger.results, samples, self._plan.finalists)
        for seed in seeds:
            if not self._deadline.passed:
                self._measure([result.overrides for result in best], len(self._plan.rungs) - 1, seed)

    def _search(self) -> None:
        """The first rung where Optuna proposes the points, by FID and NFE."""
        samples, trials = self._plan.rungs[0], self._plan.search.trials
        known = measured_with(self._ledger.results, samples)
        search = TpeSearch(
            self._plan.search.space,
            objectives=("FID", "NFE"),
            seed=self._plan.search.seed + len(known),  # the same seed would propose the first points again
            storage=self._plan.storage,
            name=self._plan.study,
        )
        for result in known.values():
            search.tell(result.overrides, _objectives(result))
        # Where the space has fewer points than trials were asked for, the same ones are proposed again and again.
        asks_left = 10 * trials
        while len(known) < trials and asks_left > 0 and not self._deadline.passed:
            asked = [search.ask() for _ in range(min(ASKED_AT_ONCE, trials - len(known)))]
            asks_left -= len(asked)
            self._measure(asked, 0)
            known = measured_with(self._ledger.results, samples)
            for point in asked:
                if (result := known.get(trial_name(point))) is not None:
                    search.tell(point, _objectives(result))

    def _measure(self, points: Sequence[Overrides], rung: int, seed: int | None = None) -> None:
        """Bring these points to the samples of a rung, but for those that are there; with a seed, all of its images."""
        samples = self._plan.rungs[rung]
        known = measured_with(self._ledger.results, samples, seed)
        pending = {trial: point for point in points if (trial := trial_name(point)) not in known}
        earlier = {} if seed is not None else self._earlier(pending, rung)
        tasks = self._tasks(pending, earlier, samples, self._plan.search.seed if seed is None else seed)
        left = Counter(trial for task in tasks for trial in task.trials)
        sums: dict[str, Measured] = {}
        news, done = f"rung {rung + 1} of {len(self._plan.rungs)}, {samples:,} samples", 0
        if seed is not None:
            of = self._plan.comparing_seeds
            news = f"comparison {of.index(seed) + 1} of {len(of)}, seed {seed}, {samples:,} samples"
        live = Live(len(left), sum(map(_cost, tasks)), self._plan.search.keys, self._best, SHOW_EVERY_S)
        for task, outcome in self._run_tasks(tasks):
            for at, trial in enumerate(task.trials):
                left[trial] -= 1
                if trial not in pending:  # one of its tasks has failed already
                    continue
                if isinstance(outcome, str):
                    self._ledger.add(Result(pending.pop(trial), samples, None, None, 0.0, outcome, seed))
                    continue
                sums[trial] = sums[trial] + outcome[at] if trial in sums else outcome[at]
                if not left[trial]:
                    before = earlier.get(trial)
                    self._ledger.add(self._result(pending.pop(trial), samples, sums.pop(trial), before, seed))
            done += _cost(task)
            live.show(news, done, self._ends(left.keys() - pending.keys(), samples, seed))
        if not self._deadline.passed and seed is None:
            for file in self._statistics.glob("*"):
                if file.stem not in measured_with(self._ledger.results, samples):
                    file.unlink()

    def _run_tasks(self, tasks: Sequence[Descent]) -> Iterator[tuple[Descent, list[Measured] | str]]:
        if not tasks:
            return
        if self._run is None:
            evaluation = self._plan.model.config.evaluation
            work = MeasureDescent(
                model=self._plan.model,
                labels=self._plan.labels,
                extractor=evaluation.extractor,
                weights=evaluation.extractor_weights,
                batch=self._plan.batch,
            )
            self._run = self._stack.enter_context(open_actors(work, self._plan.launcher, self._plan.actors))
        yield from self._run(takewhile(lambda _: not self._deadline.passed, tasks))

    def _tasks(
        self,
        pending: Mapping[str, Overrides],
        earlier: Mapping[str, tuple[Result, ImageStatistics]],
        samples: int,
        seed: int,
    ) -> list[Descent]:
        """The longest descents first, so that no actor is left with one at the end; the parts of each together."""
        tasks: list[Descent] = []
        starts = {trial: earlier[trial][0].samples if trial in earlier else 0 for trial in pending}
        for start in sorted(set(starts.values())):
            there = [point for trial, point in pending.items() if starts[trial] == start]
            for points in self._plan.descents(there):
                trials = tuple(trial_name(point) for point in points)
                sampler = {key: value for key, value in self._plan.sampler(points[0]).items() if key != "nfe"}
                nfe = tuple(self._plan.nfe(point) for point in points)
                tasks += [Descent(trials, sampler, nfe, seed, *unit) for unit in units(samples, start)]
        return sorted(tasks, key=lambda task: -task.nfe[-1])

    def _earlier(self, pending: Iterable[str], rung: int) -> dict[str, tuple[Result, ImageStatistics]]:
        """What the rung before left of these trials; a kill may have taken the statistics of some."""
        found: dict[str, tuple[Result, ImageStatistics]] = {}
        known = measured_with(self._ledger.results, self._plan.rungs[rung - 1]) if rung else {}
        for trial in pending:
            if trial in known and self._file(trial).exists():
                try:
                    statistics, _ = load_statistics(self._file(trial))
                except DataError:  # damaged: its images are drawn again
                    continue
                if statistics.count == known[trial].samples:
                    found[trial] = known[trial], statistics
        return found

    def _result(
        self,
        point: Overrides,
        samples: int,
        measured: Measured,
        earlier: tuple[Result, ImageStatistics] | None,
        seed: int | None,
    ) -> Result:
        statistics, nfe, seconds = measured.statistics, float(measured.nfe), measured.seconds
        if measured.diverged:
            reason = f"it diverges: {measured.diverged:,} images of {statistics.count:,} are not finite numbers"
            return Result(point, samples, None, None, seconds, reason, seed)
        if earlier is not None:
            before, kept = earlier
            statistics, nfe = statistics + kept, nfe + (before.nfe or 0.0) * before.samples
            seconds += before.seconds
        fid = compute(["fid"], statistics, self._reference)["fid"]
        if not math.isfinite(fid):
            reason = f"its FID is {fid}: the features are too large"
            return Result(point, samples, None, None, seconds, reason, seed)
        if seed is None:  # another rung may add to them
            save_statistics(self._file(trial_name(point)), statistics, str(self._plan.search.out))
        return Result(point, samples, fid, nfe / samples, seconds, None, seed)

    def _file(self, trial: str) -> Path:
        return self._statistics / f"{trial}.safetensors"

    def _best(self) -> tuple[float, Overrides] | None:
        order = ranked(self._ledger.results)
        return (order[0].fid, order[0].overrides) if order and order[0].fid is not None else None

    def _ends(self, trials: Collection[str], samples: int, seed: int | None) -> Counter[str]:
        """How these trials ended."""
        known = measured_with(self._ledger.results, samples, seed)
        return Counter("complete" if known[trial].fid is not None else "failed" for trial in trials)


def _cost(task: Descent) -> int:
    return (task.stop - task.start) * task.nfe[-1]


def _objectives(result: Result) -> tuple[float, float] | None:
    return None if result.fid is None or result.nfe is None else (result.fid, result.nfe)
