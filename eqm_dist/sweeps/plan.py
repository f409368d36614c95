"""What a sweep over the samplers of one model is: its trials, its rungs, and how its work is divided."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.config import Config
from eqm_dist.launch.descents import shares_descent
from eqm_dist.options import Axis, dump, keys_with
from eqm_dist.pretrained import Pretrained
from eqm_dist.sweeps.spaces import Overrides, Space

PREFIX = "sampler."
AXES = [key for key in keys_with(Config, Axis) if key.startswith(PREFIX)]
"""What can be swept."""


@dataclass(frozen=True)
class Plan:
    """A sweep, checked.

    Attributes:
        model: what draws the images.
        space: what is searched.
        search: ``grid``, ``random`` or ``optuna``.
        trials: points of a random or Optuna search; of a grid all.
        rungs: numbers of samples, rising; every trial is measured with the first, the best of each with the next.
        reduction: one of so many trials goes on to the next rung, and the Pareto front of FID against NFE.
        labels, seed: as ``evaluate.labels`` and ``Pretrained.generate`` take them.
        batch: images that an actor draws at once.
        launcher, actors: ``ray`` with at most so many actors, or ``local``.
        out: directory of the sweep.
    """

    model: Pretrained
    space: Space
    search: str
    trials: int
    rungs: tuple[int, ...]
    reduction: int
    labels: str
    seed: int
    batch: int
    launcher: str
    actors: int | None
    out: Path

    def points(self) -> list[Overrides]:
        """The trials, but for Optuna, which proposes them as it goes: what it might propose."""
        if self.search == "grid":
            return self.space.grid()
        if self.search == "random":
            return self.space.random(self.trials, self.seed)
        return list(self.space.extremes())

    def sampler(self, point: Overrides) -> dict[str, Any]:
        """A point as keys of ``sampler`` that turn the model's own sampler into that of the trial."""
        return {key.removeprefix(PREFIX): value for key, value in point.items()}

    def model_of(self, point: Overrides) -> Pretrained:
        """The model with the sampler of a trial.

        Raises:
            ConfigError: the trial cannot be.
        """
        return self.model.with_sampler(**self.sampler(point))

    def descents(self, points: Sequence[Overrides]) -> Iterator[list[Overrides]]:
        """The points in groups that share a descent, by rising NFE."""
        groups: dict[str, dict[int, Overrides]] = {}
        for point in points:
            sampler = self.model_of(point).config.sampler
            shared = dump(sampler) | ({"nfe": None} if shares_descent(sampler) else {})
            groups.setdefault(json.dumps(shared), {})[sampler.nfe] = point
        return ([group[nfe] for nfe in sorted(group)] for group in groups.values())

    def nfe(self, point: Overrides) -> int:
        """The highest NFE that an image of a trial may take."""
        return self.model_of(point).config.sampler.nfe
