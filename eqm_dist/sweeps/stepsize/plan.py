"""What a sweep over the samplers of one model is: its trials, its rungs, and which trials share a descent."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.config import Config, TrackConfig
from eqm_dist.launch.descents import shares_descent
from eqm_dist.options import Axis, dump, keys_with
from eqm_dist.pretrained import Pretrained
from eqm_dist.runs import runs_root
from eqm_dist.sweeps.search import Search
from eqm_dist.sweeps.spaces import Overrides

PREFIX = "sampler."
AXES = [key for key in keys_with(Config, Axis) if key.startswith(PREFIX)]
"""What can be swept."""


@dataclass(frozen=True)
class Plan:
    """A sweep, checked.

    Attributes:
        model: what draws the images.
        search: ``grid``, ``random`` or ``optuna``; its seed is that of the images too.
        track: where the sweep is recorded. The user says it, and never the config of a model that others may have made.
        rungs: numbers of samples, rising; every trial is measured with the first, the best of each with the next.
        reduction: one of so many trials goes on to the next rung, and the Pareto front of FID against NFE.
        finalists: so many of the best trials of the last rung are compared with other seeds; 1 compares none.
        seeds: how many seeds compare them, those that follow the seed of the search. That one is none of them, for
            whoever is chosen by a seed owes a part of its FID there to luck.
        storage: where Optuna's study is kept to be looked at, as ``tpe.open_storage`` takes it, or None.
        labels: as ``evaluate.labels`` takes them.
        batch: images that an actor draws at once.
        launcher, actors: ``ray`` with at most so many actors, or ``local``.
    """

    model: Pretrained
    search: Search
    track: TrackConfig
    rungs: tuple[int, ...]
    reduction: int
    finalists: int
    seeds: int
    storage: str | None
    labels: str
    batch: int
    launcher: str
    actors: int | None

    @property
    def root(self) -> Path:
        """The directory of the runs, the model among them if it is one."""
        run = self.model.run
        return run.parent if isinstance(run, Path) and self.model.own else runs_root()

    @property
    def study(self) -> str:
        """What Optuna calls the sweep: sweeps that share a storage have directories of their own."""
        return str(self.search.out.absolute())

    @property
    def comparing_seeds(self) -> range:
        """The seeds that compare the finalists."""
        first = self.search.seed + 1
        return range(first, first + self.seeds if self.finalists > 1 else first)

    def sampler(self, point: Overrides) -> dict[str, Any]:
        """A point as keys of ``sampler`` that turn the model's own sampler into that of the trial."""
        return {key.removeprefix(PREFIX): value for key, value in point.items()}

    def model_of(self, point: Overrides) -> Pretrained:
        """The model with the sampler of a trial.

        Raises:
            ConfigError: the trial cannot be.
        """
        return self.model.with_sampler(**self.sampler(point))

    def nfe(self, point: Overrides) -> int:
        """The highest NFE that an image of a trial may take."""
        return self.model_of(point).config.sampler.nfe

    def descents(self, points: Sequence[Overrides]) -> Iterator[list[Overrides]]:
        """The points in groups, each the points of one trajectory, by rising NFE."""
        groups: dict[str, dict[int, Overrides]] = {}
        for point in points:
            sampler = self.model_of(point).config.sampler
            shared = dump(sampler) | ({"nfe": None} if shares_descent(sampler) else {})
            groups.setdefault(json.dumps(shared), {})[sampler.nfe] = point
        return ([group[nfe] for nfe in sorted(group)] for group in groups.values())


def check(plan: Plan) -> None:
    """Build every trial's sampler, and whatever else can fail before anything is computed.

    Raises:
        EqmDistError: one sentence for the user.
    """
    for point in plan.search.points():
        plan.model_of(point)
    plan.model.autoencoder  # noqa: B018 (fails here, in one sentence, and not on every actor)
