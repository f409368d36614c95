"""What a sweep found: a line for each result, their ranking, the Pareto front, a table, best.yaml.

OUT/settings.json     what the sweep is; the same command goes on, another one is refused here
OUT/results.jsonl     a line for each result, written when it is known
OUT/results.csv       a row for each trial, the best first
OUT/best.yaml         the config keys of the best trial
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.record import append_records
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.sweeps.spaces import trial_name
from eqm_dist.text import aligned
from eqm_dist.track.jsonl import read_metrics

SETTINGS_FILE, LEDGER_FILE, CSV_FILE, BEST_FILE = "settings.json", "results.jsonl", "results.csv", "best.yaml"

R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """What a trial gave.

    Attributes:
        overrides: the trial: dotted keys with their values.
        samples: images that it was measured with.
        fid: None where it failed.
        nfe: mean NFE for an image; None where it failed.
        seconds: of one worker, in all.
        failure: the reason, or None.
    """

    overrides: dict[str, Any]
    samples: int
    fid: float | None
    nfe: float | None
    seconds: float
    failure: str | None = None

    @property
    def trial(self) -> str:
        """Name of the trial, a function of the point."""
        return trial_name(self.overrides)


class Ledger(Generic[R]):
    """The results of a sweep, on disk as soon as they are known."""

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
        lines = list(read_metrics(self._file))
        atomic_write(self._file, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.results = [kind(**line) for line in lines]

    def add(self, result: R) -> None:
        """Keep a result.

        Raises:
            StorageError: it cannot be written.
        """
        append_records(self._file, [asdict(cast("Any", result))])
        self.results.append(result)


def measured_with(results: Iterable[Result], samples: int) -> dict[str, Result]:
    """The results with so many samples, by trial."""
    return {result.trial: result for result in results if result.samples == samples}


def ranked(results: Iterable[Result]) -> list[Result]:
    """The last result of each trial, the best first: those with more samples before others, failures at the end."""
    last: dict[str, Result] = {}
    for result in results:
        if result.trial not in last or last[result.trial].samples <= result.samples:
            last[result.trial] = result
    return sorted(last.values(), key=lambda found: (found.fid is None, -found.samples, found.fid or 0.0))


def pareto_front(results: Iterable[Result]) -> list[Result]:
    """Results that no other beats in FID without a higher NFE, by rising NFE."""
    front: list[Result] = []
    measured = [result for result in results if result.fid is not None]
    for result in sorted(measured, key=lambda found: (found.nfe, found.fid)):
        if not front or (result.fid or 0.0) < (front[-1].fid or 0.0):
            front.append(result)
    return front


def survivors(results: Iterable[Result], reduction: int) -> list[Result]:
    """Those that are measured with more samples: the best one of every ``reduction``, and the Pareto front."""
    order = [result for result in ranked(results) if result.fid is not None]
    kept = order[: -(-len(order) // reduction)]
    return [*kept, *(result for result in pareto_front(order) if result not in kept)]


def short(key: str) -> str:
    """The last part of a dotted key, which tables and pictures have room for."""
    return key.rpartition(".")[2]


def shown(overrides: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A point in one line: ``nag, step_size 0.02, momentum 0.6``."""
    parts = {key: overrides[key] for key in keys if key in overrides}
    return ", ".join(str(value) if short(key) in ("name", "family") else f"{short(key)} {value}"
                     for key, value in parts.items())  # fmt: skip


def table(order: Sequence[Result], keys: Sequence[str], rows: int = 10) -> str:
    """The best trials and all failures, as aligned lines."""
    measured = [result for result in order if result.fid is not None]
    header = ["rank", "FID", "NFE", "samples", *map(short, keys)]
    body = [
        [str(rank), f"{result.fid:.3f}", f"{result.nfe:.1f}".removesuffix(".0"), f"{result.samples:,}",
         *(str(result.overrides.get(key, "")) for key in keys)]
        for rank, result in enumerate(measured[:rows], start=1)
    ]  # fmt: skip
    lines = aligned([header, *body])
    if len(measured) > rows:
        lines.append(f"... and {len(measured) - rows} more in {CSV_FILE}")
    failures = [result for result in order if result.failure is not None]
    lines += [f"failed: {shown(result.overrides, keys)}: {result.failure}" for result in failures[:rows]]
    if len(failures) > rows:
        lines.append(f"... and {len(failures) - rows} more failures in {CSV_FILE}")
    return "\n".join(lines)


def write_csv(out: Path, order: Sequence[Result]) -> None:
    """One row for each trial, the best first.

    Raises:
        StorageError: it cannot be written.
    """
    keys = list(dict.fromkeys(key for result in order for key in result.overrides))
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["rank", "trial", "fid", "nfe", "samples", "seconds", "failure", *keys])
    for rank, result in enumerate(order, start=1):
        kept = (result.trial, result.fid, result.nfe, result.samples, f"{result.seconds:.3f}", result.failure)
        rows.writerow([rank, *kept, *(result.overrides.get(key) for key in keys)])
    atomic_write(out / CSV_FILE, text.getvalue().encode())
