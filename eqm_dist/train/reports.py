"""The reports of a run on S3: what rank 0 writes on its machine follows to the run's prefix within seconds.

Metrics and logs only become longer. What is new of them is put behind what S3 has, which it copies by itself: a line
costs the same after a million others. Smaller files than S3 takes as a part are put again as a whole.
"""

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from eqm_dist.errors import StorageError
from eqm_dist.run_directory import LOGS, METRICS_FILE, MLFLOW_FILE, is_report
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.storage.location import S3Path
from eqm_dist.storage.open import open_s3
from eqm_dist.storage.s3 import LEAST_PART_BYTES

LAG_S = 5.0
"""Seconds between two looks for what is new."""
LAST_LAG_S = 20.0
"""How long the end of a run that fails waits for S3."""
LOG = f"{LOGS}/rank-0000.log"

logger = logging.getLogger(__name__)


class _Sent(NamedTuple):
    inode: int
    size: int
    mtime_ns: int


class Reports:
    """The reports of one run, from this machine to S3. Only rank 0, or the driver while there is none, has one.

    As a context it follows the files in the background, and brings what is left when the block ends.

    Args:
        directory: the run on this machine.
        place: the run on S3.
        deadline_s: how long S3 may fail before a file is given up; the next look tries it again.
    """

    def __init__(self, directory: Path, place: S3Path, deadline_s: float | None) -> None:
        self._directory = directory
        self._folder = open_s3(place, deadline_s=deadline_s)
        self._sent: dict[str, _Sent] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="reports", daemon=True)
        self._failing = False

    def fetch(self) -> None:
        """Bring the reports that S3 has to this machine, and remove others, which are of an attempt that was cut off.

        A log stays that is longer here: its last lines had not followed.

        Raises:
            StorageError: S3 does not answer, or the directory cannot be written.
        """
        names = [name for name in self._folder.walk() if _follows(name)]
        for path in self._files():
            if (name := path.relative_to(self._directory).as_posix()) not in names and name != LOG:
                path.unlink(missing_ok=True)
        for name in names:
            path = self._directory / name
            if name == LOG and path.exists() and path.stat().st_size >= (self._folder.size(name) or 0):
                continue
            with storage_errors("create", path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, self._folder.read(name))
            self._sent[name] = _state(path)

    def put(self) -> None:
        """Bring what is new to S3.

        Raises:
            StorageError: that is not possible; what did not arrive is tried again.
        """
        with self._lock:
            for path in self._files():
                with suppress(FileNotFoundError):  # removed meanwhile
                    self._put(path.relative_to(self._directory).as_posix(), path)
            gone = [name for name in self._sent if not (self._directory / name).exists()]
            self._folder.remove_all(gone)
            for name in gone:
                del self._sent[name]

    def _put(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            before, now = self._sent.get(name), _state(path)
            if now == before:
                return
            grows = name in (METRICS_FILE, LOG)
            same = before is not None and before.inode == now.inode and before.size <= now.size
            start = before.size if grows and same and before is not None and before.size >= LEAST_PART_BYTES else 0
            if grows:  # whole lines, for half a line may still be taken back
                file.seek(start)
                content = file.read(now.size - start)
                content = content[: content.rfind(b"\n") + 1]
                now = now._replace(size=start + len(content))
                if start and content:
                    self._folder.append(name, start, content)
                elif not start:
                    self._folder.write(name, content)
            else:
                self._folder.upload(name, file)
            self._sent[name] = now

    def _files(self) -> Sequence[Path]:
        found = [*self._directory.glob("*"), *self._directory.glob("*/*")]
        return [path for path in found if _follows(path.relative_to(self._directory).as_posix())]

    def _follow(self) -> None:
        while not self._over.wait(LAG_S):
            self._try()

    def _try(self) -> None:
        try:
            self.put()
            if self._failing:
                logger.info("the reports of the run follow to %s again", self._folder.url)
            self._failing = False
        except Exception as error:  # whatever it is, training goes on
            if not self._failing:
                logger.warning("warning: the reports of the run do not follow for now: %s", error)
            self._failing = True

    def __enter__(self) -> "Reports":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(LAST_LAG_S if kind else None)
        if kind is None:
            self.put()
        elif not self._thread.is_alive() and not self._failing:
            with suppress(StorageError):
                self.put()


def _follows(name: str) -> bool:
    return is_report(name) or name in (MLFLOW_FILE, LOG)


def _state(path: Path) -> _Sent:
    status = path.stat()
    return _Sent(status.st_ino, status.st_size, status.st_mtime_ns)
