"""From images to S3 to a trained model, through the commands, against a real endpoint."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eqm_dist.data.publish import publish_shards
from eqm_dist.data.shards import digits_shards
from eqm_dist.errors import DataError
from tests import s3
from tests.s3 import s3_server


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


def command(endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **s3.environment(endpoint)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def test_prepare_to_s3_train_from_it_and_resume(tmp_path: Path, endpoint: str) -> None:
    out = f"s3://{s3.BUCKET}/digits"
    prepare = ["pipelines/prepare_shards.py", "--source", "digits", "--out", out, "--launcher", "local"]
    refused = command(endpoint, *prepare)
    assert refused.returncode == 2
    assert "an s3:// --out needs --staging" in refused.stderr
    prepared = command(endpoint, *prepare, "--staging", str(tmp_path / "staging"))
    assert prepared.returncode == 0, prepared.stderr
    assert "1,797 samples in 8 shards" in prepared.stdout

    train = (
        f"pipelines/train.py --launcher local --run.root {tmp_path} --data.shards {out} --evaluation.every 0"
        " --optimizer.schedule constant --train.log_every 1 --track.mlflow false --model.hidden_size 16"
        f" --model.depth 1 --model.num_heads 2 --data.cache_dir {tmp_path / 'cache'}"
    ).split()
    first = command(endpoint, *train, "--train.steps", "2")
    assert first.returncode == 0, first.stderr
    second = command(endpoint, *train, "--train.steps", "4")
    assert second.returncode == 0, second.stderr
    assert "resumes at step 2" in second.stdout


def test_a_publication_goes_on_and_ends_with_the_manifest(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.use(monkeypatch, endpoint)
    manifest = digits_shards(tmp_path)
    plain = s3.client(endpoint)
    # As a killed publication leaves it: some shards, no manifest. One of them is not what it should be.
    whole, short = manifest.shards[0].name, manifest.shards[1].name
    plain.put_object(Bucket=s3.BUCKET, Key=f"part/{whole}", Body=(tmp_path / whole).read_bytes())
    plain.put_object(Bucket=s3.BUCKET, Key=f"part/{short}", Body=b"half")
    before = plain.head_object(Bucket=s3.BUCKET, Key=f"part/{whole}")["LastModified"]
    publish_shards(tmp_path, f"s3://{s3.BUCKET}/part")
    for record in (*manifest.shards, manifest.index):
        body = plain.get_object(Bucket=s3.BUCKET, Key=f"part/{record.name}")["Body"].read()
        assert body == (tmp_path / record.name).read_bytes()
    assert plain.head_object(Bucket=s3.BUCKET, Key=f"part/{whole}")["LastModified"] == before  # not sent again
    publish_shards(tmp_path, f"s3://{s3.BUCKET}/part")  # nothing left to do


def test_another_data_set_is_not_overwritten(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, endpoint)
    digits_shards(tmp_path)
    s3.client(endpoint).put_object(
        Bucket=s3.BUCKET,
        Key="taken/manifest.json",
        Body=(tmp_path / "manifest.json").read_bytes().replace(b'"digits"', b'"others"'),
    )
    with pytest.raises(DataError, match="holds another data set"):
        publish_shards(tmp_path, f"s3://{s3.BUCKET}/taken")
