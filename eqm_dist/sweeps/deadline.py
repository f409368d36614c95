"""How long a sweep may go on."""

import time


class Deadline:
    """So many hours from now; None is no limit."""

    def __init__(self, hours: float | None) -> None:
        self._end = None if hours is None else time.monotonic() + 3600 * hours

    @property
    def hours_left(self) -> float | None:
        """Not positive once the time is up; None without a limit."""
        return None if self._end is None else (self._end - time.monotonic()) / 3600

    @property
    def passed(self) -> bool:
        """Whether the time is up."""
        return self._end is not None and time.monotonic() >= self._end
