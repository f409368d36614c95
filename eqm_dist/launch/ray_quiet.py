"""Ray prints pages about every process that dies, for those who develop it. Whoever starts trials says it in a
sentence, and Ray's log files keep the rest.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import worker


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what Ray and Tune print of trials and processes that die. Around a cluster."""
    tune = logging.getLogger("ray.tune")
    before, level = worker.print_to_stdstream, tune.level
    worker.print_to_stdstream = _nothing  # the raylet's messages, which no log level reaches
    tune.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        worker.print_to_stdstream = before
        tune.setLevel(level)


def _nothing(*_: Any, **__: Any) -> None: ...
