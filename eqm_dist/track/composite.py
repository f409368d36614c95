"""Several trackers as one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eqm_dist.train.loop import Tracker


class CompositeTracker:
    """Hands everything to each of its trackers, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record with every tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Record with every tracker."""
        for tracker in self._trackers:
            tracker.log_image(step, key, path)

    def go_back(self, step: int) -> None:
        """Tell every tracker."""
        for tracker in self._trackers:
            tracker.go_back(step)

    def finish(self) -> None:
        """Finish every tracker."""
        for tracker in self._trackers:
            tracker.finish()
