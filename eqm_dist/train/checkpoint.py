"""Checkpoints that do not know how many workers wrote them, and exist only when they are whole.

    checkpoints/step_00000500/
        state-0000-of-0002.safetensors   one per writing rank: fragments of fp32 weights, moments and averages
        ema.safetensors                  the first average, whole: what sampling, evaluation and other tools read
        config.yaml                      the run that made it
        COMPLETE.json                    the marker, written last: step, and size and sha256 of every file

Every piece is keyed ``STATE/PARAMETER/OFFSET``, so that a reader of any world size or ZeRO stage finds the ranges it
holds (docs/decisions/0004).
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eqm_dist.data.storage import atomic_write, fsync_directory, storage_errors
from eqm_dist.errors import CheckpointError, EqmDistError, StorageError
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero, gather_objects, rank, world_size
from eqm_dist.train.engine import WEIGHT, Engine, Fragment
from eqm_dist.train.state import TrainState

FORMAT = 1
MARKER = "COMPLETE.json"
EMA_FILE = "ema.safetensors"
CONFIG_FILE = "config.yaml"


def whole_state(engine: Engine, shapes: Mapping[str, torch.Size], state: str) -> dict[str, Tensor]:
    """One state of every parameter, whole, on every rank, in host memory. A collective.

    Args:
        engine: the engine that holds the fragments.
        shapes: shape of each trained parameter by name.
        state: ``weight``, ``exp_avg``, ``exp_avg_sq`` or ``ema_DECAY``.
    """
    fragments = {piece.name: piece for piece in engine.fragments() if piece.state == state}
    whole = {}
    for name, shape in shapes.items():
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
        also_keep: which of the steps that have one are kept besides.
    """

    directory: Path
    keep: int
    also_keep: Callable[[Sequence[int]], Collection[int]] = lambda steps: ()

    def path(self, step: int) -> Path:
        """Directory of the checkpoint after ``step`` updates."""
        return self.directory / f"step_{step:08d}"

    def whole(self) -> list[Path]:
        """All whole checkpoints, oldest first. Only the marker counts."""
        return sorted(marker.parent for marker in self.directory.glob(f"step_*/{MARKER}"))

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, in order."""
        return [step_of(path.name) for path in self.whole()]

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(self.whole()), None)

    def save(self, engine: Engine, state: TrainState, ema: Mapping[str, Tensor], config: str) -> Path:
        """Write the checkpoint of a state; a collective.

        Args:
            engine: holds the fragments.
            state: goes into the marker.
            ema: whole averaged weights under their state-dict names, for other people's tools.
            config: the run's config as YAML, kept beside them.

        Raises:
            StorageError: some rank could not write. Older checkpoints are untouched.
        """
        step = state.step
        target = self.path(step)
        if rank() == 0 and target.exists():  # an earlier attempt that was killed; whole ones are never rewritten
            shutil.rmtree(target)
        self._all_or_none(step, {})
        records: dict[str, Any] = {}
        try:
            with storage_errors("create", target):
                target.mkdir(parents=True, exist_ok=True)
                fsync_directory(self.directory)  # the marker's sync does not cover the name of its directory
            if rank() == 0 or not engine.replicated:
                writers = 1 if engine.replicated else world_size()
                pieces = {
                    f"{piece.state}/{piece.name}/{piece.start}": piece.values.detach().cpu().contiguous()
                    for piece in engine.fragments()
                }
                records |= _write(target / f"state-{rank():04d}-of-{writers:04d}.safetensors", _serialize(pieces))
            if rank() == 0:
                records |= _write(target / EMA_FILE, _serialize(ema))
                records |= _write(target / CONFIG_FILE, config.encode())
        except StorageError as error:
            self._all_or_none(step, error)
        files = self._all_or_none(step, records)
        try:
            if rank() == 0:
                marker = {
                    "format": FORMAT,
                    "step": step,
                    "state": asdict(state),
                    "world_size": world_size(),
                    "files": files,
                }
                atomic_write(target / MARKER, json.dumps(marker, indent=1).encode())
        except StorageError as error:
            self._all_or_none(step, error)
        self._all_or_none(step, {})
        if rank() == 0:
            self.retire()
        return target

    def load(self, path: Path, engine: Engine, shapes: Mapping[str, torch.Size]) -> TrainState:
        """Overwrite the engine's state with a checkpoint's; returns the progress it was saved at. A collective.

        Each rank reads only the ranges that it holds. What one of them finds damaged, all of them raise.

        Args:
            path: the checkpoint.
            engine: receives its state.
            shapes: shape of each trained parameter by name, to know a checkpoint of another model.

        Raises:
            CheckpointError: a file is missing, damaged, of another model, or lacks a state that the engine needs.
        """
        try:
            outcome = _restore(path, engine, shapes)
        except CheckpointError as error:
            outcome = error
        failure = next((other for other in gather_objects(outcome) if isinstance(other, CheckpointError)), None)
        if failure is not None:
            raise failure
        assert isinstance(outcome, TrainState)
        engine.restored(outcome.updates)
        return outcome

    def _all_or_none(self, step: int, outcome: dict[str, Any] | EqmDistError) -> dict[str, Any]:
        """Every rank's outcome merged, or the first failure raised on every rank: nobody waits for a failed one."""
        outcomes = gather_objects(outcome)
        failures = [(at, error) for at, error in enumerate(outcomes) if isinstance(error, EqmDistError)]
        if failures:
            if rank() == 0:
                shutil.rmtree(self.path(step), ignore_errors=True)
            latest = from_rank_zero(self.latest())
            good = f"the last good checkpoint is {latest}" if latest else "there is no earlier checkpoint"
            at, error = failures[0]
            raise StorageError(f"Saving step {step:,} failed on rank {at}: {error} Nothing was lost: {good}.")
        return {name: record for part in outcomes for name, record in part.items()}

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Those of the steps, given in order, whose checkpoints are kept."""
        return {*steps[-self.keep :], *self.also_keep(steps)}

    def forget(self, step: int) -> None:
        """Remove the checkpoints of later steps, which are done again; the newest first, should that be cut short."""
        for path in reversed(self.whole()):
            if step_of(path.name) > step:
                _remove(path)

    def retire(self) -> None:
        """Remove the checkpoints that are not to be kept, and what killed saves and removals left behind."""
        kept = {self.path(step) for step in self.kept(self.steps())}
        for old in set(self.directory.glob("step_*")) - kept:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink(missing_ok=True)  # first: a half-removed checkpoint is not a checkpoint
    shutil.rmtree(checkpoint, ignore_errors=True)


def step_of(name: str) -> int:
    """The step of a checkpoint by its name."""
    return int(name.removeprefix("step_"))


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: no marker, or not one of ours.
    """
    try:
        content = (path / MARKER).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(
            f"A checkpoint must have a {MARKER}, but {path} has none; it was not finished, use another."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path / MARKER} cannot be read ({error.strerror}); check the disk.") from error
    return parse_marker(content, path)


def parse_marker(content: bytes, path: str | Path) -> dict[str, Any]:
    """The marker of the checkpoint ``path`` from the bytes of its file.

    Raises:
        CheckpointError: it is not one of ours.
    """
    try:
        marker = json.loads(content)
        if marker["format"] != FORMAT:
            raise CheckpointError(
                f"A checkpoint must have format {FORMAT}, but {path} has {marker['format']}; use the matching release."
            )
        if not isinstance(marker["step"], int):
            raise TypeError(f"step {marker['step']!r}")
        for name, record in marker["files"].items():
            bytes.fromhex(record["sha256"])
            if Path(name).name != name:  # one from elsewhere must not lead out of its directory
                raise ValueError(f"file name {name!r}")
        return marker
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}/{MARKER} is damaged ({error!r}); delete that directory to resume from the one before."
        ) from error


def verify_file(path: Path, name: str, marker: Mapping[str, Any]) -> None:
    """Compare one file of a checkpoint with its marker.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path / name} cannot be read ({error.strerror}); delete {path} to resume from the one before."
        ) from error
    expected = marker["files"][name]["sha256"]
    if found != expected:
        raise CheckpointError(
            f"{path / name} is damaged: its sha256 is {found[:12]}..., its marker says {expected[:12]}...;"
            f" delete {path} to resume from the one before."
        )


def _restore(path: Path, engine: Engine, shapes: Mapping[str, torch.Size]) -> TrainState:
    """Fill this rank's fragments."""
    marker = read_marker(path)
    for name in sorted(marker["files"])[rank() :: world_size()]:
        verify_file(path, name, marker)
    pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
    try:
        for file in marker["files"]:
            if file.startswith("state-"):
                reader = safe_open(path / file, framework="pt")
                for key in reader.keys():  # noqa: SIM118 (a safetensors reader is not a mapping)
                    state, parameter, start = key.split("/")
                    pieces[state, parameter].append(_Piece(int(start), reader.get_slice(key)))
        _check_model(pieces, shapes, path)
        for fragment in engine.fragments():
            filled = _fill(fragment, pieces[fragment.state, fragment.name])
            if filled != fragment.values.numel():
                raise CheckpointError(
                    f"A checkpoint must hold every state that the run needs, but {path} has {filled:,} of"
                    f" {fragment.values.numel():,} elements of {fragment.state} of {fragment.name}; keep the model"
                    " and optimizer settings of the run's start."
                )
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({error}); delete that directory to resume from the one before."
        ) from error
    return _state(marker, path)


def _state(marker: Mapping[str, Any], path: Path) -> TrainState:
    try:
        # Checkpoints of the first release have the step alone.
        return TrainState(**marker.get("state", {"step": marker["step"], "updates": marker["step"]}))
    except TypeError as error:
        raise CheckpointError(
            f"{path / MARKER} holds a state that this release does not know ({error}); use the matching release."
        ) from error


class _Piece(NamedTuple):
    """A saved range of one state of one parameter."""

    start: int
    values: Any
    """A slice of a safetensors file: only what it is indexed with is read."""

    @property
    def numel(self) -> int:
        return self.values.get_shape()[0]


def _check_model(pieces: Mapping[tuple[str, str], list[_Piece]], shapes: Mapping[str, torch.Size], path: Path) -> None:
    """A piece of another model may well fill a range of this one, so whole parameters are compared."""
    saved = {name: sum(piece.numel for piece in parts) for (state, name), parts in pieces.items() if state == WEIGHT}
    expected = {name: shape.numel() for name, shape in shapes.items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise CheckpointError(
                f"A checkpoint must be of the run's model, but {path} has {saved.get(name, 0):,} weights in {name} and"
                f" the model has {expected.get(name, 0):,}; keep the model settings of the run's start."
            )


def _fill(fragment: Fragment, pieces: list[_Piece]) -> int:
    """Copy what the pieces have of a fragment into it; returns the number of elements."""
    start, stop, filled = fragment.start, fragment.start + fragment.values.numel(), 0
    for piece in pieces:
        low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
        if low < high:
            read = piece.values[low - piece.start : high - piece.start]
            fragment.values[low - start : high - start] = read.to(fragment.values.device)
            filled += high - low
    return filled


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _write(path: Path, content: bytes) -> dict[str, Any]:
    atomic_write(path, content)
    return {path.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
