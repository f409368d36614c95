"""SIGTERM, as schedulers send it some seconds before they kill: it ends a sweep in bounded time."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from eqm_dist.errors import Terminated

END_S = 60.0
"""Seconds within which what was terminated must have ended by itself."""


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
        late = threading.Timer(END_S, os._exit, [128 + signal.SIGTERM])
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
