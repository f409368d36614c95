"""The results of a sweep, on disk as soon as they are known. They are the truth; all else is made anew from them.

OUT/settings.json     what the sweep is; the same command goes on, another one is refused here
OUT/results.jsonl     a line for each result, written when it is known
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from eqm_dist.documents import mapping_from_json, read_bounded, to_json
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.record import append_records
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.track.jsonl import read_lines

SETTINGS_FILE, LEDGER_FILE = "settings.json", "results.jsonl"

R = TypeVar("R")

MayChange = Callable[[str, Any], bool]
"""Whether a setting that had this value may be another when the sweep goes on."""


class Ledger(Generic[R]):
    """The results that there are, and the place where new ones go."""

    def __init__(
        self,
        out: Path,
        settings: Mapping[str, Any],
        kind: type[R],
        may_change: MayChange = lambda key, before: False,
    ) -> None:
        """Begin a sweep, or go on with the one in this directory.

        Args:
            out: its directory.
            settings: what decides its results.
            kind: the dataclass of a result.
            may_change: whether a setting may be another when it goes on.

        Raises:
            ConfigError: the directory is that of another sweep.
            DataError: what lies there is no ledger.
            StorageError: it cannot be written.
        """
        self._file = out / LEDGER_FILE
        self._followers: list[Callable[[R], None]] = []
        record, settings = out / SETTINGS_FILE, json.loads(json.dumps(settings))
        with storage_errors("create", out):
            out.mkdir(parents=True, exist_ok=True)
        before = _recorded(record) if record.exists() else settings
        for key, value in settings.items():
            if before.get(key) != value and not may_change(key, before.get(key)):
                raise ConfigError(
                    f"{key} was {_briefly(before.get(key))} when the sweep in {out} began and is now"
                    f" {_briefly(value)}; give another --out, or delete {out} to start over."
                )
        atomic_write(record, (json.dumps(settings, indent=1) + "\n").encode())
        lines = list(read_lines(self._file))
        atomic_write(self._file, "".join(to_json(line) + "\n" for line in lines).encode())
        self.results = [self._result(kind, line) for line in lines]

    def _result(self, kind: type[R], line: Mapping[str, Any]) -> R:
        try:
            return TypeAdapter(kind).validate_python(line)
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"]))
            raise DataError(
                f"Every line of {self._file} must be a result of this kind of sweep, and one is not ({place}:"
                f" {wrong['msg']}); delete that line, or give another --out."
            ) from None

    def follow(self, follower: Callable[[R], None]) -> None:
        """Tell somebody of every result, of those that there are and of those to come."""
        for result in self.results:
            follower(result)
        self._followers.append(follower)

    def add(self, result: R) -> None:
        """Keep a result.

        Raises:
            StorageError: it cannot be written.
        """
        append_records(self._file, [asdict(cast("Any", result))])
        self.results.append(result)
        for follower in self._followers:
            follower(result)

    def forget(self, unwanted: Callable[[R], bool]) -> None:
        """Go on as if some results were not known. Their lines stay."""
        self.results[:] = [result for result in self.results if not unwanted(result)]


def _recorded(file: Path) -> dict[str, Any]:
    """What a sweep has written of itself."""
    try:
        with storage_errors("read", file):
            return mapping_from_json(read_bounded(file))
    except ValueError as error:
        raise DataError(
            f"{file} must be the JSON that says what a sweep is, and cannot be read as such ({error}); give another"
            " --out, or restore it."
        ) from None


def _briefly(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
