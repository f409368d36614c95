"""What must survive a restart besides weights and optimizer: a handful of numbers."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Progress of a run, kept in the marker of its checkpoints.

    Attributes:
        step: updates that were made or skipped.
        updates: of these, those that were made.
        skipped: updates skipped in all, those that the run has gone back behind included.
        skipped_in_a_row: updates skipped since the last one that was made.
        rollbacks: how often the run has gone back to a checkpoint.
        passed_over: batches left behind by that; the next update takes batch ``step + passed_over``.
        usual_norm: running mean of the gradient norms of updates that were made.
        norms: how many it stands for.
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    passed_over: int = 0
    usual_norm: float = 0.0
    norms: int = 0

    @property
    def batch(self) -> int:
        """Number of the next batch."""
        return self.step + self.passed_over

    def count_step(self) -> None:
        """One more step, with or without an update."""
        self.step += 1
        self.updates += self.skipped_in_a_row == 0

    def images_seen(self, global_batch: int) -> int:
        """Samples consumed so far, which is also the position of the next one."""
        return self.batch * global_batch

    def go_back(self, saved: "TrainState") -> None:
        """Be where a checkpoint was, but go on with the batches that come now; counts of what went wrong stay."""
        self.passed_over = self.batch - saved.step
        self.step, self.updates = saved.step, saved.updates
        self.usual_norm, self.norms = saved.usual_norm, saved.norms
        self.skipped_in_a_row = 0
        self.rollbacks += 1
