"""How a sweep speaks of its points: the closing report, the live view, and the files with the results.

OUT/results.csv       a row for each trial, the best first
OUT/best.yaml         the config keys of the best trial
"""

import csv
import io
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from eqm_dist.runs import in_ray_job
from eqm_dist.storage.files import atomic_write
from eqm_dist.sweeps.spaces import Overrides
from eqm_dist.text import aligned

CSV_FILE, BEST_FILE = "results.csv", "best.yaml"

Row = tuple[Sequence[Any], Overrides]
"""Figures of a trial, and its point."""


def title(out: Path, complete: bool) -> str:
    """The first line of the report."""
    return f"{place(out)} is complete" if complete else f"{place(out)}: the time is up; the same command goes on"


def place(out: Path) -> str:
    """A directory, and of a submitted job the machine too: whoever submitted it sits at another one."""
    return f"{out} on {socket.gethostname()}" if in_ray_job() else str(out)


def short(key: str) -> str:
    """The last part of a dotted key, which tables and pictures have room for."""
    return key.rpartition(".")[2]


def shown(overrides: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A point in one line: ``nag, step_size 0.02, momentum 0.6``."""
    parts = {key: overrides[key] for key in keys if key in overrides}
    return ", ".join(str(value) if short(key) in ("name", "family") else f"{short(key)} {value}"
                     for key, value in parts.items())  # fmt: skip


def ranking(columns: Sequence[str], rows: Sequence[Row], keys: Sequence[str], most: int) -> list[str]:
    """The best points as aligned lines: rank, figures, values of the keys that vary."""
    if not rows:
        return []
    body = [
        [str(rank), *figures, *(str(point.get(key, "")) for key in keys)]
        for rank, (figures, point) in enumerate(rows[:most], start=1)
    ]
    lines = aligned([["rank", *columns, *map(short, keys)], *body])
    return [*lines, f"... and {len(rows) - most} more in {CSV_FILE}"] if len(rows) > most else lines


def write_csv(out: Path, columns: Sequence[str], rows: Sequence[Row], name: str = CSV_FILE) -> Path:
    """A row for each trial, the best first: figures, then the values of all keys of its point.

    Raises:
        StorageError: it cannot be written.
    """
    keys = list(dict.fromkeys(key for _, point in rows for key in point))
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow([*columns, *keys])
    lines.writerows([*figures, *(point.get(key) for key in keys)] for figures, point in rows)
    atomic_write(out / name, text.getvalue().encode())
    return out / name


def write_best(out: Path, origin: Sequence[str], config: Mapping[str, Any]) -> Path:
    """The config of the best trial, below lines that say where it comes from.

    Raises:
        StorageError: it cannot be written.
    """
    comment = "".join(f"# {line}\n" for line in origin)
    atomic_write(out / BEST_FILE, f"{comment}{yaml.safe_dump(dict(config), sort_keys=False)}".encode())
    return out / BEST_FILE
