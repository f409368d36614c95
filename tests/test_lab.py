"""The lab: what it refuses, how it counts, and two of its scenarios for real where namespaces are permitted."""

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.lab import __main__ as command
from cluster.lab import chaos, faults, lab, layout, network
from cluster.lab.scenarios import SCENARIOS
from cluster.lab.table import HEADER, render
from cluster.lab.watched_run import Seen
from eqm_dist.errors import UserError

ROOT = Path(__file__).parents[1]
needs_lab = pytest.mark.skipif(
    sys.platform != "linux" or lab.unavailable() is not None, reason=lab.unavailable() or "the lab is available"
)


# --- what it refuses, in a sentence ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "VERB"),
        (["kill-rank"], "rank"),
        (["kill-rank", "first"], "first"),
        (["cut", "head"], "head"),  # the head holds the cluster together: another failure, another day
        (["up", "--hosts", "1"], "from 2 to 4, the head among them, got 1"),
        (["up", "--hosts", "9"], "from 2 to 4, the head among them, got 9"),
        (["explode"], "explode"),
    ],
)
def test_a_wrong_command_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        command.main(arguments)


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(UserError, match=r"earthquake is not a scenario; choose from kill_rank, "):
        chaos.main(["earthquake"])


def test_every_verb_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"\n    {verb}" in shown for verb in command.VERBS)


# --- whose its files are ---


@needs_lab
def test_its_files_are_for_nobody_else_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lab"
    for name in ("SHARED", "DISK", "LOGS", "TOKEN", "HOSTS_FILE"):
        monkeypatch.setattr(layout, name, root / name.lower())
    monkeypatch.setattr(layout, "ROOT", root)
    try:
        lab._make_places()
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert stat.S_IMODE(layout.TOKEN.stat().st_mode) == 0o600
    finally:
        subprocess.run(["umount", layout.SHARED], check=True)


# --- how it counts ---


def seen(*looks: tuple[float, int, int]) -> list[Seen]:
    return [Seen(*look) for look in looks]


def test_a_restart_is_timed_from_the_fault_to_the_first_step_after_it() -> None:
    # A step per second; the fault at 13.5 s is followed by step 14 that was under way; back at step 10 at 40 s.
    steady = [(float(step), 1, step) for step in range(1, 15)]
    later = [(40.0, 2, 10), *((41.0 + step, 2, 11 + step) for step in range(10))]
    assert chaos.times(seen(*steady, *later), submitted=0.0, faults_at=[13.5]) == {
        "seconds_to_next_step": [27.5],
        "longest_pause_s": 26.0,
        "restarts": 1,
        "steps_lost": 4,  # 11 to 14 are done again
        "wall_s": 50.0,
        "goodput": 0.4,  # 20 steps of a second in 50 s
    }


def test_without_a_restart_the_longest_pause_after_the_fault_counts() -> None:
    looks = seen((1, 1, 1), (2, 1, 2), (8, 1, 3), (9, 1, 4), (13, 1, 5), (14, 1, 6))  # 6 s before the fault, 4 s after
    found = chaos.times(looks, submitted=0.0, faults_at=[8.5])
    assert (found["longest_pause_s"], found["restarts"], found["steps_lost"]) == (4.0, 0, 0)


def test_every_fault_has_its_own_time_and_all_restarts_add_up() -> None:
    looks = seen((1, 1, 1), (2, 1, 2), (9, 2, 1), (10, 2, 2), (11, 2, 3), (20, 3, 2), (21, 3, 3))
    found = chaos.times(looks, submitted=0.0, faults_at=[2.5, 12.0])
    assert (found["seconds_to_next_step"], found["restarts"], found["steps_lost"]) == ([7.5, 9.0], 2, 2)


def test_losses_are_compared_over_all_steps() -> None:
    reference = dict.fromkeys(range(1, 301), 2.0)
    assert chaos.loss_differences(reference, reference, 300) == {"losses soon after": 0, "losses": 0}
    assert chaos.loss_differences(dict(list(reference.items())[:200]), reference, 200)["losses"] == 0  # a shorter run
    changed = {**reference, 120: 2.5, 219: 3.0, 220: 4.0}  # 100 steps from 120 to 219
    assert chaos.loss_differences(changed, reference, 300) == {"losses soon after": 0.5, "losses": 1.0}
    missing = {step: loss for step, loss in reference.items() if step != 7}
    disordered = {2: 2.0, 1: 2.0}
    assert chaos.loss_differences(missing, reference, 300)["losses"] is None
    assert chaos.loss_differences(disordered, reference, 2)["losses"] is None


# --- the table ---


def test_the_table_in_the_documentation_is_that_of_the_results() -> None:
    results = json.loads(chaos.RESULTS.read_bytes())
    assert render(results) in (ROOT / "docs" / "chaos.md").read_text()
    assert list(results["scenarios"]) == list(SCENARIOS)
    assert not any(outcome["problems"] for outcome in results["scenarios"].values())


def test_a_failed_scenario_shows_in_the_table() -> None:
    results = json.loads(chaos.RESULTS.read_bytes())
    outcome = {**results["scenarios"]["kill_rank"], "problems": ["exit code 1"]}
    row = render({**results, "scenarios": {"kill_rank": outcome}}).splitlines()[2]
    assert "**failed: exit code 1**" in row
    assert row.count(" | ") == len(HEADER) - 1


# --- for real ---


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    if network.connected():
        pytest.skip("a lab is up already; `python -m cluster.lab down` removes it")
    lab.up(3)
    yield
    lab.down()
    assert not network.connected()
    assert not layout.ROOT.exists()


@needs_lab
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("two_workers")
def test_hosts_are_apart_and_come_back() -> None:
    with pytest.raises(UserError, match="up already, with head, worker-1, worker-2"):
        lab.up(3)
    first, second = layout.worker(1), layout.worker(2)
    faults.fill_disk(second)
    free = {host: shutil.disk_usage(lab.disk(host)).free for host in (first, second)}
    assert free[second] == 0 < free[first]
    faults.free_disk(second)

    before = set(lab.pids(first))
    faults.kill_raylet(first)  # it may be back before Ray's list shows that it was gone
    lab.wait_until(lambda: len(before & set(lab.pids(first))) <= 2, "all that Ray ran there to end")
    lab.wait_until(lambda: first in lab.ray_hosts() and len(lab.pids(first)) >= len(before), "another raylet")

    faults.cut(second)
    lab.wait_until(lambda: second not in lab.ray_hosts(), "Ray to miss the host")
    faults.restore(second)
    lab.wait_until(lambda: second in lab.ray_hosts(), "the host to come back")


@needs_lab
@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("two_workers")
def test_a_killed_worker_and_a_host_that_is_switched_off_change_no_loss(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    chaos.run_scenarios(["kill_rank", "kill_host"], out)  # raises where losses or the record are not as they must be
    outcomes = json.loads(out.read_bytes())["scenarios"]
    assert all(outcome["restarts"] >= 1 and outcome["steps_lost"] > 0 for outcome in outcomes.values())
