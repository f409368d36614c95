"""Asynchronous evaluation: the same figures as in the workers, and nothing that happens to it harms the training."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from eqm_dist.errors import ConfigError, LaunchError
from eqm_dist.launch.asynchronous_evaluation import let_training_go_first
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.evaluations import Evaluations
from tests.distributed import run_ranks
from tests.processes import wait_for
from tests.test_ray import REPOSITORY, local_cluster_env

__all__ = ["local_cluster_env"]


def policy_of(rank: int, device: torch.device) -> int:
    let_training_go_first(device)
    return os.sched_getscheduler(0)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of Linux")
def test_an_evaluation_apart_gives_way_on_a_cpu_and_not_on_a_gpu() -> None:
    assert run_ranks(1, policy_of, torch.device("cpu")) == [os.SCHED_IDLE]
    assert run_ranks(1, policy_of, torch.device("cuda")) == [os.SCHED_OTHER]


FLAGS = {
    "train.steps": 60,
    "train.global_batch": 16,
    "train.log_every": 5,
    "model.hidden_size": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "checkpoint.every": 10,
    "checkpoint.keep": 1,
    "evaluation.every": 20,
    "evaluation.samples": 64,
    "evaluation.grid_columns": 2,
    "sampler.nfe": 4,
    "launch.workers": 1,
    "launch.cpus_per_worker": 1,
}
ASYNCHRONOUS = {"evaluation.asynchronous": "true"}


def command(root: Path, **extra: object) -> list[str]:
    flags = {"run.root": root, **FLAGS, **extra}
    return [
        sys.executable,
        "pipelines/train.py",
        *(p for key, value in flags.items() for p in (f"--{key}", str(value))),
    ]


def fids(root: Path) -> dict[int, float]:
    lines = read_metrics(root / "digits" / "metrics.jsonl")
    return {line["step"]: line["eval/fid"] for line in lines if "eval/fid" in line}


def evaluators(process: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in process.children(recursive=True):
        try:
            if "ray::_evaluate" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_measures_what_the_workers_would(tmp_path: Path, local_cluster_env: dict[str, str]) -> None:
    options = {"cwd": REPOSITORY, "env": local_cluster_env, "text": True, "timeout": 280}
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    for root, extra in ((inside, {}), (beside, ASYNCHRONOUS)):
        done = subprocess.run(command(root, **extra), **options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout
        assert "FID" in done.stdout.split("is complete")[1]
    assert list(fids(inside)) == [20, 40, 60]
    assert fids(beside) == fids(inside)  # bit for bit: one process with the same weights, seeds and batches
    assert json.loads((beside / "digits" / "result.json").read_bytes())["metrics"]["eval/fid"] == fids(inside)[60]
    names = [path.name for path in sorted((beside / "digits" / "samples").iterdir())]
    assert names == [f"samples_step{step:08d}.png" for step in (20, 40, 60)]

    # The newest checkpoint and the best one stay.
    best = min(fids(beside), key=lambda step: fids(beside)[step])
    for root in (inside, beside):
        kept = {int(path.name.removeprefix("step_")) for path in (root / "digits" / "checkpoints").iterdir()}
        assert kept == {best, 60}

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{beside / 'mlflow.db'}")
    run_id = json.loads((beside / "digits" / "mlflow.json").read_bytes())["run_id"]
    assert {point.step: point.value for point in client.get_metric_history(run_id, "eval/fid")} == fids(inside)
    assert client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_evaluations_are_reported_and_the_run_ends_well(
    tmp_path: Path, local_cluster_env: dict[str, str]
) -> None:
    run = subprocess.Popen(
        command(tmp_path, **ASYNCHRONOUS), cwd=REPOSITORY, env=local_cluster_env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    ended = threading.Event()

    def kill_all() -> None:
        while not ended.wait(0.05):
            for evaluator in evaluators(psutil.Process(run.pid)):
                evaluator.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        out, _ = run.communicate(timeout=400)
    finally:
        ended.set()
        killer.join()
    assert run.returncode == 0, out
    for step in (20, 40, 60):
        assert f"warning: the evaluation of step {step} failed" in out
    assert fids(tmp_path) == {}
    assert list(read_metrics(tmp_path / "digits" / "metrics.jsonl"))[-1]["step"] == 60


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_killed_driver_left_unevaluated_is_evaluated_by_the_next(
    tmp_path: Path, local_cluster_env: dict[str, str]
) -> None:
    # Evaluations that take far longer than the training: the driver dies waiting for them, all steps made.
    slow = {**ASYNCHRONOUS, "evaluation.samples": 2000, "sampler.nfe": 60}
    first = subprocess.Popen(
        command(tmp_path, **slow), cwd=REPOSITORY, env=local_cluster_env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_for((tmp_path / "digits" / "result.json").exists, first)
    everything = psutil.Process(first.pid).children(recursive=True)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    for left in psutil.wait_procs(everything, timeout=10)[1]:  # Ray's agents notice after a minute that they are alone
        left.kill()
    assert 60 not in fids(tmp_path)
    awaited = Evaluations(tmp_path / "digits" / "evaluations", 20, 60).awaited([20, 40, 60])
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "digits" / "checkpoints").iterdir()}
    assert set(awaited) <= kept  # what is to be evaluated is not removed, though checkpoint.keep is 1

    second = subprocess.run(
        command(tmp_path, **ASYNCHRONOUS),
        cwd=REPOSITORY,
        env=local_cluster_env,
        text=True,
        capture_output=True,
        timeout=280,
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert list(fids(tmp_path)) == [20, 40, 60]
    kept = {int(path.name.removeprefix("step_")) for path in (tmp_path / "digits" / "checkpoints").iterdir()}
    assert len(kept) <= 2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"evaluation.every": 0}, "no effect with evaluation.every=0"),
        ({"launch.launcher": "local"}, "needs a Ray task"),
        ({"evaluation.every": 30, "checkpoint.every": 20}, "must be a multiple of checkpoint.every=20"),
        ({"evaluation.asynchronous": False, "evaluation.cpus": 2}, "cpus has no effect with asynchronous=false"),
    ],
)
def test_what_cannot_take_effect_is_refused(overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        with_overrides(digits(), {"evaluation.asynchronous": True, **overrides})


@pytest.mark.ray
@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"CPU": 2.0}, ("auto", "auto", 1), (1, 1, False, 1)),
        ({"CPU": 8.0}, ("auto", "auto", 2), (4, 1, False, 2)),
        ({"CPU": 16.0, "GPU": 4.0}, ("auto", "auto", 4), (3, 4, True, 4)),
        ({"CPU": 16.0, "GPU": 4.0}, ("auto", "auto", 0), (4, 4, True, 0)),
        # Room for the fewest is enough for an elastic run, whose workers do not share what will not stay as it is.
        ({"CPU": 2.0}, ((2, 8), "auto", 0), ((2, 8), 1, False, 0)),
        (
            {"CPU": 2.0},
            ((2, 8), "auto", 1),
            r"launch.workers=\[2, 8\] with 1 CPUs each must fit the 1 CPUs",
        ),
        ({"CPU": 16.0, "GPU": 1.0}, ((2, 8), "auto", 0), r"launch.workers=\[2, 8\] must be from 1 to the 1 GPUs"),
        ({"CPU": 2.0}, (2, 1, 1), "must fit the 1 CPUs of the cluster beside the asynchronous evaluation"),
        (
            {"CPU": 8.0, "GPU": 1.0},
            ("auto", "auto", 1),
            "from 1 to the 0 GPUs of the cluster beside the asynchronous evaluation",
        ),
        ({"CPU": 1.0}, ("auto", "auto", 1), "must fit the 0 CPUs of the cluster beside the asynchronous evaluation"),
    ],
)
def test_the_evaluation_has_its_resources_before_the_workers(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], asked: Any, expected: Any,
) -> None:  # fmt: skip
    import ray

    from eqm_dist.launch.ray_cluster import Offer, offer

    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    if isinstance(expected, str):
        with pytest.raises(LaunchError, match=expected):
            offer(*asked)
    else:
        assert offer(*asked) == Offer(*expected)


def test_news_come_once_and_failures_are_tried_again(tmp_path: Path) -> None:
    evaluations = Evaluations(tmp_path, every=10, last=35)
    assert [step for step in range(1, 36) if evaluations.due(step)] == [10, 20, 30, 35]
    evaluations.write(10, {"eval/fid": 3.0}, [tmp_path / "a.png"], 1.5, "fp32")
    evaluations.fail(20, "out of memory")
    assert [record["step"] for record in evaluations.news()] == [10, 20]
    assert evaluations.results()[10]["precision"] == "fp32"
    assert list(evaluations.news()) == []
    evaluations.write(30, {"eval/fid": 2.0}, [], 1.0, "fp32")
    assert [record["step"] for record in evaluations.news()] == [30]
    assert evaluations.best([10, 20, 30], 1) == {30}
    assert evaluations.best([10, 20], 2) == {10}
    assert evaluations.best([10, 30], 0) == set()
    assert evaluations.awaited([10, 20, 30, 35, 34]) == [35]
    evaluations.restart(20)
    assert list(evaluations.results()) == [10]
    assert evaluations.awaited([10, 20]) == [20]
