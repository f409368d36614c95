"""Checkpoints that do not know how many workers wrote them, and exist only when they are whole.

    checkpoints/step_00000500/
        state-0000-of-0002.safetensors   one per writing rank: fragments of fp32 weights, moments and EMAs
        ema.safetensors                  the first EMA, whole: what sampling, evaluation and other tools read
        config.yaml                      the run that made it
        COMPLETE.json                    the marker, written last: step, and size and sha256 of every file

Every piece is keyed ``STATE/PARAMETER/OFFSET``, so that a reader of any world size or ZeRO stage finds the ranges it
holds (docs/decisions/0004).
"""

import hashlib
import logging
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import CheckpointError, DamagedCheckpointError
from eqm_dist.run_directory import CONFIG_FILE, MARKER, checkpoints_in, step_in, step_name, whole_checkpoints
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero, gather_objects, rank, world_size
from eqm_dist.train.engine import Engine, Fragment
from eqm_dist.train.state import TrainState

FORMAT = 1
EMA_FILE = "ema.safetensors"
FILE = re.compile(rf"state-\d{{4,9}}-of-\d{{4,9}}\.safetensors|{re.escape(EMA_FILE)}|{re.escape(CONFIG_FILE)}")
"""What a marker may list."""

Rule = Callable[[Sequence[int]], Collection[int]]
"""Which of the steps, given in order, are to be kept."""

logger = logging.getLogger(__name__)


def whole_state(engine: Engine, state: str) -> dict[str, Tensor]:
    """One state of every parameter, whole, on every rank, in host memory. A collective.

    Args:
        engine: the engine that holds the fragments.
        state: ``weight``, ``exp_avg``, ``exp_avg_sq`` or ``ema_DECAY``.
    """
    fragments = {piece.name: piece for piece in engine.fragments() if piece.state == state}
    whole = {}
    for name, shape in engine.shapes.items():
        piece = fragments.get(name)
        if engine.replicated:
            assert piece is not None
            flat = piece.values.detach().clone()
        else:
            flat = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
            if piece is not None:
                flat[piece.start : piece.start + piece.values.numel()] = piece.values
            all_reduce_sum(flat)
        whole[name] = flat.view(shape).cpu()
    return whole


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        directory: holds one directory per checkpoint.
        keep: number of newest checkpoints to keep.
        also_keep: rules by name that say which of the steps that have one are kept besides.
    """

    directory: Path
    keep: int
    also_keep: Mapping[str, Rule] = field(default_factory=dict)

    def path(self, step: int) -> Path:
        """Directory of the checkpoint after ``step`` updates."""
        return self.directory / step_name(step)

    def whole(self) -> list[Path]:
        """All whole checkpoints, oldest first. Only the marker counts, and the name, which is one of ours."""
        return list(whole_checkpoints(self.directory).values())

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, in order."""
        return list(whole_checkpoints(self.directory))

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(self.whole()), None)

    def resume(self, engine: Engine, among: Callable[[int], bool] = lambda step: True) -> TrainState:
        """Load the newest checkpoint that is not damaged, or begin at step 0 if there is none at all. A collective.

        Damaged ones that are newer are named in the log and set aside, so that their steps can be saved again.

        Args:
            engine: receives the state.
            among: the steps that count.

        Raises:
            CheckpointError: all are damaged, or the newest other one is not of this run.
        """
        found = from_rank_zero([path for path in self.whole() if among(step_of(path.name))])
        damaged: list[tuple[Path, DamagedCheckpointError]] = []
        for path in reversed(found):
            try:
                state = self.load(path, engine)
            except DamagedCheckpointError as error:
                damaged.append((path, error))
                continue
            if rank() == 0:
                for newer, error in damaged:
                    aside = _set_aside(newer)
                    logger.warning("warning: %s It is set aside as %s, and the run resumes from %s", error, aside, path)
            return state
        if damaged:
            raise CheckpointError(
                f"A run must have an undamaged checkpoint to resume from, but all {len(found)} in {self.directory} are"
                f" damaged, the newest because {damaged[0][1]} Restore one, or delete them all to start the run over."
            )
        return TrainState()

    def load(self, path: Path, engine: Engine) -> TrainState:
        """Overwrite the engine's state with a checkpoint's; returns the run's. A collective.

        Each rank reads only the ranges that it holds. What one of them finds damaged, all of them raise.

        Args:
            path: the checkpoint.
            engine: receives its state.

        Raises:
            DamagedCheckpointError: a file is missing or damaged; the engine's state is not to be used.
            CheckpointError: it is of another model, or lacks a state that the engine needs.
        """
        try:
            outcome = _restore(path, engine)
        except CheckpointError as error:
            outcome = error
        failures = [other for other in gather_objects(outcome) if isinstance(other, CheckpointError)]
        if failures:  # damage first: what else is wrong may come of it
            raise min(failures, key=lambda error: not isinstance(error, DamagedCheckpointError))
        assert isinstance(outcome, TrainState)
        engine.restored(outcome.updates)
        return outcome

    def kept(self, steps: Sequence[int]) -> dict[int, list[str]]:
        """Those of the steps, given in order, whose checkpoints are kept, and the rules that keep them."""
        chosen = {"newest": steps[-self.keep :], **{name: rule(steps) for name, rule in self.also_keep.items()}}
        return {step: names for step in steps if (names := [name for name, those in chosen.items() if step in those])}

    def forget(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are done again; the newest first, should that be cut short."""
        for path in reversed(self.whole()):
            if step_of(path.name) > step:
                remove(path)

    def retire(self) -> None:
        """Remove the checkpoints that are not to be kept, and what killed saves and removals left behind."""
        kept = self.kept(self.steps())
        for step, path in checkpoints_in(self.directory).items():
            if step not in kept:
                remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, whole or not, as far as the disk lets us."""
    with suppress(OSError):
        (checkpoint / MARKER).unlink(missing_ok=True)  # first: a half-removed checkpoint is not a checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)


def step_of(name: str) -> int:
    """The step of a checkpoint of ours by its name."""
    step = step_in(name)
    assert step is not None, name
    return step


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: no marker, or not one of ours.
    """
    try:
        content = read_bounded(path / MARKER)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"A checkpoint must have a {MARKER}, but {path} has none; it was not finished, use another."
        ) from None
    except OSError as error:
        raise DamagedCheckpointError(f"{path / MARKER} cannot be read ({error.strerror}); check the disk.") from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{path / MARKER} is damaged ({error}); use another checkpoint.") from error
    return parse_marker(content, path)


def parse_marker(content: bytes, path: str | Path) -> dict[str, Any]:
    """The marker of the checkpoint ``path`` from the bytes of its file.

    Raises:
        DamagedCheckpointError: it is not one of ours.
        CheckpointError: it is of another release.
    """
    try:
        marker = mapping_from_json(content)
        if marker["format"] != FORMAT:
            raise CheckpointError(
                f"A checkpoint must have format {FORMAT}, but {path} has {marker['format']}; use the matching release."
            )
        if type(marker["step"]) is not int or marker["step"] < 0:
            raise TypeError(f"step {marker['step']!r}")
        for name, record in marker["files"].items():
            bytes.fromhex(record["sha256"])
            if type(record["bytes"]) is not int:
                raise TypeError(f"{name} of {record['bytes']!r} bytes")
            if not FILE.fullmatch(name):  # one from elsewhere must not lead out of its directory
                raise ValueError(f"file name {name!r}")
        # Checkpoints of the first release have the step alone.
        marker.setdefault("state", {"step": marker["step"], "updates": marker["step"]})
        if unknown := marker["state"].keys() - {each.name for each in fields(TrainState)}:
            raise CheckpointError(
                f"{path}/{MARKER} holds a state that this release does not know ({', '.join(sorted(unknown))}); use the"
                " matching release."
            )
        _check_listing(path, marker["files"])
        for name, value in marker["state"].items():
            if type(value) not in (int, float) or not math.isfinite(value):
                raise TypeError(f"{name} {value!r}")
        return marker
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}/{MARKER} is damaged ({error!r}); use another checkpoint.") from error


def verify_file(path: Path, name: str, marker: Mapping[str, Any]) -> None:
    """Compare one file of a checkpoint with its marker.

    Raises:
        DamagedCheckpointError: it is missing or damaged.
    """
    try:
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpointError(
            f"{path / name} cannot be read ({error.strerror}); use another checkpoint."
        ) from error
    expected = marker["files"][name]["sha256"]
    if found != expected:
        raise DamagedCheckpointError(
            f"{path / name} is damaged: its sha256 is {found[:12]}..., its marker says {expected[:12]}...;"
            " use another checkpoint."
        )


@dataclass(frozen=True)
class Contents:
    """What the files of a whole checkpoint hold; of the tensors nothing is read yet.

    Attributes:
        pieces: by state and parameter, in the order of their ranges.
        shapes: of the whole EMA, parameters that are not trained among them.
    """

    pieces: Mapping[tuple[str, str], "list[Piece]"]
    shapes: Mapping[str, torch.Size]

    @property
    def states(self) -> list[str]:
        """``weight``, ``exp_avg``, ``ema_DECAY``, ..."""
        return sorted({state for state, _ in self.pieces})

    @property
    def trained(self) -> list[str]:
        """The parameters that training changes."""
        return sorted({name for _, name in self.pieces})


def contents_of(path: Path, marker: Mapping[str, Any]) -> Contents:
    """What a whole checkpoint is, in one place: for resuming, verifying, loading and fetching from a mirror.

    It has a config, an EMA and the states of all its writers, each of the size in the marker; every number is fp32;
    every state has every element of every trained parameter once, and the EMA has every parameter. What the bytes are
    is for ``verify_file`` to say.

    Args:
        path: the checkpoint; its marker need not be there yet.
        marker: as ``parse_marker`` gives it.

    Raises:
        DamagedCheckpointError: it is not whole, and why.
    """
    _check_files(path, marker)
    try:
        pieces = read_pieces(path, marker["files"])
        with safe_open(path / EMA_FILE, framework="pt") as ema:
            slices = {name: ema.get_slice(name) for name in ema.keys()}  # noqa: SIM118
            shapes = {name: torch.Size(part.get_shape()) for name, part in slices.items()}
            dtypes = {part.get_dtype() for part in slices.values()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"The checkpoint {path} cannot be read ({error}); use another one.") from error
    dtypes |= {piece.values.get_dtype() for parts in pieces.values() for piece in parts}
    if dtypes != {"F32"}:
        others = ", ".join(sorted(dtypes - {"F32"})) or "none"
        raise DamagedCheckpointError(
            f"A checkpoint must hold fp32 numbers alone, but {path} has {others}; use another one."
        )
    found = Contents(pieces, shapes)
    for state in found.states:
        for name in found.trained:
            _check_ranges(path, state, name, pieces.get((state, name), []), shapes.get(name))
    return found


def _check_listing(path: str | Path, files: Collection[str]) -> None:
    """A marker lists every file that makes a checkpoint whole, and no other.

    Raises:
        DamagedCheckpointError: it does not.
    """
    states = {name for name in files if name not in (EMA_FILE, CONFIG_FILE)}
    writers = max(1, len(states))
    expected = {EMA_FILE, CONFIG_FILE, *(f"state-{at:04d}-of-{writers:04d}.safetensors" for at in range(writers))}
    for name in sorted(expected ^ set(files)):
        raise DamagedCheckpointError(
            f"A checkpoint must have {EMA_FILE}, {CONFIG_FILE} and the states of all its writers, but the {MARKER} of"
            f" {path} {'lists' if name in files else 'does not list'} {name}; use another one."
        )


def _check_files(path: Path, marker: Mapping[str, Any]) -> None:
    """Every file that makes a checkpoint whole is there, and has its size."""
    files = marker["files"]
    for name in sorted(files):
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpointError(
                f"{path / name} cannot be read ({error.strerror}); use another checkpoint."
            ) from error
        if size != files[name]["bytes"]:
            raise DamagedCheckpointError(
                f"{path / name} is damaged: it has {size:,} bytes, its marker says {files[name]['bytes']:,};"
                " use another checkpoint."
            )


def _check_ranges(path: Path, state: str, name: str, pieces: "Sequence[Piece]", shape: torch.Size | None) -> None:
    """The pieces, in order, are every element once, and as many as the EMA has."""
    end = 0
    for piece in pieces:
        if piece.start != end:
            raise DamagedCheckpointError(
                f"{path} must hold every element of every state once, but of {state} of {name} it has"
                f" {'two of' if piece.start < end else 'none of'} element {min(piece.start, end):,}; use another one."
            )
        end += piece.numel
    if shape is None or end != shape.numel():
        raise DamagedCheckpointError(
            f"{path} has {end:,} elements of {state} of {name}, and {EMA_FILE} has"
            f" {0 if shape is None else shape.numel():,}; use another one."
        )


def read_pieces(path: Path, files: Iterable[str]) -> "defaultdict[tuple[str, str], list[Piece]]":
    """What the state files among these hold, by state and parameter, in order; nothing is read yet.

    Raises:
        SafetensorError, OSError, ValueError: a file is not one of ours.
    """
    pieces: defaultdict[tuple[str, str], list[Piece]] = defaultdict(list)
    for file in files:
        if file.startswith("state-"):
            reader = safe_open(path / file, framework="pt")
            for key in reader.keys():  # noqa: SIM118 (a safetensors reader is not a mapping)
                state, parameter, start = key.split("/")
                piece = Piece(int(start), reader.get_slice(key))
                if len(piece.values.get_shape()) != 1:
                    raise ValueError(f"{key} has the shape {piece.values.get_shape()}")
                pieces[state, parameter].append(piece)
    for parts in pieces.values():
        parts.sort(key=lambda piece: piece.start)
    return pieces


def read_whole(path: Path, state: str | None = None) -> dict[str, Tensor]:
    """One state of every parameter as the model's state dict, whole; parameters that are not trained as they are.

    Args:
        path: the checkpoint.
        state: ``weight``, ``ema_DECAY``, ...; None for the EMA that is exported.

    Raises:
        DamagedCheckpointError: a file is missing or damaged.
        CheckpointError: the checkpoint has no such state.
    """
    marker = read_marker(path)
    files = [EMA_FILE] if state is None else [name for name in marker["files"] if name.endswith(".safetensors")]
    for name in files:
        verify_file(path, name, marker)
    contents = contents_of(path, marker)
    if state is not None and state not in contents.states:
        raise CheckpointError(f"{path} holds {', '.join(contents.states)}, and not {state}; choose one that it holds.")
    try:
        whole = load_file(path / EMA_FILE)
        for name in contents.trained if state is not None else ():
            fill(Fragment(name, state or "", 0, whole[name].view(-1)), contents.pieces[state or "", name])
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"The checkpoint {path} cannot be read ({error}); use another one.") from error
    return whole


def _restore(path: Path, engine: Engine) -> TrainState:
    """Fill this rank's fragments; returns the state of the run."""
    marker = read_marker(path)
    for name in sorted(marker["files"])[rank() :: world_size()]:
        verify_file(path, name, marker)
    if step_in(path.name) not in (None, marker["step"]):
        raise DamagedCheckpointError(f"{path / MARKER} is of step {marker['step']:,}; use another checkpoint.")
    contents = contents_of(path, marker)
    _check_model(contents, engine.shapes, path)
    try:
        for fragment in engine.fragments():
            filled = fill(fragment, contents.pieces.get((fragment.state, fragment.name), []))
            if filled != fragment.values.numel():
                raise CheckpointError(
                    f"A checkpoint must hold every state that the run needs, but {path} has {filled:,} of"
                    f" {fragment.values.numel():,} elements of {fragment.state} of {fragment.name}; keep the model"
                    " and optimizer settings of the run's start."
                )
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"The checkpoint {path} cannot be read ({error}); use another one.") from error
    return TrainState(**marker["state"])


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it no longer counts as one; nothing that may be of use is deleted."""
    aside, number = path.with_name(f"damaged-{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged-{path.name}.{number}")
    return path.rename(aside)


class Piece(NamedTuple):
    """A saved range of one state of one parameter."""

    start: int
    values: Any
    """A slice of a safetensors file: only what it is indexed with is read."""

    @property
    def numel(self) -> int:
        return self.values.get_shape()[0]


def _check_model(contents: Contents, shapes: Mapping[str, torch.Size], path: Path) -> None:
    """A piece of another model may well fill a range of this one, so whole parameters are compared."""
    saved = {name: contents.shapes[name].numel() for name in contents.trained}
    expected = {name: shape.numel() for name, shape in shapes.items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"A checkpoint must be of the run's model, but {path} has {saved.get(name, 0):,} weights in {name} and"
                f" the model has {expected.get(name, 0):,}; keep the model settings of the run's start."
            )


def fill(fragment: Fragment, pieces: Sequence[Piece]) -> int:
    """Copy what the pieces have of a fragment into it; returns the number of elements."""
    start, stop, filled = fragment.start, fragment.start + fragment.values.numel(), 0
    for piece in pieces:
        low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
        if low < high:
            read = piece.values[low - piece.start : high - piece.start]
            fragment.values[low - start : high - start] = read.to(fragment.values.device)
            filled += high - low
    return filled
