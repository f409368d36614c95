"""What interruptions cost, counted to the step and the second."""

import json
from pathlib import Path

import pytest

from eqm_dist.track.attempts import Attempts, Moment
from eqm_dist.track.jsonl import read_metrics
from tests import tiny


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, boot: str = "first") -> None:
        self.now, self.boot, self.set_by = 1000.0, boot, 0.0

    def __call__(self) -> Moment:
        return Moment(self.now + self.set_by, self.boot, self.now)


def record(*intervals: tuple[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "time/step_s": step_s} for step, step_s in intervals]


def test_two_attempts_by_hand(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "attempts.jsonl"
    first = Attempts(file, [], 0, 2, clock)
    clock.now += 10
    assert first.counters(5, 1.0) == {"run/restarts": 0, "run/lost_steps": 0, "run/goodput": 5 / 10}
    clock.now += 10
    assert first.counters(9, 2.0)["run/goodput"] == (5 + 8) / 20
    # Killed after step 9, begun again at step 5 a minute later: 4 steps and their 8 seconds are lost.
    clock.now += 60
    second = Attempts(file, record((5, 1.0), (9, 2.0)), 5, 1, clock)
    clock.now += 20
    counters = second.counters(9, 2.0)
    assert counters == {"run/restarts": 1, "run/lost_steps": 4, "run/goodput": (5 + 8) / 100}
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"time": 1000.0, "boot": "first", "up_s": 1000.0, "step": 0, "reached": 0, "workers": 2},
        {"time": 1080.0, "boot": "first", "up_s": 1080.0, "step": 5, "reached": 9, "workers": 1},
    ]


@pytest.mark.parametrize("set_by", [-5000.0, -20.0, 1e9])
def test_a_clock_that_is_set_shifts_no_second(set_by: float, tmp_path: Path) -> None:
    """Within an attempt, and from one to the next on a machine that has not been started anew."""
    clock, file = Clock(), tmp_path / "attempts.jsonl"
    first = Attempts(file, [], 0, 2, clock)
    clock.now += 10
    clock.set_by = set_by
    assert first.counters(5, 1.0)["run/goodput"] == 5 / 10
    clock.now += 10
    clock.set_by = 0.0
    second = Attempts(file, record((5, 1.0)), 5, 2, clock)
    clock.set_by = -set_by
    clock.now += 20
    assert second.counters(15, 1.0)["run/goodput"] == (5 + 10) / 40


def test_clocks_of_two_machines_that_differ_give_no_more_than_all_the_time(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "attempts.jsonl"
    Attempts(file, [], 0, 2, clock)
    elsewhere = Clock("second")
    elsewhere.set_by = -300.0
    second = Attempts(file, record((5, 2.0)), 5, 2, elsewhere)
    elsewhere.now += 10
    assert second.counters(10, 1.0)["run/goodput"] == 1.0  # 15 s of steps, and the clocks say 10
    elsewhere.now += 20
    assert second.counters(13, 1.0)["run/goodput"] == 18 / 30


def test_attempts_of_an_earlier_release_are_counted_by_the_clock(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "attempts.jsonl"
    file.write_text('{"time": 960.0, "step": 0, "reached": 0, "workers": 2}\n')
    assert Attempts(file, record((5, 2.0)), 5, 2, clock).counters(10, 2.0)["run/goodput"] == 20 / 40


def test_this_moment_follows_what_no_clock_shifts() -> None:
    before, now = Moment.now(), Moment.now()
    assert before.boot == now.boot
    assert 0 <= before.until(now) == now.up_s - before.up_s


def test_going_back_is_no_restart_and_costs_steps(tmp_path: Path) -> None:
    clock = Clock()
    attempts = Attempts(tmp_path / "attempts.jsonl", [], 0, 2, clock)
    for step in (4, 8, 12):
        attempts.counters(step, 1.0)
    attempts.go_back(4)
    clock.now += 40
    assert attempts.counters(8, 0.5) == {"run/restarts": 0, "run/lost_steps": 8, "run/goodput": (4 + 2) / 40}
    again = Attempts(tmp_path / "attempts.jsonl", record((4, 1.0), (8, 0.5)), 8, 2, clock)
    assert again.counters(10, 1.0) == {"run/restarts": 1, "run/lost_steps": 8, "run/goodput": (4 + 2 + 2) / 40}


def test_the_steps_of_the_run_that_it_was_forked_from_are_not_its_own(tmp_path: Path) -> None:
    clock = Clock()
    attempts = Attempts(tmp_path / "attempts.jsonl", record((50, 1.0), (100, 1.0)), 100, 1, clock)
    clock.now += 10
    assert attempts.counters(105, 1.0) == {"run/restarts": 0, "run/lost_steps": 0, "run/goodput": 5 / 10}


def test_a_line_that_a_kill_cut_short_is_no_attempt(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "attempts.jsonl"
    Attempts(file, [], 0, 1, clock)
    whole = file.read_text()
    for cut in range(1, len(whole)):
        file.write_text(whole + whole[:cut])
        attempts = Attempts(file, [], 0, 1, clock)
        assert attempts.counters(1, 1.0)["run/restarts"] == 1
        assert len(list(read_metrics(file))) == 2


def test_a_run_that_was_killed_says_what_that_cost(shards: Path, tmp_path: Path) -> None:
    flags = tiny.flags(tiny.overrides(tmp_path / "runs", shards))
    assert tiny.train(*flags).code == 0
    run = tmp_path / "runs" / "tiny"
    for step in (4, 6):  # as if it had been killed after step 6, the save of step 4 not yet whole
        (run / "checkpoints" / f"step_{step:08d}" / "COMPLETE.json").unlink()
    (run / "result.json").unlink()
    outcome = tiny.train(*flags)
    assert outcome.code == 0
    assert "restarts: 1, steps done again: 4" in outcome.out
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "time/step_s" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [(line["run/restarts"], line["run/lost_steps"]) for line in lines] == [(0, 0)] * 2 + [(1, 4)] * 4
    assert all(0 < line["run/goodput"] < 1 for line in lines)
    goodput = json.loads((run / "result.json").read_text())["metrics"]["run/goodput"]
    # By the other route: the seconds of the steps that count, over the time since the first attempt began.
    began = [json.loads(line)["time"] for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert goodput < sum(line["time/step_s"] for line in lines) / (began[1] - began[0])
    assert goodput == pytest.approx(lines[-1]["run/goodput"])
