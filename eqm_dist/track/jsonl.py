"""``metrics.jsonl``: one line per step that was reported, readable without any server."""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from eqm_dist.documents import mapping_from_json, to_json
from eqm_dist.errors import DataError, StorageError
from eqm_dist.storage.files import atomic_write, storage_errors

logger = logging.getLogger(__name__)


class JsonlTracker:
    """Appends ``{"step": ..., name: value, ...}`` lines to a file.

    Opened at a step, it first drops what an earlier attempt wrote after that step: those steps are done again. What a
    full disk refuses is kept and written with the next line: a save that is about to fail may have filled it.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._unwritten: list[dict[str, Any]] = []
        self.go_back(resume_step)

    def go_back(self, step: int) -> None:
        """Drop the lines of later steps."""
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        self._unwritten = [line for line in self._unwritten if line["step"] <= step]
        atomic_write(self._path, _text(kept))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        self._unwritten.append({"step": step, **metrics})
        waiting = len(self._unwritten)
        try:
            self._append()
            if waiting > 1:
                logger.info("%s is written again, and has what it missed", self._path)
        except StorageError as error:
            if waiting == 1:
                logger.warning("warning: %s Metrics from step %s on are kept and written later.", error, f"{step:,}")

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Nothing: the picture lies on disk already."""

    def finish(self) -> None:
        """Write what could not be written. No error, which would hide the one that the run ends with."""
        try:
            if self._unwritten:
                self._append()
        except StorageError as error:
            logger.warning("warning: %s The last %d lines are not in it.", error, len(self._unwritten))

    def _append(self) -> None:
        with storage_errors("append to", self._path), self._path.open("ab", buffering=0) as file:
            size, rest = os.fstat(file.fileno()).st_size, _text(self._unwritten)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)  # never half a line
                raise
        self._unwritten = []


def _text(lines: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(to_json(line) + "\n" for line in lines).encode()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, in which null is a number that was not finite.

    Raises:
        DataError: a line is damaged.
    """
    for line in read_lines(path):
        if type(line.get("step")) is not int:
            raise DataError(f"Every line of {path} must say its step, and one holds {str(line)[:100]}; delete it.")
        yield {name: math.nan if value is None else value for name, value in line.items()}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects; empty lines, and a line that a kill cut short, are none.

    Raises:
        DataError: a line is damaged.
        StorageError: the file cannot be read.
    """
    if not path.exists():
        return
    with storage_errors("read", path):
        content = path.read_bytes()
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        if line.strip():
            try:
                yield mapping_from_json(line)
            except ValueError as error:
                raise DataError(f"Line {number:,} of {path} must be a JSON object ({error}); delete it.") from None


def last_values(path: Path) -> dict[str, float]:
    """The newest value of every metric."""
    values: dict[str, float] = {}
    for line in read_metrics(path):
        values |= line
    values.pop("step", None)
    return values
