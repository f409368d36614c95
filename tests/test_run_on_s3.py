"""A run on S3: the numbers of a local one, whole or absent after any kill, and no disk that is shared."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from eqm_dist.train.checkpoint import MARKER
from tests import s3, tiny
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
