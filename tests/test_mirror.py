"""The mirror of a run: a lost run directory is fetched and goes on exactly, and no fault of S3 harms a run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from eqm_dist.build import OpenRun, build_mirror, build_run
from eqm_dist.open_run import open_run
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.checkpoint import MARKER
from eqm_dist.train.loop import train
from eqm_dist.train.mirror import Mirror
from tests import s3, tiny
from tests.s3 import FaultyProxy
from tests.test_checkpoint import CPU


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The directory of a run of six steps that nothing happened to."""
    root = tmp_path_factory.mktemp("clean")
    assert run(root, shards, None).code == 0
    return root / "tiny"


def settings(mirror: str | None, **others: Any) -> dict[str, Any]:
    deadline = {"checkpoint.mirror_deadline_s": 30} if mirror and mirror.startswith("s3://") else {}
    return {"optimizer.schedule": "constant", "checkpoint.mirror": mirror, **deadline, **others}


def run(root: Path, shards: Path, mirror: str | None, **others: Any) -> tiny.Outcome:
    return tiny.train(*tiny.flags(tiny.overrides(root, shards, **settings(mirror, **others))))


def run_in_three(root: Path, shards: Path, mirror: str, **others: Any) -> None:
    """A run of six steps, started anew after each checkpoint, so that each is copied before the next is there."""
    for reached in (2, 4, 6):
        assert run(root, shards, mirror, **others, **{"train.steps": reached}).code == 0


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(directory / "metrics.jsonl")]


def keys(endpoint: str, prefix: str) -> dict[str, int]:
    """Bytes of all objects by name, through a plain client."""
    page = s3.client(endpoint).list_objects_v2(Bucket=s3.BUCKET, Prefix=f"{prefix}/")
    return {entry["Key"].removeprefix(f"{prefix}/"): entry["Size"] for entry in page.get("Contents", [])}


def steps(endpoint: str, prefix: str) -> list[int]:
    """The steps of the whole checkpoints on a mirror."""
    return [int(key.split("/")[2][5:]) for key in sorted(keys(endpoint, prefix)) if key.endswith(f"/{MARKER}")]


def change(endpoint: str, key: str, content: bytes | None) -> None:
    plain = s3.client(endpoint)
    assert plain.head_object(Bucket=s3.BUCKET, Key=key)
    if content is None:
        plain.delete_object(Bucket=s3.BUCKET, Key=key)
    else:
        plain.put_object(Bucket=s3.BUCKET, Key=key, Body=content)


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


# --- a lost run directory ---


@pytest.mark.parametrize("place", ["s3", "disk"])
def test_a_run_goes_on_exactly_from_its_mirror_alone(
    place: str, tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    mirror = f"s3://{s3.BUCKET}/exact" if place == "s3" else str(tmp_path / "mirror")
    assert run(tmp_path, shards, mirror, **{"train.steps": 4}).code == 0
    shutil.rmtree(tmp_path / "tiny")
    resumed = run(tmp_path / "elsewhere", shards, mirror)
    assert resumed.code == 0, resumed.err
    assert "fetched step_00000004 from " in resumed.out
    assert "resumes at step 4" in resumed.out
    found = tmp_path / "elsewhere" / "tiny"
    assert losses(found) == losses(clean)
    for name, content in files(clean / "checkpoints" / "step_00000006").items():
        if name.endswith(".safetensors"):
            assert (found / "checkpoints" / "step_00000006" / name).read_bytes() == content


def test_all_of_a_complete_run_comes_back(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    picture = tmp_path / "tiny" / "samples" / "samples_step00000002.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    assert run(tmp_path, shards, f"s3://{s3.BUCKET}/complete", **{"checkpoint.keep": 1}).code == 0
    before = files(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny")
    again = run(tmp_path, shards, f"s3://{s3.BUCKET}/complete", **{"checkpoint.keep": 1})
    assert again.code == 0, again.err
    assert "run tiny is complete" in again.out
    assert "resumes" not in again.out
    after = files(tmp_path / "tiny")
    assert after.keys() | {"logs/rank-0000.log"} == before.keys()
    assert all(content == before[name] for name, content in after.items())


def test_a_run_directory_that_is_ahead_stays_as_it_is(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    assert run(tmp_path, shards, f"s3://{s3.BUCKET}/behind", **{"train.steps": 2}).code == 0
    assert run(tmp_path, shards, None, **{"train.steps": 4}).code == 0
    resumed = run(tmp_path, shards, f"s3://{s3.BUCKET}/behind")
    assert resumed.code == 0
    assert "resumes at step 4" in resumed.out
    assert "fetched" not in resumed.out
    assert losses(tmp_path / "tiny") == losses(clean)
    assert steps(endpoint, "behind") == [2, 6]  # what was made without a mirror is not sent later


def test_a_mirror_of_another_run_is_refused_before_anything_is_fetched(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    url = f"s3://{s3.BUCKET}/other"
    assert run(tmp_path, shards, url, **{"run.seed": 1}).code == 0
    refused = run(tmp_path / "new", shards, url, **{"run.seed": 0})
    assert refused.code == 2
    assert "run.seed was 1 when the run tiny started and is now 0" in refused.err
    assert f"or delete {url}/tiny to start this one over" in refused.err
    assert not (tmp_path / "new" / "tiny").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_on_ray_goes_on_exactly_from_its_mirror_alone(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str
) -> None:
    """On one worker with the plain engine, whose arithmetic is that of a run without Ray, so bit for bit."""
    on_ray = {"launch.launcher": "ray", "launch.workers": 1, "launch.cpus_per_worker": 1, "engine.kind": "torch"}
    outputs = []
    for reached in (4, 6):
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        mirror = f"s3://{s3.BUCKET}/ray"
        values = tiny.overrides(tmp_path, shards, **settings(mirror, **on_ray, **{"train.steps": reached}))
        done = subprocess.run(
            [sys.executable, "pipelines/train.py", *tiny.flags(values)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **s3.environment(endpoint), "RAY_ADDRESS": "local"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        outputs.append(done.stdout)
        assert steps(endpoint, "ray")[-1] == reached
    assert "fetched step_00000004 from " in outputs[1]
    assert "resumes at step 4" in outputs[1]
    assert losses(tmp_path / "tiny") == losses(clean)


# --- damage ---


@pytest.fixture(scope="module")
def survivor(tmp_path_factory: pytest.TempPathFactory, shards: Path, endpoint: str) -> str:
    """The prefix of a mirror that holds six steps of a run that did not end, and is all that is left of it."""
    with pytest.MonkeyPatch.context() as patch:
        s3.use(patch, endpoint)
        run_in_three(tmp_path_factory.mktemp("survivor"), shards, f"s3://{s3.BUCKET}/survivor")
    assert steps(endpoint, "survivor") == [2, 4, 6]
    change(endpoint, "survivor/tiny/result.json", None)
    return "survivor"


@pytest.fixture
def mirrored(survivor: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Copies that mirror to a prefix of the test's own, to do damage to."""
    s3.use(monkeypatch, endpoint)

    def copy(name: str) -> None:
        for key in keys(endpoint, survivor):
            source = {"Bucket": s3.BUCKET, "Key": f"{survivor}/{key}"}
            s3.client(endpoint).copy_object(Bucket=s3.BUCKET, Key=f"{name}/{key}", CopySource=source)

    return copy


NEWEST = "tiny/checkpoints/step_00000006"


@pytest.mark.parametrize(
    ("file", "content", "warning"),
    [
        ("state-0000-of-0001.safetensors", b"rubbish", "has the sha256"),
        ("ema.safetensors", None, "is missing"),
        (MARKER, None, "was not finished; it is passed over"),
    ],
)
def test_a_damaged_copy_falls_back_to_the_one_before(
    file: str,
    content: bytes | None,
    warning: str,
    mirrored: Callable[[str], None],
    shards: Path,
    clean: Path,
    endpoint: str,
    tmp_path: Path,
) -> None:
    name = f"damaged-{hashlib.sha256(f'{file}{content}'.encode()).hexdigest()[:8]}"
    mirrored(name)
    change(endpoint, f"{name}/{NEWEST}/{file}", content)
    resumed = run(tmp_path, shards, f"s3://{s3.BUCKET}/{name}")
    assert resumed.code == 0, resumed.err
    assert warning in resumed.out
    assert "fetched step_00000004" in resumed.out
    assert "resumes at step 4" in resumed.out
    assert losses(tmp_path / "tiny") == losses(clean)
    # The good checkpoint of that step has taken the place of the damaged one.
    plain = s3.client(endpoint)
    for path in (tmp_path / NEWEST).iterdir():
        body = plain.get_object(Bucket=s3.BUCKET, Key=f"{name}/{NEWEST}/{path.name}")["Body"].read()
        assert body == path.read_bytes()


def test_where_all_copies_are_damaged_nothing_starts_over_in_silence(
    mirrored: Callable[[str], None], shards: Path, endpoint: str, tmp_path: Path
) -> None:
    mirrored("lost")
    for step in (2, 4, 6):
        change(endpoint, f"lost/tiny/checkpoints/step_{step:08d}/ema.safetensors", b"")
    refused = run(tmp_path, shards, f"s3://{s3.BUCKET}/lost")
    assert refused.code == 2
    assert "must hold an undamaged checkpoint of the run, but all 3 are damaged" in refused.err


# --- S3 that fails ---


class Gate(FaultyProxy):
    """Refuses some requests, and calls ``before`` in front of each other, while nothing changes."""

    def __init__(self, endpoint: str, refused: Callable[[str], bool] = lambda request: False) -> None:
        self.refused = refused
        self.before: Callable[[], None] = lambda: None
        super().__init__(endpoint)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.refused(f"{request.command} {request.path}"):
            request.rfile.read(int(request.headers.get("Content-Length", 0)))
            request.wfile.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        self.before()
        super()._answer(request)


def test_a_copy_that_fails_is_a_warning_and_the_next_one_brings_the_run(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Gate(endpoint, lambda request: request.startswith("PUT") and "step_00000002" in request) as gate:
        s3.use(monkeypatch, gate.endpoint)
        ended = run(tmp_path, shards, f"s3://{s3.BUCKET}/hiccup", **{"checkpoint.mirror_deadline_s": 2})
    assert ended.code == 0, ended.err
    assert losses(tmp_path / "tiny") == losses(clean)
    assert (
        "warning: The checkpoint step_00000002 is not on the mirror s3://bucket/hiccup/tiny: Cannot write" in ended.out
    )
    assert steps(endpoint, "hiccup")[-1] == 6
    assert not any("step_00000002" in key for key in keys(endpoint, "hiccup"))


def test_a_dead_mirror_stops_no_training_and_the_end_says_what_is_missing(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3.BUCKET}/dead"
    with Gate(endpoint, lambda request: not request.startswith("GET")) as gate:
        s3.use(monkeypatch, gate.endpoint)
        ended = run(tmp_path, shards, url, **{"checkpoint.mirror_deadline_s": 2})
        assert ended.code == 1
        assert f"error: The checkpoint step_00000006 is not on the mirror {url}/tiny: Cannot " in ended.err
        assert "run the same command again to copy it." in ended.err
        assert "Traceback" not in ended.err
        assert losses(tmp_path / "tiny") == losses(clean)
        assert (tmp_path / "tiny" / "checkpoints" / "step_00000006" / MARKER).exists()
        assert keys(endpoint, "dead") == {}
        gate.refused = lambda request: False
        again = run(tmp_path, shards, url)
        assert again.code == 0, again.err
        assert "resumes" not in again.out
    assert steps(endpoint, "dead") == [6]
    assert "tiny/result.json" in keys(endpoint, "dead")


def test_a_bad_network_changes_nothing(
    tmp_path: Path, shards: Path, clean: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(endpoint, failing=0.2, stalling=0.02, seed=3) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        deadline = {"checkpoint.mirror_deadline_s": 8}
        assert run(tmp_path, shards, f"s3://{s3.BUCKET}/bad", **deadline, **{"train.steps": 4}).code == 0
        shutil.rmtree(tmp_path / "tiny")
        resumed = run(tmp_path, shards, f"s3://{s3.BUCKET}/bad", **deadline)
        assert resumed.code == 0, resumed.err
        assert sum(count for kind, count in proxy.faults.items() if kind != "none") >= 5
    assert "resumes at step 4" in resumed.out
    assert losses(tmp_path / "tiny") == losses(clean)


# --- whole or absent ---


def test_at_no_time_is_there_a_marker_without_its_files(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at before every request: copies, a repeated copy and removals."""
    plain, states = s3.client(endpoint), []

    def look() -> None:
        found = keys(endpoint, "watched")
        for key in found:
            if key.endswith(f"/{MARKER}"):
                marker = json.loads(plain.get_object(Bucket=s3.BUCKET, Key=f"watched/{key}")["Body"].read())
                place = key.removesuffix(MARKER)
                assert {
                    f"{place}{name}": record["bytes"] for name, record in marker["files"].items()
                }.items() <= found.items()
        states.append(found)

    wrong: list[BaseException] = []

    def look_and_tell() -> None:
        try:
            look()
        except BaseException as error:
            wrong.append(error)

    with Gate(endpoint) as gate:
        s3.use(monkeypatch, gate.endpoint)
        gate.before = look_and_tell
        keep = {"checkpoint.keep": 2}
        run_in_three(tmp_path, shards, f"s3://{s3.BUCKET}/watched", **keep)
        mirror = mirror_of(tmp_path, shards, "watched", **keep)
        mirror.copy(tmp_path / "tiny" / "checkpoints" / "step_00000006")
        mirror.wait()
    assert wrong == []
    assert len(states) > 20
    assert steps(endpoint, "watched") == [4, 6]
    assert not any("step_00000002" in key for key in states[-1])
    assert any("step_00000002" in key for state in states for key in state)


def mirror_of(root: Path, shards: Path, name: str, **others: Any) -> Mirror:
    config = tiny.config(root, shards, **settings(f"s3://{s3.BUCKET}/{name}", **others))
    mirror = build_mirror(OpenRun(config, root / "tiny", None))
    assert mirror is not None
    return mirror


def test_training_does_not_wait_and_the_newest_is_copied_next(
    tmp_path: Path, shards: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirror takes nothing until the last step is saved, and the run directory keeps one checkpoint only."""
    done = threading.Event()

    def held_up(request: str) -> bool:
        if not request.startswith("GET"):
            assert done.wait(60)
        return False

    with Gate(endpoint, held_up) as gate:
        s3.use(monkeypatch, gate.endpoint)
        long = {"checkpoint.mirror_deadline_s": 200, "checkpoint.keep": 1}
        config = tiny.config(tmp_path, shards, **settings(f"s3://{s3.BUCKET}/slow", **long))
        training = build_run(open_run(config), CPU)
        train(training)
        assert [path.name for path in training.checkpoints.whole()] == ["step_00000006"]
        done.set()
        assert training.mirror is not None
        seen: set[str] = set()
        gate.before = lambda: seen.update(keys(endpoint, "slow"))
        training.mirror.wait()
    assert steps(endpoint, "slow") == [6]
    # The first copy was under way when its checkpoint was removed here, and arrived whole; the second was left out.
    assert {key.split("/")[2] for key in seen if key.endswith(f"/{MARKER}")} == {"step_00000002", "step_00000006"}
    assert not any("step_00000004" in key for key in seen)


# --- the options ---


def test_an_option_without_effect_is_refused(tmp_path: Path, shards: Path) -> None:
    for mirror in (None, str(tmp_path / "mirror")):
        refused = run(tmp_path, shards, mirror, **{"checkpoint.mirror_deadline_s": 5})
        assert refused.code == 2
        assert "mirror_deadline_s has no effect without a mirror on s3://" in refused.err
    refused = run(tmp_path, shards, "gs://bucket/x")
    assert refused.code == 2
    assert "must be a local path, received the gs: URL" in refused.err
