"""Workers that fail, leave and join: the run goes on with those that there are, and its numbers stay what they were."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from eqm_dist.errors import LaunchError
from eqm_dist.train.checkpoint import MARKER, Checkpoints
from tests.test_ray import (
    FLAGS,
    REPOSITORY,
    _is_worker,
    command,
    local_cluster_env,
    losses,
    losses_so_far,
    mlflow_run_id,
    uninterrupted,
    wait_for,
)

__all__ = ["local_cluster_env", "uninterrupted"]  # fixtures

STEPS = 400
ELASTIC = {"train.steps": STEPS, "launch.workers": "[1,3]", "launch.resize_check_s": 5, "engine.zero_stage": 2}


# --- failures in a row ---


def checkpoints_at(directory: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(directory / "checkpoints", keep=9)
    for step in steps:
        checkpoints.path(step).mkdir(parents=True)
        (checkpoints.path(step) / MARKER).touch()
    return checkpoints


@pytest.mark.ray
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


@pytest.mark.ray
def test_no_limit_and_no_patience(tmp_path: Path) -> None:
    from eqm_dist.launch.recovery import Setbacks

    unlimited = Setbacks(checkpoints_at(tmp_path, 7), limit=-1)
    sentences = [unlimited.another("lost") for _ in range(100)]
    assert sentences[-1] == "warning: lost; failure 100 in a row, restarting from step 7"
    with pytest.raises(LaunchError, match="failed 1 times in a row"):
        Setbacks(checkpoints_at(tmp_path), limit=0).another("lost")


@pytest.mark.ray
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


# --- a cluster that changes ---


class Nodes:
    """A head without workers, and nodes of one CPU that come and go."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})

    def join(self) -> Any:
        return self.cluster.add_node(num_cpus=1)

    def lose(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "RAY_ADDRESS": str(self.cluster.address), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.cluster.shutdown()


def start(nodes: Nodes, root: Path, **extra: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command(root, **extra)],
        cwd=REPOSITORY, env=nodes.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def log_of(root: Path) -> str:
    file = root / "digits" / "logs" / "rank-0000.log"
    return file.read_text() if file.exists() else ""


def attempts(root: Path) -> list[int]:
    """The number of workers of each attempt."""
    return [int(workers) for workers in re.findall(r"steps in all, on (\d+) worker", log_of(root))]


def reached(root: Path, step: int) -> Callable[[], bool]:
    return lambda: losses_so_far(root)[-1:] >= [step]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.timeout(900)
def test_a_run_shrinks_and_grows_with_its_cluster(tmp_path: Path, nodes: Nodes) -> None:
    kept, lost = nodes.join(), nodes.join()
    process = start(nodes, tmp_path, **ELASTIC)
    wait_for(reached(tmp_path, 50), process)
    run_id = mlflow_run_id(tmp_path)
    nodes.lose(lost)
    began, step = time.monotonic(), losses_so_far(tmp_path)[-1]
    wait_for(lambda: len(attempts(tmp_path)) == 2 and reached(tmp_path, step + 1)(), process)
    print(f"{time.monotonic() - began:.0f} s from the loss of a node to the next step")
    assert attempts(tmp_path) == [2, 1]
    assert nodes.join() != kept
    nodes.join()
    wait_for(lambda: attempts(tmp_path)[-1] > 1, process)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert re.search(r"warning: worker \d on .*; failure 1 of 3 in a row, restarting from step \d+", output)

    reference = tmp_path / "reference"
    flags = {**ELASTIC, "launch.launcher": "local", "track.mlflow": "false"}
    for key in (*FLAGS, *ELASTIC):
        if key.startswith(("launch.workers", "launch.cpus", "launch.resize", "engine.")):
            flags[key] = "null"
    subprocess.run([sys.executable, *command(reference, **flags)], cwd=REPOSITORY, check=True, timeout=300)
    expected, found = losses(reference), losses(tmp_path)
    assert list(found) == list(range(1, STEPS + 1))  # no step twice, none missing
    # Sums over the batch are taken in another order on one, two and three workers: fp32 rounding, grown over the steps.
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=2e-3)
    assert mlflow_run_id(tmp_path) == run_id
    from mlflow import MlflowClient

    points = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.deepspeed
@pytest.mark.timeout(900)
def test_a_worker_that_is_stopped_is_found_and_the_run_goes_on(
    tmp_path: Path, uninterrupted: dict[int, float], local_cluster_env: dict[str, str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path, **{"launch.hang_deadline_s": 20, "track.mlflow": "false"})],
        cwd=REPOSITORY, env=local_cluster_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(reached(tmp_path, 30), process)
    worker = next(child for child in psutil.Process(process.pid).children(recursive=True) if _is_worker(child))
    worker.suspend()
    began, step = time.monotonic(), losses_so_far(tmp_path)[-1]
    wait_for(lambda: len(attempts(tmp_path)) == 2 and reached(tmp_path, step + 1)(), process)
    print(f"{time.monotonic() - began:.0f} s from the stop of a rank, with a deadline of 20 s, to the next step")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    found = rf"warning: rank \d on .* \(process {worker.pid}\) has made no step for \d+ s, .*was stopped by a signal"
    assert len(re.findall(found, output)) == 1
    assert losses(tmp_path) == uninterrupted  # bit for bit: the same workers, the same order of sums
