"""Ctrl-C, or the SIGTERM of a scheduler: the first asks the run to save and to end, the second ends it at once."""

import signal
import sys
import threading
from types import FrameType
from typing import Any

from eqm_dist.errors import Terminated

_KINDS = {
    signal.SIGINT: (KeyboardInterrupt, "interrupted", "Ctrl-C"),
    signal.SIGTERM: (Terminated, "terminated", "SIGTERM"),
}


class Interrupt:
    """Takes the interrupts of this process while it is a context; those of other threads' runs are not its own."""

    def __init__(self) -> None:
        self._kind: type[KeyboardInterrupt] | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return self._kind is not None

    def check(self) -> None:
        """End the command as it was asked to.

        Raises:
            KeyboardInterrupt: it was; ``Terminated`` where it was by the system.
        """
        if self._kind is not None:
            raise self._kind

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in _KINDS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        kind, word, again = _KINDS[signal.Signals(number)]
        if self.asked:
            raise kind
        self._kind = kind
        print(f"{word}: the run saves a checkpoint and ends; {again} again ends it at once", file=sys.stderr)
