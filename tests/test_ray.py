"""Ray adds placement and recovery and changes no number: real clusters, real kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eqm_dist.cli import config_from, parser
from eqm_dist.open_run import open_run
from eqm_dist.track.jsonl import read_metrics
from tests.distributed import run_ranks
from tests.processes import wait_for
from tests.test_engines import run_engines

pytestmark = [pytest.mark.ray, pytest.mark.deepspeed, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[1]
STEPS = 160
FLAGS = {
    "train.steps": STEPS,
    "train.global_batch": 16,
    "train.log_every": 1,
    "model.hidden_size": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "checkpoint.every": 20,
    "evaluation.every": 0,
    "launch.workers": 2,
    "launch.cpus_per_worker": 1,
}


def command(root: Path, **extra: object) -> list[str]:
    flags = {"run.root": root, **FLAGS, **extra}
    return ["pipelines/train.py", *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]


def losses(root: Path, run: str = "digits") -> dict[int, float]:
    lines = list(read_metrics(root / run / "metrics.jsonl"))
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))  # no step twice, none out of order
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def mlflow_run_id(root: Path) -> str:
    return json.loads((root / "digits" / "mlflow.json").read_text())["run_id"]


def kill(process: psutil.Process) -> None:
    process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The same run on two bare gloo ranks: no Ray, no restart."""
    root = tmp_path_factory.mktemp("uninterrupted")
    opened = open_run(config_from(parser("").parse_args(command(root, **{"track.mlflow": "false"})[1:])))
    run_ranks(2, run_engines, [opened], None)
    return losses(root)


@pytest.fixture
def local_cluster_env() -> dict[str, str]:
    """Environment in which the command starts a cluster of its own, whatever else runs on this machine."""
    return {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_worker_then_killed_driver_then_the_same_command_again(
    tmp_path: Path, uninterrupted: dict[int, float], local_cluster_env: dict[str, str]
) -> None:
    arguments = [sys.executable, *command(tmp_path)]
    options = {"cwd": REPOSITORY, "env": local_cluster_env, "stdout": subprocess.PIPE, "text": True}

    first = subprocess.Popen(arguments, **options, stderr=subprocess.STDOUT)
    wait_for(lambda: len(losses_so_far(tmp_path)) >= 30, first)
    run_id = mlflow_run_id(tmp_path)
    everything = psutil.Process(first.pid).children(recursive=True)
    workers = [process for process in everything if "RayTrainWorker" in process.name() or _is_worker(process)]
    assert len(workers) == 2
    kill(workers[0])
    # It comes back by itself, from step 20, and goes beyond where it was.
    wait_for(lambda: _restarts(tmp_path) == 1 and len(losses_so_far(tmp_path)) >= 70, first)
    everything = psutil.Process(first.pid).children(recursive=True)
    kill(psutil.Process(first.pid))
    first.communicate()
    for left in psutil.wait_procs(everything, timeout=10)[1]:  # a driver takes its cluster with it, but for two agents
        left.kill()
    assert not (tmp_path / "digits" / "result.json").exists()

    second = subprocess.run(arguments, **options, stderr=subprocess.STDOUT, timeout=400)
    assert second.returncode == 0, second.stdout
    assert "resumes at step" in second.stdout
    # Bit for bit: same topology, same order of sums, and a checkpoint loses nothing.
    assert losses(tmp_path) == uninterrupted
    assert mlflow_run_id(tmp_path) == run_id
    _assert_recorded_once(tmp_path, run_id)

    third = subprocess.run(arguments, **options, stderr=subprocess.STDOUT, timeout=100)
    assert third.returncode == 0
    assert "is complete" in third.stdout  # nothing left to do: it says so at once


def losses_so_far(root: Path) -> list[int]:
    return [line["step"] for line in read_metrics(root / "digits" / "metrics.jsonl")]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "ray::RayTrainWorker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _restarts(root: Path) -> int:
    return (root / "digits" / "logs" / "rank-0000.log").read_text().count("resumes at step")


def _assert_recorded_once(root: Path, run_id: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    assert client.get_run(run_id).info.status == "FINISHED"
    points = [point.step for point in client.get_metric_history(run_id, "train/loss")]
    assert sorted(points) == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A head as an operator starts it, token authentication on; yields the environment of a submitter."""
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard = 26379, 28265
    bin_directory = str(Path(sys.executable).parent)
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "HOME": str(home),
        "PATH": f"{bin_directory}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "OMP_NUM_THREADS": "1",
    }
    start = [f"{bin_directory}/ray", "start", "--head", "--block", "--num-cpus", "2", "--port", str(port),
             "--dashboard-port", str(dashboard), "--temp-dir", str(home / "ray"), "--disable-usage-stats"]  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(start, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    env["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    listing = [f"{bin_directory}/ray", "job", "list"]
    end = time.monotonic() + 120
    while subprocess.run(listing, env=env, capture_output=True, check=False).returncode:
        assert process.poll() is None, (home / "head.log").read_text()
        assert time.monotonic() < end, (home / "head.log").read_text()
        time.sleep(1)
    yield env
    everything = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(timeout=60)
    for left in psutil.wait_procs(everything, timeout=20)[1]:
        left.kill()


@pytest.mark.slow
def test_a_submitted_job_that_was_stopped_goes_on_when_submitted_again(
    head: dict[str, str], uninterrupted: dict[int, float]
) -> None:
    # No --run.root: inside a job it is a lasting directory, not the job's own throw-away copy.
    root = Path(head["HOME"]) / "eqm-dist-runs"
    script = command(root)[:1] + command(root)[3:]
    ray = str(Path(sys.executable).parent / "ray")
    submit = [ray, "job", "submit", "--working-dir", ".", "--submission-id"]
    options = {"cwd": REPOSITORY, "env": head, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    first = subprocess.Popen([*submit, "first", "--", "python", *script], **options)
    wait_for(lambda: len(losses_so_far(root)) >= 50, first)
    subprocess.run([ray, "job", "stop", "first"], **options, check=True, timeout=120)
    output = first.communicate(timeout=120)[0]
    assert "step  30 of 160" in output  # the workers' lines surface in the job's log
    run_id = mlflow_run_id(root)

    second = subprocess.run([*submit, "second", "--", "python", *script], **options, timeout=400)
    assert second.returncode == 0, second.stdout
    assert "resumes at step" in second.stdout
    assert "run digits is complete" in second.stdout
    assert losses(root) == uninterrupted
    assert mlflow_run_id(root) == run_id


@pytest.mark.slow
def test_a_job_with_a_wrong_key_fails_and_says_why(head: dict[str, str]) -> None:
    ray = str(Path(sys.executable).parent / "ray")
    arguments = [ray, "job", "submit", "--working-dir", ".", "--", "python", "pipelines/train.py", "--train.step", "5"]
    failed = subprocess.run(
        arguments, cwd=REPOSITORY, env=head, capture_output=True, text=True, timeout=200, check=False
    )
    assert failed.returncode != 0
    assert "train.step" in failed.stdout + failed.stderr


def test_a_worker_with_bad_data_ends_the_run_at_once_with_its_own_sentence(
    tmp_path: Path, local_cluster_env: dict[str, str]
) -> None:
    # The driver checks presence and sizes; a changed byte shows only when a worker reads the shard.
    opened = open_run(config_from(parser("").parse_args(command(tmp_path, **{"track.mlflow": "false"})[1:])))
    assert opened.config.data.shards is not None
    shard = sorted(Path(opened.config.data.shards).glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    arguments = [sys.executable, *command(tmp_path, **{"track.mlflow": "false", "data.window_shards": 1})]
    failed = subprocess.run(
        [*arguments, "--run.name", "edited"],
        cwd=REPOSITORY, env=local_cluster_env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert failed.stderr.count("\n") == 1
    assert shard.name in failed.stderr
    assert "sha256" in failed.stderr
    assert "restarting" not in failed.stdout  # trying again would not help


def test_more_workers_than_the_batch_are_refused(tmp_path: Path, local_cluster_env: dict[str, str]) -> None:
    arguments = [sys.executable, *command(tmp_path, **{"train.global_batch": 1, "track.mlflow": "false"})]
    failed = subprocess.run(
        arguments, cwd=REPOSITORY, env=local_cluster_env, capture_output=True, text=True, timeout=200, check=False
    )
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "train.global_batch=1 must be at least the number of workers, 2" in failed.stderr
