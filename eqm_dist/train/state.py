"""What must survive a restart besides weights and optimizer: a handful of numbers."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run, kept in the marker of its checkpoints.

    Attributes:
        step: updates that were made or skipped.
        passed_over: batches that a rollback left behind; the next update takes batch ``step + passed_over``.
    """

    step: int = 0
    passed_over: int = 0

    def images_seen(self, global_batch: int) -> int:
        """Samples consumed so far, which is also the position of the next one."""
        return (self.step + self.passed_over) * global_batch
