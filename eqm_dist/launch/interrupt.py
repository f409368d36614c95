"""Ctrl-C: the first one asks the run to save and to end, the second one ends it at once."""

import signal
import sys
import threading
from types import FrameType
from typing import Any


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
