"""Logging as entry points set it up; a library never configures logging, it only logs.

One line is ``HH:MM:SS message``: on the console of a local run, and in ``logs/rank-NNNN.log`` of every worker. The
driver of a cluster run shows rank 0's file as it grows.
"""

import logging
import math
import sys
import threading
import time
from pathlib import Path

from eqm_dist.errors import StorageError
from eqm_dist.redaction import redacted
from eqm_dist.run_directory import LOGS
from eqm_dist.storage.folder import Folder


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))  # what another library says may hold the URL of an endpoint


class _LogFile(logging.Handler):
    """Appends each line at once. While a full disk refuses them the run goes on, and says so once instead of each time;
    the file says how many lines it lacks.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path, self._file = path, path.open("ab", buffering=0)
        self._missing, self._cut = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line."""
        try:
            if self._missing:
                self._append(_FORMAT.format(_missing(record, self._missing)))
                self._missing = 0
            self._append(self.format(record))
        except OSError as error:
            self._missing += 1
            if self._missing == 1:
                text = f"Cannot append to {self._path}: {error.strerror}; its lines are left out until there is room."
                print(f"warning: {redacted(text)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _append(self, line: str) -> None:
        rest = f"{line}\n".encode(errors="backslashreplace")
        rest = b"\n" + rest if self._cut else rest
        while rest:
            written = self._file.write(rest)
            rest, self._cut = rest[written:], written < len(rest)


def _missing(record: logging.LogRecord, lines: int) -> logging.LogRecord:
    text = f"warning: {lines:,} lines are missing here, for which there was no room"
    return logging.makeLogRecord({"msg": text, "created": record.created})


_FORMAT = _Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")


def log_file(run_directory: Path, rank: int) -> Path:
    """Where the worker of this rank writes its lines."""
    return run_directory / LOGS / f"rank-{rank:04d}.log"


def setup_logging(file: Path | None = None, console: bool = True) -> None:
    """Send the package's messages to the console, to a file, or both; replaces an earlier setup."""
    root = logging.getLogger("eqm_dist")
    root.setLevel(logging.INFO)
    root.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)] if console else []
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_LogFile(file))
    for handler in handlers:
        handler.setFormatter(_FORMAT)
    for old in root.handlers:
        old.close()
    root.handlers = handlers


def clock(seconds: float) -> str:
    """``H:MM:SS``."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """One aligned line at most every few seconds: how much is done, how fast, how long it will take."""

    def __init__(self, verb: str, total: int, done: int = 0, every_s: float = 2.0) -> None:
        self._verb, self._total, self._done, self._every_s = verb, total, done, every_s
        self._new = 0
        self._started = self._shown = time.monotonic()

    def add(self, images: int) -> None:
        """So many images more are done."""
        self._new += images
        done, now = self._done + self._new, time.monotonic()
        if now - self._shown < self._every_s and done < self._total:
            return
        self._shown = now
        speed = self._new / max(now - self._started, 1e-9)
        logging.getLogger(__name__).info(
            "%s %s of %s images | %8s images/s | %s left",
            self._verb, f"{done:{len(f'{self._total:,}')},}", f"{self._total:,}", f"{speed:,.1f}",
            clock((self._total - done) / speed),
        )  # fmt: skip


class FileFollower:
    """Prints what is appended to a file from now on; a context manager, so that the last lines are never missed.

    Args:
        folder: where the file lies.
        name: of the file, which need not be there yet.
        poll_s: seconds between two looks.
    """

    def __init__(self, folder: Folder, name: str, poll_s: float = 0.3) -> None:
        self._folder, self._name, self._poll_s = folder, name, poll_s
        self._offset = folder.size(name) or 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="log-follower", daemon=True)

    def __enter__(self) -> "FileFollower":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._show()

    def _show(self) -> None:
        try:
            size = self._folder.size(self._name) or 0
            text = self._folder.read(self._name, self._offset, size) if size > self._offset else b""
        except StorageError:  # who writes it says what is wrong
            return
        whole = text[: text.rfind(b"\n") + 1]  # never half a line
        self._offset += len(whole)
        sys.stdout.write(whole.decode(errors="replace"))
        sys.stdout.flush()
