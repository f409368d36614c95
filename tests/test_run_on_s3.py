"""A run on S3: the numbers of a local one, whole or absent after any kill, and no disk that is shared."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

import eqm_dist
from eqm_dist import inventory
from eqm_dist.build import OpenRun, build_run
from eqm_dist.commands import checkpoint as checkpoint_command
from eqm_dist.errors import LaunchError
from eqm_dist.launch.shared_root import check_signed, sign
from eqm_dist.launch.worker import run_to_end
from eqm_dist.models.weights import read_safetensors
from eqm_dist.open_run import open_run
from eqm_dist.options import with_overrides
from eqm_dist.run_directory import CHECKPOINTS
from eqm_dist.storage import remote_lease
from eqm_dist.storage.lease import LEASE_FILE, Holder
from eqm_dist.storage.location import S3Path
from eqm_dist.storage.open import open_s3
from eqm_dist.storage.s3 import LEAST_PART_BYTES
from eqm_dist.train.checkpoint import MARKER, Checkpoints, step_of
from eqm_dist.train.distributed import rank
from eqm_dist.train.reports import Reports
from tests import s3, tiny
from tests.distributed import run_ranks
from tests.savers import start_savers
from tests.test_mirror import Gate, files, keys, losses


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


# --- readers ---


def test_commands_read_a_run_from_the_bucket(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    assert tiny.train(*flags("read", tmp_path / "scratch", shards)).code == 0
    monkeypatch.chdir(tmp_path)
    url = f"s3://{s3.BUCKET}/read/tiny"

    def checkpoint(*arguments: str) -> tiny.Outcome:
        return tiny.run(checkpoint_command.start, "pipelines/checkpoint.py", *arguments)

    listed = checkpoint("ls", url)
    assert [line.split()[:2] for line in listed.out.splitlines()[1:]] == [[step, "whole"] for step in "246"]
    verified = checkpoint("verify", url, "--all")
    assert verified.code == 0
    assert verified.out.count(" is whole: 3 files") == 3
    assert checkpoint("verify", f"{url}/checkpoints/step_00000002").code == 0
    assert checkpoint("export", url, "--ema", "none", "--run.root", f"s3://{s3.BUCKET}/read").code == 0
    assert checkpoint("convert", url, "--out", "found.pt").code == 0
    found, expected = eqm_dist.load(url), eqm_dist.load(clean)
    assert found.step == 6
    assert found.autoencoder_id == "identity"
    assert all(torch.equal(found.weights[name], values) for name, values in expected.weights.items())
    whole = read_safetensors(tmp_path / "exports/tiny-step6-weight/model.safetensors")
    weights = eqm_dist.load(clean, ema="none").weights
    assert all(torch.equal(whole[name], values) for name, values in weights.items())
    nothing = checkpoint("verify", f"s3://{s3.BUCKET}/nothing/tiny")
    assert nothing.code != 0 or "COMPLETE.json" in nothing.out


# --- two drivers, and faults ---


def test_of_two_drivers_one_has_the_run_and_a_dead_one_loses_it(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    place = S3Path(f"s3://{s3.BUCKET}/held/tiny")
    with remote_lease.hold_on_s3(place, "The run tiny", "wait"):
        refused = tiny.train(*flags("held", tmp_path, shards))
        assert refused.code == 1
        assert f"The run tiny is held by process {os.getpid()} on" in refused.err
        assert "choose another --run.name" in refused.err
    assert open_s3(place).size(LEASE_FILE) is None
    # A holder elsewhere that gives no sign of life is waited for, one that does is believed.
    monkeypatch.setattr(remote_lease, "LEASE_S", 1.0)
    monkeypatch.setattr(remote_lease, "BEAT_S", 0.2)
    elsewhere = replace(Holder.of_this_process(), machine="another", host="another")
    open_s3(place).write(LEASE_FILE, json.dumps({"holder": asdict(elsewhere), "number": 3}).encode())
    with remote_lease.hold_on_s3(place, "The run tiny", "wait"):
        holder = replace(elsewhere, id="other")
        living = json.dumps({"holder": asdict(holder), "number": 1}).encode()
        before = open_s3(place).versioned(LEASE_FILE)
        assert before is not None
        assert open_s3(place).write_if(LEASE_FILE, living, None) is None  # there is one
        assert open_s3(place).write_if(LEASE_FILE, living, '"0"') is None  # it has changed


def test_saves_that_fail_end_the_run_in_one_sentence_and_what_was_saved_stays(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that takes no checkpoint after the second step, by any number of tries."""
    late = [f"step_{step:08d}" for step in (4, 6)]
    with Gate(endpoint, lambda request: request.startswith("PUT") and any(name in request for name in late)) as gate:
        s3.use(monkeypatch, gate.endpoint)
        failed = tiny.train(*flags("failing", tmp_path / "one", shards, **{"run.deadline_s": 1}))
    assert failed.code == 1
    assert "Training goes on, and the next checkpoint is tried" in failed.out
    assert failed.err.count("\n") == 1
    assert f"the last good checkpoint is s3://{s3.BUCKET}/failing/tiny/checkpoints/step_00000002" in failed.err
    s3.use(monkeypatch, endpoint)
    again = tiny.train(*flags("failing", tmp_path / "two", shards))
    assert again.code == 0, again.err
    assert "resumes at step 2" in again.out
    assert losses(stored(endpoint, "failing", tmp_path / "found") / "tiny") == losses(clean)


def test_a_bucket_that_is_gone_is_one_sentence(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    arguments = flags("any", tmp_path, shards)
    refused = tiny.train(*(argument.replace(s3.BUCKET, "no-such-bucket") for argument in arguments))
    assert refused.code == 1
    assert refused.err.count("\n") == 1
    assert "check the name, the credentials and their rights" in refused.err


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(900)
def test_a_kill_at_any_instant_of_a_commit_leaves_a_whole_checkpoint(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    draws, newest = random.Random(50), 0
    on_s3 = {"run.root": f"s3://{s3.BUCKET}/kills", "run.scratch": str(tmp_path / "scratch"), "train.steps": 10**6}
    opened = open_run(tiny.config(Path(), shards, **on_s3, **{"checkpoint.every": 1, "optimizer.schedule": "constant"}))
    for number in range(50):
        (tmp_path / str(number)).mkdir()
        ranks = start_savers(1, opened, tmp_path / str(number), s3.environment(endpoint))
        time.sleep(draws.uniform(0.0, 0.4))
        ranks[0].kill()
        ranks[0].join()
        latest = Checkpoints(opened.place / CHECKPOINTS, keep=1).latest()
        if latest is not None:
            inventory.verify(latest)
            assert step_of(latest.name) >= newest
            newest = step_of(latest.name)
    assert newest > 20
