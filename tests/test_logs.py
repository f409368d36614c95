"""A log on a full disk: the run goes on, and each change is one line."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from eqm_dist.logs import setup_logging
from eqm_dist.track.jsonl import JsonlTracker, read_metrics
from tests.disk import no_file_larger_than


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    package = logging.getLogger("eqm_dist")
    before = package.handlers, package.level, package.propagate
    yield
    package.handlers, package.level, package.propagate = before


def test_a_full_disk_is_told_once_and_the_log_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, logger = tmp_path / "rank-0000.log", logging.getLogger("eqm_dist.test")
    setup_logging(file, console=False)
    logger.info("first")
    with no_file_larger_than(file.stat().st_size + 5):  # half a line goes in
        for number in range(3):
            logger.info("lost %d", number)
    logger.info("last")
    setup_logging(None, console=False)
    whole = [line[9:] for line in file.read_text().splitlines() if line[9:]]
    assert whole == ["first", "warning: 3 lines are missing here, for which there was no room", "last"]
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: Cannot append to {file}: File too large; its lines are left out until there is room."]


def test_metrics_on_a_full_disk_are_told_of_twice_and_lost_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(file, 0)
    tracker.log(1, {"train/loss": 1.5})
    with no_file_larger_than(file.stat().st_size + 5):
        for step in (2, 3, 4):
            tracker.log(step, {"train/loss": 1.5})
    for step in (5, 6):
        tracker.log(step, {"train/loss": 1.5})
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3, 4, 5, 6]
    first, second = caplog.messages
    assert "Metrics from step 2 on are kept and written later." in first
    assert second == f"{file} is written again, and has what it missed"
