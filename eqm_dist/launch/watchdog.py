"""A small process beside each worker that finds out when it hangs, says where, and ends it.

Ray notices a process that dies. One that stands still, stopped by a signal or waiting for a disk or for another rank,
would hold up the whole run until the collectives' time-out. So each worker tells its watchdog of every step, and the
watchdog ends a worker that made none for too long: Ray then restarts the run from its last checkpoint.

Where one rank hangs, all stand still. Under gloo those that wait for it are inside a collective. Under NCCL one returns
at once, and they wait wherever they next read a value. So each rank marks where it may wait for others, and
watchdogs whose time is up tell each other, beside the log, how far their ranks have come: who is behind hangs.

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
_SETTLE_PAUSES = 3
"""For so many of its pauses a watchdog listens to the others before it ends a worker."""
_LAYOUT = struct.Struct("<ddq?16s")


class Watchdog:
    """The watchdog of this process, as a context; made in the thread that trains.

    Args:
        rank: of this worker.
        deadline_s: longest time between two steps.
        log: where the sentence goes that says who hung where; the stacks go beside it.
    """

    def __init__(self, rank: int, deadline_s: float, log: Path) -> None:
        self._deadline_s = deadline_s
        _note(log, rank).unlink(missing_ok=True)  # of an attempt before
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
        _LAYOUT.pack_into(self._heartbeat, 0, now, now + limit_s, step, False, doing.encode())

    def join(self) -> None:
        """From here to the next beat this rank may wait for the others, whatever it seems to do."""
        moment, expires, step, _, doing = _LAYOUT.unpack_from(self._heartbeat)
        _LAYOUT.pack_into(self._heartbeat, 0, moment, expires, step, True, doing)

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
    joined: bool
    """Whether it may be waiting for the others since then."""
    doing: str

    @property
    def position(self) -> tuple[int, bool]:
        """How far the rank has come; those that it waits for are behind it."""
        return self.step, self.joined


class _Meeting(threading.Thread):
    """Tells the other ranks' watchdogs how far a rank has come, and hears of theirs.

    Through files beside the log, which all ranks write; as a thread, for what hangs may be their disk.
    """

    def __init__(self, log: Path, rank: int, position: tuple[int, bool], since: float, pause_s: float) -> None:
        super().__init__(daemon=True)
        self._log, self._rank, self._position, self._since, self._pause_s = log, rank, position, since, pause_s
        self._over = threading.Event()
        self._others: dict[int, tuple[int, bool]] = {}
        self.start()

    def run(self) -> None:
        own = _note(self._log, self._rank)
        temporary = own.with_suffix(".tmp")
        temporary.write_text(f"{self._position[0]} {int(self._position[1])} {time.time()}")
        temporary.rename(own)
        while not self._over.wait(self._pause_s):
            notes = {int(file.stem.removeprefix("rank-")): file for file in self._log.parent.glob("rank-*.late")}
            self._others = {rank: found for rank, file in notes.items() if (found := self._read(file)) is not None}
        own.unlink(missing_ok=True)

    def _read(self, file: Path) -> tuple[int, bool] | None:
        try:
            step, joined, moment = file.read_text().split()
        except OSError:  # it has made a step
            return None
        return (int(step), joined == "1") if float(moment) > self._since else None  # else of an attempt before

    def end(self) -> None:
        """The rank goes on."""
        self._over.set()

    def behind(self) -> list[int]:
        """The ranks that have come less far than this one, as far as one has heard."""
        return sorted(rank for rank, position in self._others.items() if position < self._position)


def _watch(worker: _Worker, deadline_s: float, heartbeat: mmap.mmap, stacks: IO[bytes], log: Path) -> None:
    """Until the worker ends, or has to be ended."""
    pause_s, grace_s = min(1.0, deadline_s / 10), min(_GRACE_S, deadline_s)
    last, beat, more_s, since = time.monotonic(), _read(heartbeat), 0.0, time.time()
    meeting: _Meeting | None = None
    while os.getppid() == worker.pid:
        time.sleep(pause_s)
        now, before, beat = time.monotonic(), beat, _read(heartbeat)
        # Where this process was held up, on a machine that is frozen or very busy, so was its worker.
        more_s = 0.0 if beat != before else more_s + max(0.0, now - last - 2 * pause_s)
        last = now
        late_s = now - beat.expires - more_s
        if late_s < 0:
            if meeting is not None:
                meeting.end()
                meeting = None
            continue
        if meeting is None:
            meeting = _Meeting(log, worker.rank, beat.position, since, pause_s)
        where, stack, waits = _whereabouts(worker, stacks)
        behind = meeting.behind()
        if late_s < (grace_s if waits or beat.joined or behind else _SETTLE_PAUSES * pause_s):
            continue
        if _read(heartbeat) != beat:  # it woke up meanwhile
            continue
        if behind:
            where = f"{where}, and rank {behind[0]} has come less far"
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
    moment, expires, step, joined, doing = _LAYOUT.unpack_from(heartbeat)
    return _Beat(moment, expires, step, joined, doing.rstrip(b"\0").decode())


def _note(log: Path, rank: int) -> Path:
    """Where a rank's watchdog says how far it has come."""
    return log.with_name(f"rank-{rank:04d}.late")


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
