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
import logging
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eqm_dist.data.storage import atomic_write, storage_errors
from eqm_dist.errors import CheckpointError, EqmDistError, StorageError
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero, gather_objects, rank, world_size
from eqm_dist.train.engine import Engine

logger = logging.getLogger(__name__)

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
    """

    directory: Path
    keep: int

    def path(self, step: int) -> Path:
        """Directory of the checkpoint after ``step`` updates."""
        return self.directory / f"step_{step:08d}"

    def whole(self) -> list[Path]:
        """All whole checkpoints, oldest first. Only the marker counts."""
        return sorted(marker.parent for marker in self.directory.glob(f"step_*/{MARKER}"))

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        return next(reversed(self.whole()), None)

    def save(self, engine: Engine, step: int, ema: Mapping[str, Tensor], config: str) -> Path:
        """Write the checkpoint after ``step`` updates; a collective.

        Args:
            engine: holds the fragments.
            step: completed updates.
            ema: whole averaged weights under their state-dict names, for other people's tools.
            config: the run's config as YAML, kept beside them.

        Raises:
            StorageError: some rank could not write. Older checkpoints are untouched.
        """
        target = self.path(step)
        if rank() == 0 and target.exists():  # an earlier attempt that was killed; whole ones are never rewritten
            shutil.rmtree(target)
        self._all_or_none(step, {})
        records: dict[str, Any] = {}
        try:
            with storage_errors("create", target):
                target.mkdir(parents=True, exist_ok=True)
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
                marker = {"format": FORMAT, "step": step, "world_size": world_size(), "files": files}
                atomic_write(target / MARKER, json.dumps(marker, indent=1).encode())
        except StorageError as error:
            self._all_or_none(step, error)
        self._all_or_none(step, {})
        self._retire()
        return target

    def load(self, path: Path, engine: Engine) -> int:
        """Overwrite the engine's state with a checkpoint's; returns its step.

        Each rank reads only the ranges that it holds.

        Raises:
            CheckpointError: a file is missing, damaged, or lacks a state that the engine needs.
        """
        marker = read_marker(path)
        _verify(path, marker, part=rank(), parts=world_size())
        files = {name: path / name for name in marker["files"] if name.startswith("state-")}
        pieces: dict[tuple[str, str], list[tuple[int, str, str]]] = defaultdict(list)
        try:
            readers = {name: safe_open(file, framework="pt") for name, file in files.items()}
            for name, reader in readers.items():
                for key in reader.keys():  # noqa: SIM118 (a safetensors reader is not a mapping)
                    state, parameter, start = key.split("/")
                    pieces[state, parameter].append((int(start), name, key))
            for fragment in engine.fragments():
                self._fill(fragment.values, fragment.start, pieces[fragment.state, fragment.name], readers,
                           what=f"{fragment.state} of {fragment.name}", path=path)  # fmt: skip
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint {path} cannot be read ({error}); delete that directory to resume from the one before."
            ) from error
        engine.restored(marker["step"])
        return marker["step"]

    @staticmethod
    def _fill(
        values: Tensor,
        start: int,
        pieces: list[tuple[int, str, str]],
        readers: Mapping[str, Any],
        what: str,
        path: Path,
    ) -> None:
        stop, filled = start + values.numel(), 0
        for offset, name, key in pieces:
            saved = readers[name].get_slice(key)
            low, high = max(start, offset), min(stop, offset + saved.get_shape()[0])
            if low < high:
                values[low - start : high - start] = saved[low - offset : high - offset].to(values.device)
                filled += high - low
        if filled != values.numel():
            raise CheckpointError(
                f"A checkpoint must hold every state that the run needs, but {path} has {filled:,} of "
                f"{values.numel():,} elements of {what}; keep the model and optimizer settings of the run's start."
            )

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

    def _retire(self) -> None:
        if rank() == 0:
            for old in self.whole()[: -self.keep]:
                (old / MARKER).unlink()  # first, so that a half-removed checkpoint is not a checkpoint
                shutil.rmtree(old, ignore_errors=True)


def read_marker(path: Path) -> dict[str, Any]:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: no marker, or not one of ours.
    """
    try:
        marker = json.loads((path / MARKER).read_bytes())
        if marker["format"] != FORMAT:
            raise CheckpointError(
                f"A checkpoint must have format {FORMAT}, but {path} has {marker['format']}; use the matching release."
            )
        return marker
    except FileNotFoundError:
        raise CheckpointError(
            f"A checkpoint must have a {MARKER}, but {path} has none; it was not finished, use another."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / MARKER} is damaged ({error}); delete that directory to resume from the one before."
        ) from error


def _verify(path: Path, marker: Mapping[str, Any], part: int, parts: int) -> None:
    """Check this rank's share of the files against the marker."""
    for name, record in sorted(marker["files"].items())[part::parts]:
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(
                f"{path / name} cannot be read ({error.strerror}); delete {path} to resume from the one before."
            ) from error
        if found != record["sha256"]:
            raise CheckpointError(
                f"{path / name} is damaged: its sha256 is {found[:12]}..., its marker says {record['sha256'][:12]}...;"
                f" delete {path} to resume from the one before."
            )


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _write(path: Path, content: bytes) -> dict[str, Any]:
    atomic_write(path, content)
    return {path.name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
