"""A training run on the lab as its user meets it: submitted, looked at while it goes on, submitted again."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cluster.lab import layout
from eqm_dist.errors import LaunchError
from eqm_dist.run_directory import METRICS_FILE
from eqm_dist.track.jsonl import last_values, read_metrics

REPOSITORY = Path(__file__).parents[2]
RUNS = layout.SHARED / "runs"
POLL_S = 0.05
STEP_DEADLINE_S = 600
END_DEADLINE_S = 1800


class Seen(NamedTuple):
    """The newest step in metrics.jsonl at some time; an attempt begins when the file is written anew."""

    time: float
    attempt: int
    step: int


@dataclass
class WatchedRun:
    """A run of one name. Its output and the times of its steps are kept.

    Attributes:
        name: the run's name.
        flags: of pipelines/train.py, by dotted key.
        seen: every change of the newest step, in order.
    """

    name: str
    flags: Mapping[str, Any]
    seen: list[Seen] = field(default_factory=list)
    _jobs: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _ended: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.directory = RUNS / self.name
        self.output = layout.LOGS / f"job-{self.name}.log"
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def submit(self) -> None:
        """``ray job submit`` of the command; the same every time."""
        flags = {"run.name": self.name, "run.root": RUNS, **self.flags}
        words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        self._submission_id = f"{self.name}-{time.time_ns()}"
        submit = ["ray", "job", "submit", "--submission-id", self._submission_id, "--working-dir", "."]
        command = [*submit, "--", "python", "pipelines/train.py", *words]
        environment = _environment()
        with self.output.open("ab") as output:
            job = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT)
        self._jobs.append(job)

    def reach(self, step: int) -> None:
        """Wait until the run has made so many steps.

        Raises:
            LaunchError: it ended before, or took too long.
        """
        end = time.monotonic() + STEP_DEADLINE_S
        while not self.seen or self.seen[-1].step < step:
            if self.ended() or time.monotonic() > end:
                raise LaunchError(f"The run {self.name} did not come to step {step}; see {self.output}.")
            time.sleep(POLL_S)

    def wait(self) -> int:
        """Wait for the end of the job; returns its exit code.

        Raises:
            LaunchError: it took too long.
        """
        try:
            return self._jobs[-1].wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise LaunchError(f"The run {self.name} did not end within {END_DEADLINE_S} s.") from None

    def ended(self) -> bool:
        """Whether the job is over."""
        return self._jobs[-1].poll() is not None

    def close(self) -> None:
        """Look no more; a job that still runs is stopped."""
        if not self.ended():
            stop = ["ray", "job", "stop", self._submission_id]
            subprocess.run(stop, env=_environment(), capture_output=True, timeout=120, check=False)
            self._jobs[-1].kill()
            self._jobs[-1].wait()
        self._ended.set()
        self._thread.join()

    def losses(self) -> dict[int, float]:
        """The loss by step, as the record has it now."""
        lines = read_metrics(self.directory / METRICS_FILE)
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    def counters(self) -> dict[str, float]:
        """What the run itself has counted: restarts, lost steps, goodput."""
        values = last_values(self.directory / METRICS_FILE)
        return {name: value for name, value in values.items() if name.startswith("run/")}

    def told(self) -> list[str]:
        """What the user read that is not the ordinary course of a run."""
        lines = self.output.read_text(errors="replace").splitlines()
        ordinary = re.compile(r"\d\d:\d\d:\d\d (step |saved step|copied |run \S+ starts)")
        ours = re.compile(r"\d\d:\d\d:\d\d |error: |warning: ")
        return [line for line in lines if ours.match(line) and not ordinary.match(line)]

    def _watch(self) -> None:
        file, inode, size = self.directory / METRICS_FILE, 0, -1
        attempt = 0
        while not self._ended.wait(POLL_S):
            with suppress(FileNotFoundError):
                now = file.stat()
                if now.st_ino != inode:
                    attempt += 1
                elif now.st_size == size:
                    continue
                inode, size = now.st_ino, now.st_size
                step = _last_step(file)
                if step is not None:
                    self.seen.append(Seen(time.monotonic(), attempt, step))


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **layout.submitter_environment(), "PATH": path}


def _last_step(file: Path) -> int | None:
    with file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - 4096))
        found = re.findall(rb'^\{"step": (\d+),.*\}$', opened.read(), re.MULTILINE)
    return int(found[-1]) if found else None
