"""Ctrl-C: the first one asks the run to save and to end, the second one ends it at once. SIGTERM ends a sweep."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from eqm_dist.errors import Terminated

END_S = 60.0
"""Seconds within which what was terminated must have ended by itself."""


class Interrupt:
    """Takes the interrupts of this process while it is a context; those of other threads' runs are not its own."""

    def __init__(self) -> None:
        self.asked = False
        """Whether the run is to end."""
        self._before: Any = None

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("interrupted: the run saves a checkpoint and ends; Ctrl-C again ends it at once", file=sys.stderr)


@contextmanager
def ending_at_sigterm() -> Iterator[None]:
    """End the block with ``Terminated`` when this process is asked to end, and the process if that takes a minute.

    Later ones are ignored, so that none falls into the end that the first one began.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        asked.set()
        late = threading.Timer(END_S, os._exit, [Terminated.exit_code])
        late.daemon = True
        late.start()
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        if asked.is_set():  # Ray makes a plain interrupt of it
            raise Terminated from None
        raise
    finally:
        if not asked.is_set():
            signal.signal(signal.SIGTERM, before)
