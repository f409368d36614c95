"""Checkpoints that do not know how many workers wrote them, and exist only when they are whole.

    checkpoints/step_00000500/
        state-0000-of-0002.safetensors   one per writing rank: fragments of fp32 weights, moments and EMAs
        ema.safetensors                  the first EMA, whole: what sampling, evaluation and other tools read
        config.yaml                      the run that made it
        COMPLETE.json                    the marker, written last: step, and size and sha256 of every file

Every piece is keyed ``STATE/PARAMETER/OFFSET``, so that a reader of any world size or ZeRO stage finds the ranges it
holds (docs/decisions/0004).
"""

import errno
import hashlib
import logging
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file
from torch import Tensor

from eqm_dist.documents import MOST_BYTES, mapping_from_json, read_bounded
from eqm_dist.errors import CheckpointError, DamagedCheckpointError, EqmDistError, StorageError
from eqm_dist.run_directory import CONFIG_FILE, MARKER, checkpoints_in, step_in, step_name, whole_checkpoints
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.location import RUN_DEADLINE_S, Location, S3Path
from eqm_dist.storage.open import open_folder, open_s3
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero, gather_objects, rank, world_size
from eqm_dist.train.engine import Engine, Fragment
from eqm_dist.train.remote_tensors import read_header
from eqm_dist.train.state import TrainState

FORMAT = 1
EMA_FILE = "ema.safetensors"
FILE = re.compile(rf"state-\d{{4,9}}-of-\d{{4,9}}\.safetensors|{re.escape(EMA_FILE)}|{re.escape(CONFIG_FILE)}")
"""What a marker may list."""

REQUESTS = 16
"""Requests to S3 that a rank makes at once."""

P = TypeVar("P", bound=Location)

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
class Checkpoints(Generic[P]):
    """The checkpoints of one run.

    Attributes:
        directory: holds one directory per checkpoint, here or on S3.
        keep: number of newest checkpoints to keep.
        also_keep: rules by name that say which of the steps that have one are kept besides.
    """

    directory: P
    keep: int
    also_keep: Mapping[str, Rule] = field(default_factory=dict)

    def path(self, step: int) -> P:
        """Where the checkpoint after ``step`` updates lies."""
        return cast("P", self.directory / step_name(step))

    def whole(self) -> list[P]:
        """All whole checkpoints, oldest first. Only the marker counts, and the name, which is one of ours.

        Raises:
            StorageError: S3 does not answer.
        """
        if isinstance(self.directory, Path):
            return cast("list[P]", list(whole_checkpoints(self.directory).values()))
        found = self._own()
        paths = [found[step] for step in sorted(found)]
        folder = _folder(self.directory)
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="markers") as threads:
            marked = threads.map(lambda path: folder.size(f"{path.name}/{MARKER}") is not None, paths)
            return [path for path, whole in zip(paths, marked, strict=True) if whole]

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, in order."""
        return [step for path in self.whole() if (step := step_in(path.name)) is not None]

    def latest(self) -> P | None:
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
        found = agreed(lambda: [path for path in self.whole() if among(step_of(path.name))])
        damaged: list[tuple[Location, DamagedCheckpointError]] = []
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

    def load(self, path: Location, engine: Engine) -> TrainState:
        """Overwrite the engine's state with a checkpoint's; returns the run's. A collective.

        Each rank reads only the ranges that it holds. What one of them finds damaged, all of them raise.

        Args:
            path: the checkpoint.
            engine: receives its state.

        Raises:
            DamagedCheckpointError: a file is missing or damaged; the engine's state is not to be used.
            CheckpointError: it is of another model, or lacks a state that the engine needs.
            StorageError: S3 does not answer.
        """
        try:
            outcome = _restore(path, engine)
        except (CheckpointError, StorageError) as error:
            outcome = error
        failures = [other for other in gather_objects(outcome) if isinstance(other, EqmDistError)]
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
        for step, path in self._own().items():
            if step not in kept:
                remove(path)

    def _own(self) -> dict[int, P]:
        """What lies here under a name of a checkpoint, by step. Copies that a user made have other names."""
        if isinstance(self.directory, Path):
            return cast("dict[int, P]", checkpoints_in(self.directory))
        names = _folder(self.directory).folders()
        return {step: self.path(step) for name in names if (step := step_in(name)) is not None}


def agreed(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every rank; what it raises, all raise. A collective."""
    outcome = None
    if rank() == 0:
        try:
            outcome = decide()
        except EqmDistError as error:
            outcome = error
    outcome = from_rank_zero(outcome)
    if isinstance(outcome, EqmDistError):
        raise outcome
    return outcome


def remove(checkpoint: Location) -> None:
    """Remove a checkpoint, whole or not, as far as the disk, or S3, lets us."""
    if isinstance(checkpoint, S3Path):
        with suppress(StorageError):
            clear(checkpoint)
        return
    with suppress(OSError):
        (checkpoint / MARKER).unlink(missing_ok=True)  # first: a half-removed checkpoint is not a checkpoint
        shutil.rmtree(checkpoint, ignore_errors=True)


def clear(prefix: S3Path) -> None:
    """Remove all files of a checkpoint on S3.

    Raises:
        StorageError: that is not possible; if its marker was removed, it is no checkpoint any more.
    """
    folder = open_s3(prefix)
    folder.remove(MARKER)
    folder.remove_all(folder.walk())


def step_of(name: str) -> int:
    """The step of a checkpoint of ours by its name."""
    step = step_in(name)
    assert step is not None, name
    return step


def read_marker(path: Location) -> dict[str, Any]:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: no marker, or not one of ours.
        StorageError: S3 does not answer.
    """
    try:
        content = read_bounded(path / MARKER) if isinstance(path, Path) else _remote_marker(path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"A checkpoint must have a {MARKER}, but {path} has none; it was not finished, use another."
        ) from None
    except OSError as error:
        raise DamagedCheckpointError(f"{path / MARKER} cannot be read ({error.strerror}); check the disk.") from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{path / MARKER} is damaged ({error}); use another checkpoint.") from error
    return parse_marker(content, path)


def _folder(location: Location) -> Folder:
    return open_folder(location, deadline_s=RUN_DEADLINE_S)


def _remote_marker(path: Location) -> bytes:
    folder = _folder(path)
    if folder.size(MARKER) is None:
        raise FileNotFoundError
    return folder.read(MARKER, 0, MOST_BYTES)


def parse_marker(content: bytes, path: str | Location) -> dict[str, Any]:
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


def verify_file(path: Location, name: str, marker: Mapping[str, Any]) -> None:
    """Compare one file of a checkpoint with its marker.

    Raises:
        DamagedCheckpointError: it is missing or damaged.
        StorageError: S3 does not answer.
    """
    try:
        if isinstance(path, Path):
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        else:
            found = _remote_digest(path, name)
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


def _remote_digest(path: Location, name: str) -> str:
    folder, digest = _folder(path), hashlib.sha256()
    if folder.size(name) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    folder.download(name, cast("BinaryIO", _Sink(digest.update)))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Sink:
    """As much of a file as a download needs."""

    write: Callable[[bytes], None]


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


def contents_of(path: Location, marker: Mapping[str, Any]) -> Contents:
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
        slices = _slices(path, EMA_FILE)
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


def _check_listing(path: str | Location, files: Collection[str]) -> None:
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


def _check_files(path: Location, marker: Mapping[str, Any]) -> None:
    """Every file that makes a checkpoint whole is there, and has its size."""
    files = marker["files"]
    sizes = {} if isinstance(path, Path) else _folder(path).list()
    for name in sorted(files):
        try:
            if not isinstance(path, Path) and name not in sizes:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            size = (path / name).stat().st_size if isinstance(path, Path) else sizes[name]
        except OSError as error:
            raise DamagedCheckpointError(
                f"{path / name} cannot be read ({error.strerror}); use another checkpoint."
            ) from error
        if size != files[name]["bytes"]:
            raise DamagedCheckpointError(
                f"{path / name} is damaged: it has {size:,} bytes, its marker says {files[name]['bytes']:,};"
                " use another checkpoint."
            )


def _check_ranges(path: Location, state: str, name: str, pieces: "Sequence[Piece]", shape: torch.Size | None) -> None:
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


def read_pieces(path: Location, files: Iterable[str]) -> "defaultdict[tuple[str, str], list[Piece]]":
    """What the state files among these hold, by state and parameter, in order; nothing is read yet but their headers.

    Raises:
        SafetensorError, OSError, ValueError: a file is not one of ours.
        StorageError: S3 does not answer.
    """
    pieces: defaultdict[tuple[str, str], list[Piece]] = defaultdict(list)
    states = [file for file in files if file.startswith("state-")]
    with ThreadPoolExecutor(1 if isinstance(path, Path) else REQUESTS, thread_name_prefix="headers") as threads:
        for slices in threads.map(partial(_slices, path), states):
            for key, values in slices.items():
                state, parameter, start = key.split("/")
                piece = Piece(int(start), values)
                if len(piece.values.get_shape()) != 1:
                    raise ValueError(f"{key} has the shape {piece.values.get_shape()}")
                pieces[state, parameter].append(piece)
    for parts in pieces.values():
        parts.sort(key=lambda piece: piece.start)
    return pieces


def _slices(path: Location, file: str) -> Mapping[str, Any]:
    """The tensors of a safetensors file by name, of which only what is asked for is read."""
    if not isinstance(path, Path):
        return read_header(_folder(path), file)
    reader = safe_open(path / file, framework="pt")
    return {key: reader.get_slice(key) for key in reader.keys()}  # noqa: SIM118 (a reader is not a mapping)


def read_whole(path: Location, state: str | None = None) -> dict[str, Tensor]:
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
        whole = read_ema(path)
        if state is not None:
            parts = [Fragment(name, state, 0, whole[name].view(-1)) for name in contents.trained]
            _fill_all(path, parts, contents)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"The checkpoint {path} cannot be read ({error}); use another one.") from error
    return whole


def read_ema(path: Location) -> dict[str, Tensor]:
    """The EMA of a checkpoint that is exported, whole, as the model's state dict.

    Raises:
        SafetensorError, OSError: the file is none.
        StorageError: S3 does not answer.
    """
    if isinstance(path, Path):
        return load_file(path / EMA_FILE)
    return load(_folder(path).read(EMA_FILE))


def _restore(path: Location, engine: Engine) -> TrainState:
    """Fill this rank's fragments; returns the state of the run."""
    marker = read_marker(path)
    for name in sorted(marker["files"])[rank() :: world_size()]:
        verify_file(path, name, marker)
    if step_in(path.name) not in (None, marker["step"]):
        raise DamagedCheckpointError(f"{path / MARKER} is of step {marker['step']:,}; use another checkpoint.")
    contents = contents_of(path, marker)
    _check_model(contents, engine.shapes, path)
    try:
        fragments = list(engine.fragments())
        for fragment, filled in zip(fragments, _fill_all(path, fragments, contents), strict=True):
            if filled != fragment.values.numel():
                raise CheckpointError(
                    f"A checkpoint must hold every state that the run needs, but {path} has {filled:,} of"
                    f" {fragment.values.numel():,} elements of {fragment.state} of {fragment.name}; keep the model"
                    " and optimizer settings of the run's start."
                )
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpointError(f"The checkpoint {path} cannot be read ({error}); use another one.") from error
    return TrainState(**marker["state"])


def _fill_all(path: Location, fragments: Sequence[Fragment], contents: Contents) -> list[int]:
    """``fill`` each of the fragments; on S3 with several requests at once."""

    def filled(fragment: Fragment) -> int:
        with torch.no_grad():
            return fill(fragment, contents.pieces.get((fragment.state, fragment.name), []))

    if isinstance(path, Path):
        return [filled(fragment) for fragment in fragments]
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="fill") as threads:
        return list(threads.map(filled, fragments))


def _set_aside(path: Location) -> Location:
    """Rename a damaged checkpoint, so that it no longer counts as one; nothing that may be of use is deleted."""
    if isinstance(path, S3Path):
        return _set_aside_remotely(path)
    aside, number = path.with_name(f"damaged-{path.name}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"damaged-{path.name}.{number}")
    return path.rename(aside)


def _set_aside_remotely(path: S3Path) -> S3Path:
    """S3 has no renaming: copies, which it makes by itself, the marker last."""
    places = _folder(path.parent)
    taken, name, number = places.folders(), f"damaged-{path.name}", 1
    while name in taken:
        number += 1
        name = f"damaged-{path.name}.{number}"
    files = sorted(_folder(path).walk(), key=lambda file: file == MARKER)
    for file in files:
        places.copy(places, f"{path.name}/{file}", f"{name}/{file}")
    clear(path)
    return path.with_name(name)


class Piece(NamedTuple):
    """A saved range of one state of one parameter."""

    start: int
    values: Any
    """A slice of a safetensors file, here or on S3: only what it is indexed with is read."""

    @property
    def numel(self) -> int:
        return self.values.get_shape()[0]


def _check_model(contents: Contents, shapes: Mapping[str, torch.Size], path: Location) -> None:
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
