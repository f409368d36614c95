"""The learning rate as a closed form of the step: nothing to save, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal, assert_never


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up from zero, then constant or decayed to zero at the last step."""

    peak: float
    steps: int
    warmup_steps: int = 0
    shape: Literal["constant", "cosine", "linear"] = "constant"

    def __call__(self, step: int) -> float:
        """Learning rate of the update that follows ``step`` completed ones."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        match self.shape:
            case "constant":
                return self.peak
            case "cosine":
                return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
            case "linear":
                return self.peak * (1 - progress)
            case _:
                assert_never(self.shape)
