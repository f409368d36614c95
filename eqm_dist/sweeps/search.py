"""What every sweep is asked for: a space, how it is searched, and where the results go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.errors import ConfigError
from eqm_dist.sweeps.spaces import Overrides, Space, recorded, restored, trial_name


@dataclass(frozen=True)
class Search:
    """A search of a space.

    Attributes:
        space: what is searched.
        how: ``grid``, ``random``, ``optuna`` (its TPE), or ``pbt``, population-based training (arXiv 1711.09846).
        trials: points that it draws, or members of a population; a grid has all points.
        seed: of what is drawn, and of the images or the trainings.
        out: directory of the sweep.
    """

    space: Space
    how: str
    trials: int
    seed: int
    out: Path

    def points(self) -> list[Overrides]:
        """The points; of a population those that it begins with; for Optuna what it might propose as it goes."""
        if self.how == "grid":
            return self.space.grid()
        if self.how == "optuna":
            return list(self.space.extremes())
        return self.space.random(self.trials, self.seed)

    @property
    def count(self) -> int:
        """How many points are tried."""
        return self.trials if self.how == "optuna" else len(self.points())

    @property
    def keys(self) -> list[str]:
        """The keys that vary: they tell points apart."""
        return self.space.varying()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results of a sweep, as far as all sweeps have it."""
        return {
            "space": recorded(self.space),
            "search": self.how,
            "trials": self.trials,
        }

    def may_change(self, key: str, before: Any) -> bool:
        """Whether a setting may be another than before when the sweep goes on.

        More points keep the old ones: of a search that draws them more trials, of a grid a space that holds the old
        one. A larger population does not: all that follows depends on its size.
        """
        if key == "space":
            return self.how == "grid" and self._holds(before)
        return key == "trials" and self.how != "pbt"

    def _holds(self, before: Any) -> bool:
        """Whether all points of a grid that was recorded are among these."""
        names = {trial_name(point) for point in self.points()}
        try:
            return all(trial_name(point) in names for point in restored(before).grid())
        except (TypeError, ValueError, KeyError, AttributeError, ConfigError):  # what is recorded is no grid
            return False
