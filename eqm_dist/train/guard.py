"""The guard: skips updates that would do harm, and says when skipping does not help (docs/decisions/0013).

It judges by the norm of the whole gradient, the one number that all ranks know alike before an update. What it
remembers is part of the run's state, so that a resumed run judges as the uninterrupted one.
"""

import math
from dataclasses import dataclass

from eqm_dist.train.state import TrainState


@dataclass(frozen=True)
class Guard:
    """The rule by which updates are made or skipped.

    Attributes:
        spike_factor: an update is skipped if its gradient's norm is above this multiple of the usual one; None: never.
        spike_window: the usual norm is a running mean over about so many updates; with fewer there is none yet.
        max_skips: updates skipped in a row after which the run goes back to a checkpoint.
        max_rollbacks: how often it goes back to the same checkpoint before it is given up.
    """

    spike_factor: float | None
    spike_window: int
    max_skips: int
    max_rollbacks: int

    def accepts(self, state: TrainState, norm: float) -> bool:
        """Judge the next update by the norm of its gradient, and enter the judgement into ``state``."""
        usual = math.inf
        if self.spike_factor is not None and state.norms == self.spike_window:
            usual = self.spike_factor * state.usual_norm
        if not math.isfinite(norm) or norm > usual:
            state.skipped += 1
            state.skipped_in_a_row += 1
            return False
        state.skipped_in_a_row = 0
        state.norms = min(state.norms + 1, self.spike_window)
        state.usual_norm += (norm - state.usual_norm) / state.norms  # the mean at first, then exponential
        return True

    def gives_up(self, state: TrainState) -> bool:
        """Whether skipping has not helped."""
        return state.skipped_in_a_row == self.max_skips
