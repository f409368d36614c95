"""Which failures a run bears, what it says of them, and what its workers get."""

from pathlib import Path

import pytest

from eqm_dist.errors import LaunchError
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

    setbacks = Setbacks(checkpoints_at(tmp_path), limit=2)
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

    unlimited = Setbacks(checkpoints_at(tmp_path, 7), limit=-1)
    sentences = [unlimited.another("lost") for _ in range(100)]
    assert sentences[-1] == "warning: lost; failure 100 in a row, restarting from step 7"
    with pytest.raises(LaunchError, match="failed 1 times in a row"):
        Setbacks(checkpoints_at(tmp_path), limit=0).another("lost")


def test_elastic_workers_get_the_smallest_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from eqm_dist.launch.ray_cluster import Offer, offer

    nodes = [{"CPU": 32.0, "GPU": 4.0}, {"CPU": 12.0, "GPU": 2.0}, {"CPU": 64.0}, {"CPU": 2.0, "GPU": 8.0}]
    alive = [{"Alive": at < 3, "Resources": node} for at, node in enumerate(nodes)]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 108.0, "GPU": 6.0})
    offered = offer((2, 12), None)
    assert offered == Offer((2, 12), 6, use_gpu=True)
    assert list(offered.sizes) == list(range(2, 13))
    assert list(offer(6, None).sizes) == [6]
