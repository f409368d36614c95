"""A small process beside each worker that finds out when it hangs, says where, and ends it.

Ray notices a process that dies. One that stands still, stopped by a signal or waiting for a disk or for another rank,
would hold up the whole run until the collectives' time-out. So each worker tells its watchdog of every step, and the
watchdog ends a worker that made none for too long: Ray then restarts the run from its last checkpoint.

This file is both sides. The worker's side is ``Watchdog``; the other is the file run as a program. It imports the
standard library alone, which takes some 20 ms, and so it may be started for every worker.
"""

import faulthandler
import mmap
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

_SIGNAL = signal.SIGUSR2
"""Makes a worker write the stacks of its threads; nothing else that runs in one uses it."""
_LEAST_S: dict[str, float] = {
    # Waits that are no hangs: loading and compiling, a slow disk. What has no natural end is not watched.
    "starting": 1800, "training": 0, "saving": 600, "evaluating": float("inf"), "finishing": float("inf"),
}  # fmt: skip
_GRACE_S = 30.0
"""A rank that waits for others gets so much longer at most: the one that it waits for has a watchdog too."""
_COLLECTIVES = ("torch/distributed/distributed_c10d.py", "ray/train/v2/_internal/execution/collective_impl.py")
_LAYOUT = struct.Struct("<ddq16s")


class Watchdog:
    """The watchdog of this process, as a context; made in the thread that trains.

    Args:
        rank: of this worker.
        deadline_s: longest time between two steps.
        log: where the sentence goes that says who hung where; the stacks go beside it.
    """

    def __init__(self, rank: int, deadline_s: float, log: Path) -> None:
        self._deadline_s = deadline_s
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this process)
        self._file.truncate(_LAYOUT.size)
        self._heartbeat = mmap.mmap(self._file.fileno(), _LAYOUT.size)
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115
        faulthandler.register(_SIGNAL, self._stacks, all_threads=True)
        self.beat(0, "starting")
        files = self._file.fileno(), self._stacks.fileno()
        worker = os.getpid(), threading.get_ident(), threading.get_native_id()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *map(str, (*worker, rank, deadline_s, *files, log))],
            pass_fds=files, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def beat(self, step: int, doing: str) -> None:
        """A step is done; what is done next until the next beat."""
        now = time.monotonic()
        limit_s = max(self._deadline_s, _LEAST_S[doing])
        _LAYOUT.pack_into(self._heartbeat, 0, now, now + limit_s, step, doing.encode())

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        faulthandler.unregister(_SIGNAL)
        self._heartbeat.close()
        self._file.close()
        self._stacks.close()


# --- the other side ---


class _Worker(NamedTuple):
    pid: int
    thread: int
    """As Python numbers it, in a dump of the stacks."""
    native_thread: int
    """As the system numbers it."""
    rank: int


class _Beat(NamedTuple):
    time: float
    expires: float
    step: int
    doing: str


def _watch(worker: _Worker, deadline_s: float, heartbeat: mmap.mmap, stacks: IO[bytes], log: Path) -> None:
    """Until the worker ends, or has to be ended."""
    pause_s, grace_s = min(1.0, deadline_s / 10), min(_GRACE_S, deadline_s)
    last, beat, more_s = time.monotonic(), _read(heartbeat), 0.0
    while os.getppid() == worker.pid:
        time.sleep(pause_s)
        now, before, beat = time.monotonic(), beat, _read(heartbeat)
        # Where this process was held up, on a machine that is frozen or very busy, so was its worker.
        more_s = 0.0 if beat != before else more_s + max(0.0, now - last - 2 * pause_s)
        last = now
        if now < beat.expires + more_s:
            continue
        where, stack, waits = _whereabouts(worker, stacks)
        if waits and now < beat.expires + more_s + grace_s:
            continue
        if _read(heartbeat) != beat:  # it woke up meanwhile
            continue
        os.kill(worker.pid, signal.SIGKILL)  # first, for it may be the disk of the log that hangs
        what = f"after step {beat.step:,}" if beat.doing == "training" else f"while {beat.doing}, step {beat.step:,}"
        sentence = (
            f"{time.strftime('%H:%M:%S')} warning: rank {worker.rank} on {socket.gethostname()} (process {worker.pid})"
            f" has made no step for {now - beat.time:.0f} s, {what}: it {where}; ended, so that the run restarts\n"
        )
        with log.open("a") as file:
            file.write(sentence)
        with log.with_name(f"rank-{worker.rank:04d}.stacks").open("a") as file:
            file.write(f"{sentence}{stack}\n")
        return


def _read(heartbeat: mmap.mmap) -> _Beat:
    moment, expires, step, doing = _LAYOUT.unpack_from(heartbeat)
    return _Beat(moment, expires, step, doing.rstrip(b"\0").decode())


def _whereabouts(worker: _Worker, stacks: IO[bytes]) -> tuple[str, str, bool]:
    """What a worker is at: in words, as stacks, and whether it waits for other ranks."""
    state = _state(worker)
    if state in ("T", "t"):
        return "was stopped by a signal", "", False
    stack = _dump(worker, stacks)
    found = re.search(rf"hread 0x0*{worker.thread:x} .*\n((?:  .*\n)*)", stack)
    frames = re.findall(r'File "(.+)", line (\d+) in (.+)', found[1]) if found else []
    for file, _, function in frames:
        if file.endswith(_COLLECTIVES):
            return f"waits for the other ranks in {function}", stack, True
    verb = "waits for a disk" if state == "D" else "is"
    inner = [f"{function} ({_short(file)}:{line})" for file, line, function in frames]
    ours = next((name for name, (file, _, _) in zip(inner, frames, strict=True) if "/eqm_dist/" in file), None)
    if not inner:
        return f"{verb} somewhere outside of Python", stack, False
    return f"{verb} in {inner[0]}" + (f", called from {ours}" if ours not in (None, inner[0]) else ""), stack, False


def _state(worker: _Worker) -> str:
    """The letter by which the system describes the training thread; nothing where there is no /proc."""
    try:
        status = Path(f"/proc/{worker.pid}/task/{worker.native_thread}/stat").read_text()
    except OSError:
        return ""
    return status.rpartition(")")[2].split()[0]


def _dump(worker: _Worker, stacks: IO[bytes]) -> str:
    """Make the worker write its stacks, and wait until they are whole."""
    before = size = os.fstat(stacks.fileno()).st_size
    os.kill(worker.pid, _SIGNAL)
    for _ in range(20):
        time.sleep(0.1)
        known, size = size, os.fstat(stacks.fileno()).st_size
        if before < known == size:
            break
    return os.pread(stacks.fileno(), size - before, before).decode(errors="replace")


def _short(file: str) -> str:
    """A path as far as it tells something."""
    return re.sub(r".*/(?=(?:site-packages|eqm_dist|lib/python[\d.]+)/)(?:site-packages/|lib/python[\d.]+/)?", "", file)


def _main(arguments: list[str]) -> None:
    pid, thread, native_thread, rank, deadline_s, heartbeat, stacks, log = arguments
    with open(int(stacks), "rb") as file:
        memory = mmap.mmap(int(heartbeat), _LAYOUT.size, prot=mmap.PROT_READ)
        worker = _Worker(int(pid), int(thread), int(native_thread), int(rank))
        _watch(worker, float(deadline_s), memory, file, Path(log))


if __name__ == "__main__":
    _main(sys.argv[1:])
