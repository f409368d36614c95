"""The results of a sweep, on disk as soon as they are known. They are the truth; all else is made anew from them.

OUT/settings.json     what the sweep is; the same command goes on, another one is refused here
OUT/results.jsonl     a line for each result, written when it is known
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.record import append_records
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.track.jsonl import read_lines

SETTINGS_FILE, LEDGER_FILE = "settings.json", "results.jsonl"

R = TypeVar("R")


class Ledger(Generic[R]):
    """The results that there are, and the place where new ones go."""

    def __init__(
        self, out: Path, settings: Mapping[str, Any], kind: Callable[..., R], may_change: Sequence[str] = ()
    ) -> None:
        """Begin a sweep, or go on with the one in this directory.

        Args:
            out: its directory.
            settings: what decides its results.
            kind: the dataclass of a result.
            may_change: settings that may be others when it goes on.

        Raises:
            ConfigError: the directory is that of another sweep.
            StorageError: it cannot be written.
        """
        self._file = out / LEDGER_FILE
        self._followers: list[Callable[[R], None]] = []
        record, settings = out / SETTINGS_FILE, json.loads(json.dumps(settings))
        with storage_errors("create", out):
            out.mkdir(parents=True, exist_ok=True)
        before = json.loads(record.read_bytes()) if record.exists() else settings
        for key, value in settings.items():
            if before.get(key) != value and key not in may_change:
                raise ConfigError(
                    f"{key} was {json.dumps(before.get(key))} when the sweep in {out} began and is now"
                    f" {json.dumps(value)}; give another --out, or delete {out} to start over."
                )
        atomic_write(record, (json.dumps(settings, indent=1) + "\n").encode())
        lines = list(read_lines(self._file))
        atomic_write(self._file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.results = [kind(**line) for line in lines]

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
