"""What a sweep shows while it goes on."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from eqm_dist.logs import clock
from eqm_dist.sweeps.report import shown
from eqm_dist.sweeps.spaces import Overrides
from eqm_dist.text import counted

logger = logging.getLogger(__name__)


class Live:
    """A line of news: what happened, the best so far, how the trials are, how long it will take.

    Args:
        trials: how many there are.
        work: all of it, in any unit.
        keys: that vary.
        best: the lowest FID so far and its point, or None.
        every_s: no more than a line in so many seconds, but for the last one.
    """

    def __init__(
        self,
        trials: int,
        work: float,
        keys: Sequence[str],
        best: Callable[[], tuple[float, Overrides] | None],
        every_s: float = 0.0,
    ) -> None:
        self._trials, self._work, self._keys, self._best, self._every_s = trials, work, keys, best, every_s
        self._started = self._shown = time.monotonic()

    def show(self, news: str, done: float, trials: Mapping[str, int]) -> None:
        """Something happened.

        Args:
            news: what.
            done: of the work.
            trials: how many are ``complete``, ``failed``, ``running`` and the like.
        """
        now = time.monotonic()
        if now - self._shown < self._every_s and done < self._work:
            return
        self._shown, best = now, self._best()
        lowest = "no FID yet" if best is None else f"best FID {best[0]:.3f}: {shown(best[1], self._keys)}"
        ends = ", ".join(f"{number:,} {how}" for how, number in trials.items() if number) or "none complete"
        left = clock((now - self._started) * (self._work / done - 1))
        logger.info("%s | %s | %s of %s | at most %s left", news, lowest, ends, counted(self._trials, "trial"), left)
