"""Saving while training goes on: an update waits at most for the copy of the state to host memory.

    training     begin | forward, backward | update | train on ...                      | settle: tell who waits for it
    copying            | this rank's state |
    background                             | write, hash, sync this rank's file | rank 0: EMA, config, marker

The state changes only in an update, so its copy overlaps with the passes before the next one. Ranks agree in the
background through a process group of its own, for the training threads use the default one at the same time
(docs/decisions/0012).
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from eqm_dist.errors import EqmDistError, StorageError
from eqm_dist.run_directory import CONFIG_FILE
from eqm_dist.storage.files import atomic_write, fsync_directory, storage_errors, whole_file
from eqm_dist.storage.location import Location, S3Path
from eqm_dist.storage.open import open_folder, open_s3
from eqm_dist.train.checkpoint import EMA_FILE, FORMAT, MARKER, Checkpoints, agreed, clear, fill, read_pieces, remove
from eqm_dist.train.distributed import background_group, gather_objects, rank, world_size
from eqm_dist.train.engine import Engine, Fragment
from eqm_dist.train.state import TrainState

CHUNK_BYTES = 4 << 20
NICENESS = 10
"""Of the thread that writes: where cores are short, training comes first."""
LONG_WAIT_S = 1.0
"""A save that has to wait longer than this for the one before says so."""
LAST_WAIT_S = 120.0
"""A run that ends with an error waits at most so long for its save: the rank that it agrees with may be gone."""

AHEAD = 8
"""Parameters of the EMA that are read from S3 at once."""

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Saver:
    """Saves one run, a checkpoint at a time. Every rank has one, made and called at the same steps.

    As a context it waits, however the block ends, for what is being written.

    Args:
        checkpoints: where they go; on S3, each rank's files are written to ``staging`` first and put there from it.
        engine: holds the state.
        ema_state: the EMA that is exported whole.
        config: the run's config as YAML, kept beside every checkpoint.
        max_failed: saves in a row that may fail before the run ends.
        staging: directory of this machine for what is on its way to S3; None where checkpoints are not there.
        deadline_s: how long S3 may fail before a save is given up.
        before_marker: called on rank 0 in the background when all but the marker is there.
        on_whole: called on rank 0 in the background with each checkpoint that is whole; must return at once.
        on_checkpoint: called on every rank, in the training thread, with path and step of a whole checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints[Any],
        engine: Engine,
        *,
        ema_state: str,
        config: str,
        max_failed: int,
        staging: Path | None = None,
        deadline_s: float | None = None,
        before_marker: Callable[[], None] = lambda: None,
        on_whole: Callable[[Any], None] = lambda path: None,
        on_checkpoint: Callable[[Any, int], None] = lambda path, step: None,
    ) -> None:
        self._checkpoints = checkpoints
        self._staging = staging
        self._deadline_s = deadline_s
        self._before_marker = before_marker
        self._engine = engine
        self._ema_state = ema_state
        self._config = config
        self._max_failed = max_failed
        self._on_whole = on_whole
        self._on_checkpoint = on_checkpoint
        self._group = background_group()
        self._thread = ThreadPoolExecutor(1, "saver", _be_nice)
        self._copier = ThreadPoolExecutor(1, "copier")
        self._step = 0
        self._pending: Future[StorageError | None] | None = None
        self._failure: StorageError | None = None
        self._failed_in_a_row = 0
        self.failed = 0
        """Saves that failed since this process began."""
        self.waited_s = 0.0
        """How long training has waited for the newest save, so far."""
        self._host: dict[str, Tensor] = {}
        self._copying = self._begin_copy()  # the first touch of fresh memory costs more than the copy: it is paid here
        self._copying.result()

    # --- in the training thread ---

    def begin(self, state: TrainState) -> None:
        """Save the run as it is now; returns at once, but nothing may change before ``wait_copied``. A collective.

        Raises:
            StorageError: the save before this one failed, and so did as many before it as may.
        """
        began = time.perf_counter()
        self.wait()
        self.waited_s = time.perf_counter() - began
        if rank() == 0 and self.waited_s > LONG_WAIT_S:
            logger.info("waited %.1f s until step %s was saved, to save step %s; raise checkpoint.every or use a faster"
                        " disk", self.waited_s, f"{self._step:,}", f"{state.step:,}")  # fmt: skip
        self.settle()
        self._step = state.step
        self._copying = self._begin_copy()
        self._pending = self._thread.submit(self._save, state.step, asdict(state), self._copying)
        self.waited_s = time.perf_counter() - began

    def wait_copied(self) -> None:
        """Until the state that is being saved is copied, so that it may change."""
        if not self._copying.done():
            began = time.perf_counter()
            self._copying.result()
            self.waited_s += time.perf_counter() - began

    @property
    def done(self) -> bool:
        """Whether this rank has written what it was to write."""
        return self._pending is None or self._pending.done()

    def wait(self, longest_s: float | None = None) -> None:
        """Until this rank is done, or not so long."""
        wait([self._pending] if self._pending else [], longest_s)

    def settle(self) -> None:
        """Wait for the save in flight, if any; tell ``on_checkpoint`` of it, or count it as failed. A collective.

        Raises:
            StorageError: it failed, and so did as many before it as may.
        """
        if self._pending is None:
            return
        self._failure, self._pending = self._pending.result(), None
        if self._failure is None:
            self._failed_in_a_row = 0
            self._on_checkpoint(self._checkpoints.path(self._step), self._step)
            return
        self.failed += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self._max_failed:
            raise self._final(self._failure)
        if rank() == 0:
            logger.warning("warning: %s Training goes on, and the next checkpoint is tried; failed saves in a row: %d,"
                           " the run ends at %d", self._failure, self._failed_in_a_row, self._max_failed)  # fmt: skip

    def finish(self) -> None:
        """Settle what is left. A collective.

        Raises:
            StorageError: the last save failed.
        """
        failure = self._pending.result() if self._pending else self._failure
        if failure is not None:
            raise self._final(failure)
        self.settle()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        self.wait(LAST_WAIT_S)

    def _final(self, failure: StorageError) -> StorageError:
        try:
            latest = agreed(self._checkpoints.latest)
            good = f"the last good checkpoint is {latest}" if latest else "there is no earlier checkpoint"
        except StorageError:
            good = f"the last good checkpoint is the newest whole one in {self._checkpoints.directory}"
        return StorageError(f"{failure} Nothing was lost: {good}.")

    def _begin_copy(self) -> "Future[None]":
        if self._engine.replicated and rank() > 0:
            return self._copier.submit(lambda: None)
        values = {f"{piece.state}/{piece.name}/{piece.start}": piece.values for piece in self._engine.fragments()}
        computed = None
        if self._engine.device.type == "cuda":
            computed = torch.cuda.Event()
            computed.record(torch.cuda.current_stream(self._engine.device))
        return self._copier.submit(self._copy, values, computed)

    # --- in the background ---

    @torch.no_grad()
    def _copy(self, state: Mapping[str, Tensor], computed: torch.cuda.Event | None) -> None:
        """Bring the state into host memory, the same from save to save; on a GPU on a stream of its own."""
        stream = None if computed is None else torch.cuda.Stream(self._engine.device)
        with torch.cuda.stream(stream):
            if stream is not None and computed is not None:
                stream.wait_event(computed)
            for key, values in state.items():
                if key not in self._host:
                    self._host[key] = torch.empty_like(values, device="cpu", pin_memory=values.is_cuda)
                self._host[key].copy_(values, non_blocking=True)
        if stream is not None:
            stream.synchronize()

    def _save(self, step: int, state: dict[str, Any], copying: "Future[None]") -> StorageError | None:
        """Write a checkpoint from the copy; what went wrong, the same on every rank, or None."""
        began, path = time.perf_counter(), self._checkpoints.path(step)
        here = path if self._staging is None else self._staging / path.name
        copying.result()
        try:
            self._together(step, lambda: _clear(here, path))
            files = self._together(step, lambda: self._deliver(self._write_own(here), here, path))
            self._together(step, lambda: self._complete(here, path, state, files))
        except StorageError as error:
            if rank() == 0:
                remove(here)
            return error
        finally:
            if here != path:
                self._leave(here)
        if rank() == 0:
            seconds = time.perf_counter() - began
            logger.info("saved step %s in %.1f s, of which training waited %.2f s | %s/%s", f"{step:,}", seconds,
                        self.waited_s, path.parent.name, path.name)  # fmt: skip
            self._tidy(path)
        return None

    def _together(self, step: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Every rank's work, what came of it merged; a failure is raised on every rank, for nobody waits for one."""
        try:
            outcome: dict[str, Any] | str = work()
        except EqmDistError as error:
            outcome = str(error)
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            logger.warning("warning: saving step %s failed", f"{step:,}", exc_info=True)
            outcome = f"{type(error).__name__}: {error}."
        outcomes = gather_objects(outcome, self._group)
        for at, failure in enumerate(outcomes):
            if isinstance(failure, str):
                raise StorageError(f"Saving step {step:,} failed on rank {at}: {failure}")
        return {name: record for part in outcomes for name, record in part.items()}

    @property
    def _own_file(self) -> str:
        return f"state-{rank():04d}-of-{1 if self._engine.replicated else world_size():04d}.safetensors"

    def _write_own(self, here: Path) -> dict[str, Any]:
        """This rank's file, if it has one; returns its record."""
        if self._engine.replicated and rank() > 0:
            return {}
        with storage_errors("create", here):
            here.mkdir(parents=True, exist_ok=True)
        shapes = {key: values.shape for key, values in self._host.items()}
        return write_tensors(here / self._own_file, shapes, self._host.values())

    def _deliver(self, files: dict[str, Any], here: Path, path: Location) -> dict[str, Any]:
        """Put files that are written here where they belong; returns their records."""
        if isinstance(path, S3Path):
            folder = open_s3(path, deadline_s=self._deadline_s)
            for name in files:
                with storage_errors("read", here / name), (here / name).open("rb") as file:
                    folder.upload(name, file)
        return files

    def _leave(self, here: Path) -> None:
        """Nothing of a save stays on this machine that is on S3, or failed."""
        with suppress(OSError):
            if rank() == 0:
                shutil.rmtree(here, ignore_errors=True)
            else:
                (here / self._own_file).unlink(missing_ok=True)
                here.rmdir()

    def _complete(self, here: Path, path: Location, state: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
        """What makes the ranks' files a checkpoint: the whole EMA, the config, and the marker, last."""
        if rank() > 0:
            return {}
        shapes = {**{name: values.shape for name, values in self._engine.frozen.items()}, **self._engine.shapes}
        ema = write_tensors(here / EMA_FILE, shapes, self._ema(here, path, list(files)))
        content = self._config.encode()
        atomic_write(here / CONFIG_FILE, content)
        config = {CONFIG_FILE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
        self._deliver(ema | config, here, path)
        marker = {"format": FORMAT, "step": state["step"], "world_size": world_size(), "state": state,
                  "files": files | ema | config}  # fmt: skip
        self._before_marker()
        open_folder(path, deadline_s=self._deadline_s).write(MARKER, json.dumps(marker, indent=1).encode())
        return {}

    def _ema(self, here: Path, path: Location, files: Sequence[str]) -> Iterator[Tensor]:
        """The EMA model, one parameter after the other, from the files of all ranks."""
        yield from self._engine.frozen.values()
        with storage_errors("read", str(path)):
            if here == path:
                pieces = read_pieces(here, files)
            else:  # what other ranks wrote lies on their machines, and on S3
                pieces = read_pieces(path, [name for name in files if name != self._own_file])
                for key, parts in read_pieces(here, [self._own_file]).items():
                    pieces[key] = sorted([*pieces[key], *parts], key=lambda piece: piece.start)

            def whole(name: str) -> Tensor:
                shape = self._engine.shapes[name]
                found = Fragment(name, self._ema_state, 0, torch.empty(shape.numel()))
                filled = fill(found, pieces[self._ema_state, name])
                assert filled == shape.numel(), f"{filled} of {shape.numel()} elements of {name}"
                return found.values.view(shape)

            yield from map(whole, self._engine.shapes) if here == path else ahead(whole, self._engine.shapes, AHEAD)

    def _tidy(self, path: Location) -> None:
        """What a new checkpoint brings with it; it is whole, whatever happens here."""
        try:
            self._on_whole(path)
            self._checkpoints.retire()
        except Exception as error:
            logger.warning("warning: after %s was saved: %s", path.name, error)


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]], values: Iterable[Tensor]) -> dict[str, Any]:
    """Write a safetensors file as its tensors come, never all of them as bytes; returns its record for the marker.

    Args:
        path: the file.
        shapes: shape of each tensor by name.
        values: fp32 tensors in host memory of these shapes, in this order.

    Raises:
        StorageError: it cannot be written; nothing is left behind.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()
    with whole_file(path) as file:
        for content in _bytes(len(text).to_bytes(8, "little") + text, values):
            for at in range(0, len(content), CHUNK_BYTES):
                chunk = content[at : at + CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
    return {path.name: {"bytes": 8 + len(text) + end, "sha256": digest.hexdigest()}}


def _bytes(head: bytes, values: Iterable[Tensor]) -> Iterator[memoryview]:
    yield memoryview(head)
    for tensor in values:
        assert tensor.dtype == torch.float32
        yield tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _be_nice() -> None:
    """Leave the cores to training where there are too few; on Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + NICENESS  # that of Ray's workers is 15 already
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, 19))


def _clear(here: Path, path: Location) -> dict[str, Any]:
    """Room for a checkpoint: what an attempt that was killed has left goes; whole ones are never rewritten."""
    if rank() == 0:
        with storage_errors("create", here):
            if here.exists():
                shutil.rmtree(here)
            here.mkdir(parents=True)
        fsync_directory(here.parent)  # the marker's sync does not cover the name of its directory
        if isinstance(path, S3Path):
            clear(path)
    return {}


def ahead(work: Callable[[S], T], items: Iterable[S], number: int) -> Iterator[T]:
    """The results of work on each item, in order, by so many threads, which are no further ahead than their number."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(number, "ahead") as threads:
        for item in items:
            waiting.append(threads.submit(work, item))
            if len(waiting) > number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
