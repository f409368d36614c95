"""A lock is held by one process at a time, and goes with it."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eqm_dist.errors import BusyError, StorageError
from eqm_dist.storage.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from eqm_dist.storage.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock until it is told to end, or killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            process.kill()


def test_who_waits_long_enough_has_it(tmp_path: Path) -> None:
    file, said = tmp_path / "lock", list[str]()
    with another_process(file) as process:
        sentence = rf"^{re.escape(str(file))} must be free within 0\.2 s, but another process holds it; wait until"
        began = time.monotonic()
        with pytest.raises(BusyError, match=sentence), locked(file, wait_s=0.2):
            pass
        assert time.monotonic() - began >= 0.2

        def told() -> None:
            said.append("told")
            process.kill()

        with locked(file, waiting=told):
            assert process.wait() != 0
    assert said == ["told"]
    with locked(file, waiting=lambda: said.append("again")):
        assert said == ["told"]


def test_where_nothing_can_be_locked_is_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"^Cannot lock .*none/lock: No such file"),
        locked(tmp_path / "none" / "lock"),
    ):
        pass
