"""Results of evaluations, a file a step, whoever made them: the training workers, or a task of its own beside them.

evaluations/step_00001000.json   {"step": 1000, "metrics": {...}, "pictures": [...], "seconds": 8.1}
                                 {"step": 1000, "failed": "why"}
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eqm_dist.documents import mapping_from_json, read_bounded, to_json
from eqm_dist.errors import DataError
from eqm_dist.run_directory import result_step, step_name
from eqm_dist.storage.files import atomic_write, storage_errors

SCORE = "eval/fid"
"""What makes a checkpoint better than another: lower is better."""


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of one run.

    Attributes:
        directory: holds one file for each evaluated step.
        every, last: the steps that are evaluated: multiples of ``every``, and ``last``. 0: none.
    """

    directory: Path
    every: int
    last: int
    _seen: set[int] = field(default_factory=set, compare=False)

    def due(self, step: int) -> bool:
        """Whether this step is to be evaluated."""
        return self.every > 0 and (step % self.every == 0 or step == self.last)

    def write(
        self, step: int, metrics: Mapping[str, float], pictures: Sequence[Path], seconds: float, precision: str
    ) -> None:
        """Record what was measured, in how many seconds and on images drawn in which precision.

        Raises:
            StorageError: the file cannot be written.
        """
        names = [str(picture) for picture in pictures]
        record = {"step": step, "metrics": dict(metrics), "pictures": names, "seconds": seconds, "precision": precision}
        self._write(step, record)

    def fail(self, step: int, reason: str) -> None:
        """Record that nothing could be measured, so that nobody waits for it."""
        self._write(step, {"step": step, "failed": reason})

    def results(self) -> dict[int, dict[str, Any]]:
        """All records by step, in order.

        Raises:
            DataError: one of them is damaged.
        """
        if not self.directory.is_dir():
            return {}
        steps = sorted(step for file in self.directory.iterdir() if (step := result_step(file.name)) is not None)
        return {step: self._read(step) for step in steps}

    def awaited(self, steps: Iterable[int]) -> list[int]:
        """Those of the steps that are to be evaluated and have no record yet."""
        done = self.results()
        return [step for step in steps if self.due(step) and step not in done]

    def best(self, steps: Iterable[int], number: int) -> set[int]:
        """Those of the steps with the lowest FIDs, at most ``number``."""
        results = self.results()
        scores = {step: results.get(step, {}).get("metrics", {}).get(SCORE) for step in steps}
        measured = [step for step, score in scores.items() if score is not None]
        return set(sorted(measured, key=lambda step: scores[step])[:number])

    def restart(self, step: int) -> None:
        """Forget what a run that goes on from ``step`` does again: later evaluations, and failed ones."""
        for at, record in self.results().items():
            if at > step or "failed" in record:
                self._file(at).unlink(missing_ok=True)
                self._seen.discard(at)

    def news(self) -> Iterator[dict[str, Any]]:
        """The records that were not there, or not yet seen, when this was asked before."""
        for step, record in self.results().items():
            if step not in self._seen:
                self._seen.add(step)
                yield record

    def seen(self, steps: Iterable[int]) -> None:
        """These are no news."""
        self._seen.update(steps)

    def _read(self, step: int) -> dict[str, Any]:
        path = self._file(step)
        try:
            record = mapping_from_json(read_bounded(path))
            if record.get("step") != step or not isinstance(record.get("metrics", {}), dict):
                raise ValueError("it is no result of this step")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} must be a result of an evaluation ({error}); delete it.") from None
        return record

    def _file(self, step: int) -> Path:
        return self.directory / f"{step_name(step)}.json"

    def _write(self, step: int, record: Mapping[str, Any]) -> None:
        with storage_errors("create", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        atomic_write(self._file(step), (to_json(record, 1) + "\n").encode())
