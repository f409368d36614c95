"""What must survive a restart besides weights and optimizer: a handful of integers."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run. ``step`` counts completed updates; everything else follows from it."""

    step: int = 0

    def images_seen(self, global_batch: int) -> int:
        """Samples consumed so far, which is also the position of the next one."""
        return self.step * global_batch
