"""Tune prints pages about every trial that dies, for those who develop it. We say it in a sentence, and Ray's log files
keep the rest.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what Tune prints of trials that die. Around a search."""
    tune = logging.getLogger("ray.tune")
    level = tune.level
    tune.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        tune.setLevel(level)
