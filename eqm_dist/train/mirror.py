"""A second copy of a run elsewhere, on S3 or another disk, made while training goes on.

    MIRROR/RUN/checkpoints/step_00000500/...    as in the run directory; COMPLETE.json comes last and goes first
    MIRROR/RUN/config.yaml, metrics.jsonl ...   the reports

A run directory that is lost, or older than its mirror, is fetched from there when the run starts again.
"""

import hashlib
import logging
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from eqm_dist.errors import CheckpointError, StorageError
from eqm_dist.run_directory import CHECKPOINTS, MLFLOW_FILE, is_report, step_in
from eqm_dist.storage.files import atomic_write, storage_errors, whole_file
from eqm_dist.storage.folder import Folder
from eqm_dist.storage.open import open_folder
from eqm_dist.train.checkpoint import MARKER, Checkpoints, contents_of, parse_marker, step_of

TRANSFERS = 4
"""Files copied or fetched at once."""

logger = logging.getLogger(__name__)


class Mirror:
    """The mirror of one run. Only rank 0 writes to it, and the driver reads it before the run starts.

    Args:
        location: MIRROR/RUN, a directory or an s3:// prefix.
        directory: the run directory.
        checkpoints: those of the run directory.
        deadline_s: how long S3 may fail before a copy is given up.

    Raises:
        DataError: ``location`` is another kind of URL.
    """

    def __init__(
        self, location: str, directory: Path, checkpoints: Checkpoints[Path], deadline_s: float | None
    ) -> None:
        self.reports: Folder = open_folder(location, deadline_s=deadline_s)
        self._places: Folder = open_folder(f"{location}/{CHECKPOINTS}", deadline_s=deadline_s)
        self._directory = directory
        self._checkpoints = checkpoints
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: _OpenCheckpoint | None = None
        self._failure: str | None = None
        self._sent: dict[str, tuple[int, int]] = {}

    # --- writing ---

    def copy(self, checkpoint: Path) -> None:
        """Begin to copy a whole checkpoint, and the reports; returns at once.

        One copy is made at a time. Of those that come meanwhile the newest is next, the others are left out. A copy
        that fails is a warning, for the next checkpoint brings another.
        """
        # Opened here, so that the run may remove the checkpoint while its copy is under way.
        opened = _OpenCheckpoint(checkpoint)
        with self._lock:
            if self._waiting is not None:
                self._waiting.close()
            self._waiting = opened
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror")
                self._thread.start()

    def wait(self) -> None:
        """Until nothing is being copied."""
        while (thread := self._thread) is not None:
            thread.join()

    def complete(self) -> None:
        """Bring the mirror of a run up to date that has ended.

        Raises:
            StorageError: its last checkpoint or a report cannot be copied.
        """
        latest = self._checkpoints.latest()
        if latest is not None and not self._has(latest):
            self.copy(latest)
            self.wait()
        if self._failure is not None:
            raise StorageError(
                f"{self._failure} Nothing is lost: {self._directory} has it; run the same command again to copy it."
            )
        self._copy_reports()

    def _work(self) -> None:
        while True:
            with self._lock:
                opened, self._waiting = self._waiting, None
                if opened is None:
                    self._thread = None
                    return
            with opened:
                self._failure = self._outcome(opened)

    def _outcome(self, opened: "_OpenCheckpoint") -> str | None:
        """Copy a checkpoint; a sentence if that failed, which is logged too."""
        try:
            self._copy(opened)
        except Exception as error:  # whatever it is, training goes on
            failure = f"The checkpoint {opened.name} is not on the mirror {self.reports.url}: {error}"
            logger.warning("warning: %s", failure)
            return failure
        try:
            self._retire()
        except Exception as error:  # likewise
            logger.warning("warning: old checkpoints stay on the mirror for now: %s", error)
        logger.info("copied %s to %s", opened.name, self.reports.url)
        return None

    def _copy(self, opened: "_OpenCheckpoint") -> None:
        self._places.remove(f"{opened.name}/{MARKER}")  # of an earlier attempt: its files are about to be replaced
        with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="mirror") as threads:
            list(
                threads.map(lambda name: self._places.upload(f"{opened.name}/{name}", opened.files[name]), opened.files)
            )
        self._copy_reports()  # before the marker: who resumes there finds the metrics up to there
        self._places.write(f"{opened.name}/{MARKER}", opened.marker)

    def _copy_reports(self) -> None:
        for path in [*self._directory.glob("*"), *self._directory.glob("*/*")]:
            name = path.relative_to(self._directory).as_posix()
            if not is_report(name) and name != MLFLOW_FILE:  # only the driver can tell of what use that is elsewhere
                continue
            with storage_errors("read", path):
                status = path.stat()
                version = status.st_size, status.st_mtime_ns
                content = path.read_bytes() if self._sent.get(name) != version else None
            if content is not None:
                self.reports.write(name, content)
                self._sent[name] = version

    def _has(self, checkpoint: Path) -> bool:
        name = f"{checkpoint.name}/{MARKER}"
        with suppress(StorageError):  # a copy will say what is wrong
            return self._places.size(name) is not None and self._places.read(name) == (checkpoint / MARKER).read_bytes()
        return False

    def _retire(self) -> None:
        """Keep what the run keeps; remove the other checkpoints, and what killed copies left behind."""
        kept = self._checkpoints.kept([step_of(name) for name in reversed(self.whole())])
        steps = {place: step_in(place) for place in self._places.folders()}
        removed = [place for place, step in steps.items() if step is not None and step not in kept]
        names = [name for name in self._places.walk() if name.split("/")[0] in removed]
        for name in sorted(names, key=lambda name: not name.endswith(f"/{MARKER}")):  # markers first
            self._places.remove(name)

    # --- reading ---

    def whole(self) -> list[str]:
        """Names of all whole checkpoints on the mirror, newest first.

        Raises:
            StorageError: the mirror cannot be listed.
        """
        marked = (name.rpartition("/") for name in self._places.walk())
        found = (name for name, _, file in marked if file == MARKER and step_in(name) is not None)
        return sorted(found, key=step_of, reverse=True)

    def newer(self) -> list[str]:
        """Those of ``whole`` that are newer than everything in the run directory."""
        latest = self._checkpoints.latest()
        newest = step_of(latest.name) if latest else -1
        whole = [name for name in self.whole() if step_of(name) > newest]
        for name in self._places.folders():
            if (step_in(name) or -1) > max(map(step_of, whole), default=newest):
                logger.warning(
                    "warning: the copy of %s to %s was not finished; it is passed over", name, self.reports.url
                )
        return whole

    def fetch(self, names: Sequence[str]) -> Path | None:
        """Bring the first of these checkpoints that is undamaged into the run directory, and the reports.

        Returns:
            The checkpoint; None if all are damaged and the run directory has an older one.

        Raises:
            CheckpointError: all are damaged, and there is no other.
            StorageError: the mirror cannot be read, or the run directory cannot be written.
        """
        for name in names:
            try:
                marker = self._fetch_files(name)
            except CheckpointError as error:
                shutil.rmtree(self._checkpoints.directory / name, ignore_errors=True)
                logger.warning("warning: the checkpoint %s on the mirror cannot be used: %s", name, error)
                continue
            self._fetch_reports()
            # The marker comes last here too: until then a kill leaves nothing that would be taken for the newest.
            atomic_write(self._checkpoints.directory / name / MARKER, marker)
            logger.info("fetched %s from %s", name, self.reports.url)
            return self._checkpoints.directory / name
        if self._checkpoints.latest() is None:
            raise CheckpointError(
                f"The mirror {self.reports.url} must hold an undamaged checkpoint of the run, but all {len(names)} are"
                " damaged; repair it, or leave out checkpoint.mirror to start the run over."
            )
        return None

    def _fetch_files(self, name: str) -> bytes:
        """The files of a checkpoint, checked against its marker, which is returned."""
        target = self._checkpoints.directory / name
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed
        with storage_errors("create", target):
            target.mkdir(parents=True)
        content = self._places.read(f"{name}/{MARKER}")
        marker = parse_marker(content, f"{self._places.url}/{name}")

        def fetch(file: str) -> None:
            if self._places.size(f"{name}/{file}") is None:
                raise CheckpointError(f"{self._places.url}/{name}/{file} is missing.")
            with whole_file(target / file) as opened:
                self._places.download(f"{name}/{file}", opened)
            with open(target / file, "rb") as opened:
                found, expected = hashlib.file_digest(opened, "sha256").hexdigest(), marker["files"][file]["sha256"]
            if found != expected:
                raise CheckpointError(
                    f"{self._places.url}/{name}/{file} has the sha256 {found[:12]}..., its marker says"
                    f" {expected[:12]}..."
                )

        with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="mirror") as threads:
            list(threads.map(fetch, marker["files"]))
        contents_of(target, marker)
        return content

    def _fetch_reports(self) -> None:
        for name in self.reports.walk():
            path = self._directory / name
            if is_report(name):
                with storage_errors("create", path.parent):
                    path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, self.reports.read(name))


class _OpenCheckpoint(ExitStack):
    """The open files of a whole checkpoint, which stay readable when it is removed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name = path.name
        with storage_errors("read", path):
            self.marker = (path / MARKER).read_bytes()
            names = parse_marker(self.marker, path)["files"]
            self.files: dict[str, BinaryIO] = {
                name: self.enter_context(open(path / name, "rb"))  # noqa: SIM115
                for name in names
            }
