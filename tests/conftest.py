"""What all tests share: few threads, no calls home, reproducible properties, and no GPU test without a GPU."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch, Ray or MLflow; child processes inherit it. Test processes share the cores, and torch
# would start a thread per core in each of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
from hypothesis import settings

# A shared machine makes any example slow at times, which says nothing about the code. In CI the examples are a function
# of the test alone, so that a commit either passes or does not.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


STARTED = time.monotonic()
PROCESSES = ("multiprocess", "ray", "deepspeed")


@pytest.fixture(scope="session", autouse=True)
def _files_that_reach_the_disk_later() -> Iterator[None]:
    """Nothing waits for the disk in a test's own process, which is what most tests that save would do most of the time.

    What a killed process wrote the kernel keeps; only a loss of power would show the difference. A descriptor that is
    none is still an error, and processes that a test starts sync as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


# What these two need is imported where it is asked for: without torch and moto a test of no more than text starts at
# once.


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blots of ``tests.tiny``, to read only: whoever does damage to them copies them first."""
    from tests import tiny

    return tiny.write_blots(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An S3 server of the file's own, so that the names of its objects are no other file's."""
    from tests.s3 import s3_server

    with s3_server() as address:
        yield address


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--begin-within", type=float, metavar="S", help="skip the tests that have not begun after so long")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what has no time left."""
    limit = item.config.getoption("--begin-within")
    if limit is not None and time.monotonic() - STARTED > limit:
        pytest.skip(f"no time left: it would have begun more than {limit:.0f} s after the first")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start processes; skip the tests marked gpu where torch sees none."""
    # They take longest, and two workers end together only if what comes last is short.
    starts_processes = {item.path for item in items for name in PROCESSES if item.get_closest_marker(name)}
    items.sort(key=lambda item: item.path not in starts_processes)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
