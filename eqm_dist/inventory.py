"""The checkpoints of a run from outside: which there are, whether they are undamaged, and their weights for others."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from eqm_dist.build import OpenRun
from eqm_dist.config import Config, read_config
from eqm_dist.errors import CheckpointError, ConfigError
from eqm_dist.run_directory import CHECKPOINTS, CONFIG_FILE, set_aside_step, step_in
from eqm_dist.storage.files import storage_errors, whole_file
from eqm_dist.storage.location import Location, S3Path
from eqm_dist.storage.open import local_copy, open_folder
from eqm_dist.train.checkpoint import (
    MARKER,
    Checkpoints,
    contents_of,
    read_marker,
    read_whole,
    verify_file,
)
from eqm_dist.train.engine import WEIGHT
from eqm_dist.train.evaluations import SCORE
from eqm_dist.train.reports import Reports


@dataclass(frozen=True)
class Entry:
    """One directory of ``checkpoints/``.

    Attributes:
        name: of the directory.
        step: its step; None where the name is not one of ours.
        condition: whole (as far as names and sizes tell), unfinished, damaged, set aside, or somebody's own, which is
            left alone.
        size: bytes of its files.
        writers: ranks that wrote it; 0 if unknown.
        fid: of its EMA, if it was evaluated.
        kept: the rules that keep it.
    """

    name: str
    step: int | None
    condition: str
    size: int
    writers: int = 0
    fid: float | None = None
    kept: Sequence[str] = ()


def entries(run: Location) -> list[Entry]:
    """What lies in the checkpoints of a run, by step. Sizes are compared, contents are not: see ``verify``.

    Raises:
        ConfigError: ``run`` is not the directory of a run.
        StorageError: S3 does not answer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        here = run if isinstance(run, Path) else Path(scratch)
        if isinstance(run, S3Path):
            Reports(here, run, None).fetch()
        opened = OpenRun(_config(run), here, None)
        results = opened.evaluations.results()
        checkpoints = replace(opened.checkpoints, directory=run / CHECKPOINTS)
        kept = checkpoints.kept(checkpoints.steps())
    found = []
    for name in open_folder(run / CHECKPOINTS).folders():
        path = run / CHECKPOINTS / name
        sizes = open_folder(path).list()
        step, size = step_in(name), sum(sizes.values())
        if step is None:
            aside = set_aside_step(name)
            found.append(Entry(name, aside, "your own" if aside is None else "set aside", size))
        elif MARKER not in sizes:
            found.append(Entry(name, step, "unfinished", size))
        else:
            condition, writers = _condition(path, sizes)
            fid = results.get(step, {}).get("metrics", {}).get(SCORE)
            found.append(Entry(name, step, condition, size, writers, fid, kept.get(step, ())))
    return sorted(found, key=lambda entry: (entry.step is None, entry.step or 0, entry.name))


def table(found: Sequence[Entry]) -> str:
    """The entries as aligned text."""
    rows = [("step", "condition", "MiB", "writers", "FID", "kept as")]
    for entry in found:
        fid = "" if entry.fid is None else f"{entry.fid:.3f}"
        step = entry.name if entry.step is None else f"{entry.step:,}"
        rows.append((step, entry.condition, f"{entry.size / 2**20:,.1f}", str(entry.writers or ""), fid,
                     ", ".join(entry.kept)))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (1, 5)
    return "\n".join(
        "  ".join(f"{text:{'<' if at in left else '>'}{widths[at]}}" for at, text in enumerate(row)).rstrip()
        for row in rows
    )


def is_run(place: Location) -> bool:
    """Whether it is a run, and not a checkpoint."""
    if isinstance(place, Path):
        return (place / CHECKPOINTS).exists()
    return bool(open_folder(place / CHECKPOINTS).folders())


def checkpoints_of(place: Location, every: bool) -> list[Location]:
    """A checkpoint itself; of a run the newest one that is finished, or every one.

    Raises:
        CheckpointError: there is none.
    """
    if not is_run(place):
        return [place]
    found = Checkpoints(place / CHECKPOINTS, keep=1).whole()
    if not found:
        raise CheckpointError(f"{place} must have a finished checkpoint, and has none; train on, or name another run.")
    return found if every else found[-1:]


def verify(checkpoint: Location) -> str:
    """Read all of a checkpoint: every file is what its marker says, and the states cover every parameter once.

    Returns:
        What it consists of, for people.

    Raises:
        CheckpointError: it is unfinished or damaged, and in what way.
    """
    marker = read_marker(checkpoint)
    for name in marker["files"]:
        verify_file(checkpoint, name, marker)
    contents = contents_of(checkpoint, marker)
    elements = sum(contents.shapes[name].numel() for name in contents.trained)
    size = sum(record["bytes"] for record in marker["files"].values())
    return (
        f"{len(marker['files'])} files, {size / 2**20:,.1f} MiB, {', '.join(contents.states)} of"
        f" {len(contents.trained)} trained"
        f" parameters ({elements:,} elements)"
    )


def convert(checkpoint: Location, out: Path) -> Path:
    """Write weights and first EMA as ``torch.save`` has them in the official code, ``{"model": ..., "ema": ...}``.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged.
        StorageError: ``out`` cannot be written.
    """
    content: dict[str, dict[str, Tensor]] = {"model": read_whole(checkpoint, WEIGHT), "ema": read_whole(checkpoint)}
    with storage_errors("create", out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        torch.save(content, file)
    return out


def _config(run: Location) -> Config:
    file = local_copy(run, CONFIG_FILE)
    if not file.exists():
        raise ConfigError(f"A run must be a directory with {CONFIG_FILE}, and {run} has none; correct the path.")
    return read_config(file)


def _condition(path: Location, found: Mapping[str, int]) -> tuple[str, int]:
    """Condition and writers of a checkpoint that has a marker."""
    try:
        files = read_marker(path)["files"]
    except CheckpointError:
        return "damaged", 0
    same = all(found.get(name) == record["bytes"] for name, record in files.items())
    return "whole" if same else "damaged", sum(name.startswith("state-") for name in files)
