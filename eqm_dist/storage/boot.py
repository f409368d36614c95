"""What tells moments and processes of one machine apart, whatever is done to its clock.

A clock is set by NTP, by a virtual machine that wakes up, or by hand, and all times that were taken from it before, the
start of a process among them, are then off. What is counted from the start of the machine stays true until the next.
"""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil


def boot() -> str:
    """A name that the machine has from this start to the next; empty where the system gives none."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def seconds_up() -> float:
    """Seconds since the machine was started, asleep or not; only differences within one ``boot`` mean anything."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def processes() -> str:
    """A name of where the numbers of processes are those that this process sees: a machine since its start, or a
    container of it, though both call themselves alike."""
    with suppress(OSError):
        return f"{boot()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def started(process: int) -> float | None:
    """When a process started, by a count that no clock shifts; None where none of this number runs."""
    stat = Path(f"/proc/{process}/stat")
    if not Path("/proc/self/stat").exists():
        with suppress(psutil.Error):
            return psutil.Process(process).create_time()
        return None
    try:
        state, *fields = stat.read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # A process that has ended and that its parent has not asked for does nothing any more.
    return None if state in (b"Z", b"X") else float(fields[18])
