"""Which failures a run bears, what it says of them, and what its workers get."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from eqm_dist.errors import DataError, LaunchError
from eqm_dist.train.checkpoint import MARKER, Checkpoints

pytestmark = pytest.mark.ray


def checkpoints_at(directory: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(directory / "checkpoints", keep=9)
    for step in steps:
        checkpoints.path(step).mkdir(parents=True)
        (checkpoints.path(step) / MARKER).touch()
    return checkpoints


def test_failures_count_only_in_a_row_without_a_newer_checkpoint(tmp_path: Path) -> None:
    from eqm_dist.launch.recovery import Setbacks

    setbacks = Setbacks(tmp_path, limit=2)
    assert setbacks.another("it broke") == "warning: it broke; failure 1 of 2 in a row, restarting from step 0"
    assert "failure 2 of 2 in a row" in setbacks.another("it broke")
    for step in range(1, 100):  # a hundred failures that cost no more than the way from one checkpoint to the next
        checkpoints_at(tmp_path, step)
        assert setbacks.another("lost") == f"warning: lost; failure 1 of 2 in a row, restarting from step {step}"
    setbacks.another("lost")
    with pytest.raises(LaunchError, match=r"failed 3 times in a row .* step 99, and launch.max_failures=2; .*: lost"):
        setbacks.another("lost")


def test_no_limit_and_no_patience(tmp_path: Path) -> None:
    from eqm_dist.launch.recovery import Setbacks

    checkpoints_at(tmp_path, 7)
    unlimited = Setbacks(tmp_path, limit=-1)
    sentences = [unlimited.another("lost") for _ in range(100)]
    assert sentences[-1] == "warning: lost; failure 100 in a row, restarting from step 7"
    with pytest.raises(LaunchError, match="failed 1 times in a row"):
        Setbacks(tmp_path, limit=0).another("lost")


def test_elastic_workers_get_the_smallest_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from eqm_dist.launch.ray_cluster import Offer, offer

    nodes = [{"CPU": 32.0, "GPU": 4.0}, {"CPU": 12.0, "GPU": 2.0}, {"CPU": 64.0}, {"CPU": 2.0, "GPU": 8.0}]
    alive = [{"Alive": at < 3, "Resources": node} for at, node in enumerate(nodes)]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 108.0, "GPU": 6.0})
    offered = offer((2, 12), "auto")
    assert offered == Offer((2, 12), 6, use_gpu=True)
    assert list(offered.sizes) == list(range(2, 13))
    assert list(offer(6, "auto").sizes) == [6]


# --- what the log says ---


@pytest.fixture
def recovery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """In a controller that has two workers on two nodes, and a clock that the test sets."""
    import ray

    from eqm_dist.launch.ray_cluster import Offer
    from eqm_dist.launch.recovery import Recovery, Setbacks

    made = Recovery(tmp_path / "log", Setbacks(tmp_path, limit=3), Offer((2, 4), 1, use_gpu=False))
    places = [SimpleNamespace(node_id=name, hostname=name, node_ip=f"10.0.0.{at}") for at, name in enumerate("ab")]
    workers = [SimpleNamespace(metadata=place) for place in places]
    made.after_worker_group_start(cast("Any", SimpleNamespace(get_workers=lambda: workers)))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": True} for name in "ab"])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    before = (package := logging.getLogger("eqm_dist")).handlers, package.propagate
    yield made
    for handler in package.handlers:
        handler.close()
    package.handlers, package.propagate = before


def status(*errors: Exception | None) -> Any:
    """As Ray polls it, one error or none for each rank."""
    from ray.train.v2._internal.execution.worker_group import WorkerGroupPollStatus
    from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus

    return WorkerGroupPollStatus(
        {at: WorkerStatus(running=error is None, error=error) for at, error in enumerate(errors)}
    )


def dead(kind: str) -> Exception:
    from ray.exceptions import ActorDiedError, ActorUnavailableError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    cause = ActorDiedError() if kind == "died" else ActorUnavailableError("It is away.", b"0" * 16)
    return WorkerHealthCheckFailedError("A worker health check failed.", cause)


def said(tmp_path: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in (tmp_path / "log").read_text().splitlines()]


def test_the_dead_are_named_and_not_those_who_miss_them(recovery: Any, tmp_path: Path) -> None:
    recovery.after_worker_group_poll_status(status(None, None))
    assert not (tmp_path / "log").exists()
    for _ in range(3):  # Ray asks again until it has shut the workers down
        recovery.after_worker_group_poll_status(
            status(RuntimeError("Connection reset by peer\nsomewhere"), dead("died"))
        )
    assert said(tmp_path) == [
        "warning: worker 1 on b (10.0.0.1) was killed or crashed; failure 1 of 3 in a row, restarting from step 0"
    ]


@pytest.mark.parametrize(
    ("error", "alive", "what"),
    [
        (RuntimeError("CUDA error\nand more"), "ab", "worker 1 on b (10.0.0.1) failed (RuntimeError: CUDA error)"),
        (ValueError(), "ab", "worker 1 on b (10.0.0.1) failed (ValueError)"),
        ("away", "ab", "worker 1 on b (10.0.0.1) does not answer (killed, or its node lost)"),
        ("away", "a", "worker 1 on b (10.0.0.1) was lost with its node"),
    ],
)
def test_what_failed(
    recovery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, alive: str, what: str
) -> None:
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "Alive": name in alive} for name in "ab"])
    recovery.after_worker_group_poll_status(status(None, dead(error) if isinstance(error, str) else error))
    assert said(tmp_path) == [f"warning: {what}; failure 1 of 3 in a row, restarting from step 0"]


def test_what_trying_again_cannot_help_ends_the_run(recovery: Any) -> None:
    with pytest.raises(DataError, match="damaged"):
        recovery.after_worker_group_poll_status(status(RuntimeError("Connection reset"), DataError("It is damaged.")))


def test_the_run_says_what_it_waits_for_and_not_too_often(
    recovery: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import TrainingFailedError
    from ray.train.v2._internal.execution.controller.state import RestartingState, RunningState

    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    running, restarting = RunningState(), RestartingState(TrainingFailedError("lost"))
    recovery.after_controller_state_update(running, restarting)
    for now in range(0, 700, 2):  # noqa: B007 (the clock)
        recovery.after_controller_state_update(restarting, restarting)
    sentence = "waiting for room for at least 2 workers with 1 CPUs each: the cluster has 1 CPUs and 0 GPUs"
    assert said(tmp_path) == [sentence] * 3  # after half a minute, and every five
    recovery.after_controller_state_update(restarting, running)
    recovery.after_controller_state_update(running, restarting)
    now += 29
    recovery.after_controller_state_update(restarting, restarting)
    assert len(said(tmp_path)) == 3
