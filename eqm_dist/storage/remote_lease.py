"""Who works on a prefix of S3: one process at a time, and a dead one does not keep it.

The holder's name lies in an object, which it writes anew every few seconds. S3 writes an object only if it is still the
one that the writer saw (``S3Folder.write_if``), so of several that take it one has it. Whoever finds it watches it: an
object that changes has a holder that lives. No clock is compared with another.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from eqm_dist.errors import BusyError, StorageError
from eqm_dist.storage.lease import LEASE_FILE, Holder, logger
from eqm_dist.storage.location import S3Path
from eqm_dist.storage.open import open_s3
from eqm_dist.storage.s3 import S3Folder

BEAT_S = 10.0
"""Seconds between two signs of life."""
LEASE_S = 60.0
"""Seconds without one after which a holder on another machine counts as dead."""
SETTLE_S = 0.5
"""Seconds after which a lease is read again: a server that knows no conditions would have let two take it."""


@contextmanager
def hold_on_s3(place: S3Path, what: str, remedy: str) -> Iterator[None]:
    """Hold a prefix while the block runs.

    Where the holder is dead, it is taken over: at once if it was on this machine, otherwise after ``LEASE_S`` without a
    sign of life.

    Args:
        place: held as a whole.
        what: what it is, for the sentence: ``The run digits``.
        remedy: what else the user may do: ``choose another --run.name``.

    Raises:
        BusyError: another process holds it.
        StorageError: S3 does not answer, may not be written to, or has no conditional writes.
    """
    folder, own = open_s3(place), Holder.of_this_process()
    sign = _take(folder, own, what, remedy)
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(folder, sign, over, what), name="lease", daemon=True)
    beats.start()
    try:
        yield
    finally:
        over.set()
        beats.join()
        with suppress(StorageError):
            found = _found(folder)
            if found is not None and found.holder == own:
                folder.remove(LEASE_FILE)


@dataclass(frozen=True)
class _Sign:
    """What a holder has written.

    Attributes:
        holder: who; None where the object says nothing.
        version: of the object.
        number: how many before.
    """

    holder: Holder | None
    version: str
    number: int


def _take(folder: S3Folder, own: Holder, what: str, remedy: str) -> _Sign:
    before = _found(folder)
    if before is not None and before.holder is not None and not before.holder.gone:
        if _lives(folder, before, before.holder, what):
            raise BusyError(f"{what} is held by {before.holder}; wait until it ends, stop it, or {remedy}.")
        logger.warning("warning: %s was held by %s, which gives no sign of life; it is taken over", what, before.holder)
        before = _found(folder)
    version = folder.write_if(LEASE_FILE, _content(own, 0), before.version if before else None)
    time.sleep(SETTLE_S)
    now = _found(folder)
    if version is None or now is None or now.holder != own:
        by = now.holder if now is not None else "nobody any more"
        raise BusyError(f"{what} is held by {by}; wait until it ends, stop it, or {remedy}.")
    return now


def _lives(folder: S3Folder, first: _Sign, holder: Holder, what: str) -> bool:
    """Whether the holder writes its object, or another one does; waits for that until its lease has run out."""
    if holder.here:
        return True  # its process runs, or is stopped and may run again
    began, said = time.monotonic(), False
    while time.monotonic() - began < LEASE_S:
        time.sleep(BEAT_S / 10)
        now = _found(folder)
        if now is None:
            return False
        if now.version != first.version:
            return True
        if not said and time.monotonic() - began > BEAT_S:
            logger.info("%s is held by %s; waiting up to %.0f s for a sign of life", what, holder, LEASE_S)
            said = True
    return False


def _beat(folder: S3Folder, sign: _Sign, over: threading.Event, what: str) -> None:
    """Write the object again and again. A process that was frozen until another took over must not go on."""
    own = sign.holder
    assert own is not None
    while not over.wait(BEAT_S):
        with suppress(StorageError):  # S3 that fails for a while costs the lease only if others see it earlier again
            found = _found(folder)
            if found is None or found.holder == own:
                number = sign.number + 1
                version = folder.write_if(LEASE_FILE, _content(own, number), None if found is None else found.version)
                if version is not None:
                    sign = _Sign(own, version, number)
                    continue
                found = _found(folder)
            by = found.holder if found is not None else "nobody any more"
            print(
                f"error: {what} was taken over by {by}, for this process gave no sign of life for {LEASE_S:.0f} s; it"
                " ends, so that the two do not mix.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def _found(folder: S3Folder) -> _Sign | None:
    found = folder.versioned(LEASE_FILE)
    if found is None:
        return None
    content, version = found
    try:
        said = json.loads(content)
        return _Sign(Holder(**said["holder"]), version, int(said["number"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return _Sign(None, version, 0)


def _content(holder: Holder, number: int) -> bytes:
    return json.dumps({"holder": asdict(holder), "number": number}).encode()
