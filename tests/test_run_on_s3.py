"""A run on S3: the numbers of a local one, whole or absent after any kill, and no disk that is shared."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from eqm_dist.build import OpenRun, build_run
from eqm_dist.errors import LaunchError
from eqm_dist.launch.shared_root import check_signed, sign
from eqm_dist.launch.worker import run_to_end
from eqm_dist.open_run import open_run
from eqm_dist.options import with_overrides
from eqm_dist.storage.location import S3Path
from eqm_dist.storage.open import open_s3
from eqm_dist.storage.s3 import LEAST_PART_BYTES
from eqm_dist.train.checkpoint import MARKER
from eqm_dist.train.distributed import rank
from eqm_dist.train.reports import Reports
from tests import s3, tiny
from tests.distributed import run_ranks
from tests.test_mirror import files, keys, losses


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The directory of a local run of six steps that nothing happened to."""
    return tiny.trained(tmp_path_factory.mktemp("clean"), shards, **{"optimizer.schedule": "constant"})


def flags(name: str, scratch: Path, shards: Path, **others: Any) -> list[str]:
    """Of a run below a prefix of its own, which this machine works for in ``scratch``."""
    values = tiny.overrides(Path(), shards, **{"optimizer.schedule": "constant", **others})
    return tiny.flags({**values, "run.root": f"s3://{s3.BUCKET}/{name}", "run.scratch": str(scratch)})


def stored(endpoint: str, prefix: str, directory: Path) -> Path:
    """All that lies below a prefix, copied here by a plain client."""
    for name in keys(endpoint, prefix):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.client(endpoint).download_file(s3.BUCKET, f"{prefix}/{name}", str(path))
    return directory


def same_checkpoint(one: Path, other: Path) -> bool:
    """Whether both have the same numbers, bit for bit."""
    names = [path.name for path in one.iterdir() if path.suffix == ".safetensors"]
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# --- one process ---


def test_a_run_on_s3_is_the_local_one_and_leaves_nothing_here(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    ended = tiny.train(*flags("whole", tmp_path / "scratch", shards, **{"checkpoint.keep": 2}))
    assert ended.code == 0, ended.err
    assert f"s3://{s3.BUCKET}/whole/tiny" in ended.out
    found = stored(endpoint, "whole", tmp_path / "found") / "tiny"
    assert losses(found) == losses(clean)
    assert same_checkpoint(found / "checkpoints/step_00000006", clean / "checkpoints/step_00000006")
    assert sorted(path.name for path in (found / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    there = {"config.yaml", "manifest.json", "result.json", "attempts.jsonl", "metrics.jsonl", "logs/rank-0000.log"}
    assert there == {name for name in files(found) if not name.startswith("checkpoints/")}
    assert "saved step 6" in (found / "logs/rank-0000.log").read_text()
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


def test_it_goes_on_from_the_bucket_alone(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    for reached, machine in ((2, "one"), (4, "two"), (6, "one")):
        ended = tiny.train(*flags("moves", tmp_path / machine, shards, **{"train.steps": reached}))
        assert ended.code == 0, ended.err
        if reached == 4:
            shutil.rmtree(tmp_path / "two")
    assert "resumes at step 4" in ended.out
    found = stored(endpoint, "moves", tmp_path / "found") / "tiny"
    assert losses(found) == losses(clean)
    assert same_checkpoint(found / "checkpoints/step_00000006", clean / "checkpoints/step_00000006")
    log = (found / "logs/rank-0000.log").read_text()
    assert all(f"saved step {step}" in log for step in (2, 4, 6))


def test_a_damaged_checkpoint_is_set_aside_on_s3(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    assert tiny.train(*flags("damaged", tmp_path, shards, **{"train.steps": 4})).code == 0
    name = "damaged/tiny/checkpoints/step_00000004/state-0000-of-0001.safetensors"
    content = s3.client(endpoint).get_object(Bucket=s3.BUCKET, Key=name)["Body"].read()
    s3.client(endpoint).put_object(Bucket=s3.BUCKET, Key=name, Body=content[:-1] + bytes([content[-1] ^ 1]))
    ended = tiny.train(*flags("damaged", tmp_path, shards))
    assert ended.code == 0, ended.err
    assert "is damaged: its sha256 is" in ended.out
    assert "resumes at step 2" in ended.out
    found = stored(endpoint, "damaged", tmp_path / "found") / "tiny"
    assert losses(found) == losses(clean)
    assert (found / "checkpoints/damaged-step_00000004" / MARKER).exists()


# --- several ranks, each on a machine of its own ---


def on_its_own_machine(opened: OpenRun, number: int) -> OpenRun:
    """The run as another machine sees it, which has nothing of the first one's disk."""
    directory = opened.directory.with_name(f"machine-{number}")
    config = with_overrides(opened.config, {"run.scratch": str(directory)})
    return OpenRun(config, directory / "tiny", opened.mlflow)


def train_alone(number: int, runs: list[OpenRun]) -> None:
    """What a worker does with one run after the other, as ``launch.ray_train`` has it."""
    for opened in runs:
        opened = on_its_own_machine(opened, number)
        opened.directory.mkdir(parents=True)
        if opened.reports is not None and rank() == 0:
            opened.reports.fetch()
        with opened.reports if opened.reports is not None and rank() == 0 else nullcontext():
            run_to_end(opened, build_run(opened, torch.device("cpu")))
        assert not list(opened.directory.rglob("*.safetensors"))
        torch.distributed.barrier()
        shutil.rmtree(opened.directory)


@pytest.mark.deepspeed
@pytest.mark.multiprocess
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_without_a_common_disk_go_on_bit_for_bit(
    stage: int, tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    ray = {"launch.launcher": "ray", "engine.zero_stage": stage, "optimizer.schedule": "constant"}
    runs = []
    for name, reached in (("apart", 4), ("apart", 6), ("together", 6)):
        root, scratch = f"s3://{s3.BUCKET}/zero-{stage}/{name}", str(tmp_path / "scratch")
        on_s3 = {"run.root": root, "run.scratch": scratch, "train.steps": reached}
        runs.append(open_run(tiny.config(Path(), shards, **ray, **on_s3)))
    run_ranks(2, train_alone, runs)
    found = stored(endpoint, f"zero-{stage}", tmp_path / "found")
    apart, together = found / "apart/tiny", found / "together/tiny"
    assert losses(apart) == losses(together)
    assert len(losses(apart)) == 6
    last = "checkpoints/step_00000006"
    assert same_checkpoint(apart / last, together / last)
    assert len(list((apart / last).glob("state-*-of-0002.safetensors"))) == 2


# --- Ray ---


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_ray_needs_nothing_but_the_bucket(tmp_path: Path, shards: Path, clean: Path, endpoint: str) -> None:
    """On one worker with the plain engine, whose arithmetic is that of a run without Ray, so bit for bit."""
    on_ray = {"launch.launcher": "ray", "launch.workers": 1, "launch.cpus_per_worker": 1, "engine.kind": "torch"}
    for reached in (4, 6):
        done = subprocess.run(
            [sys.executable, "pipelines/train.py",
             *flags("ray", tmp_path / str(reached), shards, **on_ray, **{"train.steps": reached})],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **s3.environment(endpoint), "RAY_ADDRESS": "local"},
            capture_output=True,
            text=True,
            timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + done.stdout
        assert f"saved step {reached}" in done.stdout  # of the log of a worker that may be elsewhere
    assert "resumes at step 4" in done.stdout
    found = stored(endpoint, "ray", tmp_path / "found") / "tiny"
    assert losses(found) == losses(clean)
    assert same_checkpoint(found / "checkpoints/step_00000006", clean / "checkpoints/step_00000006")


def test_a_host_that_has_another_directory_under_the_name_of_the_root_is_named(tmp_path: Path) -> None:
    for host in ("driver", "other"):
        (tmp_path / host).mkdir()
    expected = sign(tmp_path / "driver")
    check_signed(tmp_path / "driver", expected)
    sign(tmp_path / "other")  # which was a driver's once, too
    with pytest.raises(LaunchError, match=r"run.root must be the same directory on every host, and .* is not that of"):
        check_signed(tmp_path / "other", expected, wait_s=0.1)


# --- reports ---


class Scales(s3.FaultyProxy):
    """Weighs what is sent."""

    sent = 0

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        self.sent += int(request.headers.get("Content-Length", 0))
        super()._answer(request)


def test_what_is_new_of_a_long_file_is_all_that_moves(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scales(endpoint) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        place = S3Path(f"s3://{s3.BUCKET}/reports/tiny")
        reports, metrics = Reports(tmp_path, place, None), tmp_path / "metrics.jsonl"
        line, half = b'{"step": 1, "train/loss": 0.5}\n', b'{"step": 2'
        metrics.write_bytes(line * (LEAST_PART_BYTES // len(line) + 1))
        reports.put()
        assert proxy.sent > LEAST_PART_BYTES
        proxy.sent = 0
        for number in range(3):
            size = metrics.stat().st_size
            with metrics.open("ab") as file:
                file.write(line * (number + 1) + half)  # which stays here, for it may be taken back
            reports.put()
            os.truncate(metrics, size + len(line) * (number + 1))
            assert open_s3(place).read("metrics.jsonl") == metrics.read_bytes()
        assert 0 < proxy.sent < 5_000
        metrics.write_bytes(line)  # a run that went back
        reports.put()
        assert open_s3(place).read("metrics.jsonl") == line
        metrics.unlink()
        reports.put()
        assert open_s3(place).size("metrics.jsonl") is None
