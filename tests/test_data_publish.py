"""From images to S3 to a trained model, through the commands, against a real endpoint."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from eqm_dist.commands import prepare_shards
from eqm_dist.data.manifest import Manifest, file_record, read_manifest
from eqm_dist.data.merge import merge_shards
from eqm_dist.data.publish import publish_shards
from eqm_dist.data.shards import digits_shards, write_shards
from eqm_dist.data.sources import Digits
from eqm_dist.data.verify import verify_shards
from eqm_dist.errors import DataError, StorageError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.storage.open import open_folder
from tests import s3, tiny
from tests.images import write_tree
from tests.s3 import FaultyProxy


def test_prepare_to_s3_train_from_it_and_resume(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, endpoint)
    out = f"s3://{s3.BUCKET}/digits"
    prepare = partial(tiny.run, prepare_shards.start, "pipelines/prepare_shards.py")
    flags = ["--source", "digits", "--out", out, "--launcher", "local"]
    refused = prepare(*flags)
    assert refused.code == 2
    assert "an s3:// --out needs --staging" in refused.err
    prepared = prepare(*flags, "--staging", str(tmp_path / "staging"))
    assert prepared.code == 0, prepared.err
    assert "1,797 samples in 8 shards" in prepared.out

    train = (
        f"--launcher local --run.root {tmp_path} --data.shards {out} --evaluation.every 0"
        " --optimizer.schedule constant --train.log_every 1 --track.mlflow false --model.hidden_size 16"
        f" --model.depth 1 --model.num_heads 2 --data.cache_dir {tmp_path / 'cache'}"
    ).split()
    first = tiny.train(*train, "--train.steps", "2")
    assert first.code == 0, first.err
    second = tiny.train(*train, "--train.steps", "4")
    assert second.code == 0, second.err
    assert "resumes at step 2" in second.out


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


def test_a_shard_that_was_written_again_is_sent_again(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, as tars are padded, after a publication that was killed before its manifest."""
    s3.use(monkeypatch, endpoint)
    manifest, url = digits_shards(tmp_path), f"s3://{s3.BUCKET}/again"
    publish_shards(tmp_path, url)
    plain, name = s3.client(endpoint), manifest.shards[2].name
    plain.delete_object(Bucket=s3.BUCKET, Key="again/manifest.json")
    content = (tmp_path / name).read_bytes()[:-1] + b"x"
    (tmp_path / name).write_bytes(content)
    record = file_record(tmp_path / name).model_dump()
    fields = json.loads((tmp_path / "manifest.json").read_text())
    fields["shards"][2] |= record
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    publish_shards(tmp_path, url)
    assert open_folder(url).read(name) == content


def test_a_bucket_that_is_not_there_is_named(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.use(monkeypatch, endpoint)
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x: .*bucket.*check the name"):
        read_manifest("s3://no-such-bucket/x")
    with pytest.raises(DataError, match=r"holds none; prepare one with .*--staging DIR --out s3://"):
        read_manifest(f"s3://{s3.BUCKET}/nothing-here")


@pytest.fixture
def published(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Publishes the digits under a prefix, in shards named so; returns the URL."""
    s3.use(monkeypatch, endpoint)

    def publish(prefix: str, name: str) -> str:
        directory = tmp_path / prefix
        write_shards(directory, name, Digits(), IdentityAutoencoder(), samples_per_shard=600, dtype="float16")
        return s3.upload(endpoint, directory, f"{tmp_path.name}/{prefix}")

    return publish


def test_verify_reads_from_s3_and_names_the_damage(
    published: Callable[[str, str], str], endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = published("whole", "digits")
    prepare_shards.main(["verify", url])
    assert capsys.readouterr().out == f"{url} is whole: 1,797 samples in 3 shards.\n"
    plain, key = s3.client(endpoint), f"{url}/digits-000001.tar".removeprefix(f"s3://{s3.BUCKET}/")
    content = bytearray(plain.get_object(Bucket=s3.BUCKET, Key=key)["Body"].read())
    content[1000] ^= 1
    plain.put_object(Bucket=s3.BUCKET, Key=key, Body=bytes(content))
    plain.delete_object(Bucket=s3.BUCKET, Key=key.replace("000001", "000002"))
    with pytest.raises(DataError) as raised:
        prepare_shards.main(["verify", url])
    first, second = str(raised.value).splitlines()
    assert first.startswith(f"{url}/digits-000001.tar must have the sha256")
    assert second.startswith(f"{url}/digits-000002.tar must be there")


def test_index_makes_a_data_set_of_bare_tars_on_s3(
    published: Callable[[str, str], str], tmp_path: Path, endpoint: str
) -> None:
    whole = tmp_path / "whole"
    published("whole", "digits")
    for name in ("manifest.json", "index.npy"):
        (whole / name).rename(tmp_path / name)
    bare = s3.upload(endpoint, whole, f"{tmp_path.name}/bare")
    prepare_shards.main(["index", bare, "--images", "sklearn-digits"])
    expected = Manifest.model_validate_json((tmp_path / "manifest.json").read_bytes())
    assert verify_shards(bare) == expected.model_copy(update={"name": "bare"})
    assert open_folder(bare).read("index.npy") == (tmp_path / "index.npy").read_bytes()


@pytest.mark.parametrize("places", [("s3", "s3", "s3"), ("s3", "local", "s3"), ("local", "s3", "local")])
def test_merge_joins_from_anywhere_to_anywhere(
    places: tuple[str, str, str], published: Callable[[str, str], str], tmp_path: Path
) -> None:
    urls = [published("a", "digits"), published("b", "more")]
    local = [str(tmp_path / "a"), str(tmp_path / "b")]
    inputs = [url if place == "s3" else path for place, url, path in zip(places[1:], urls, local, strict=True)]
    for out in ("merged", "locally"):
        (tmp_path / out).mkdir()
    target = str(tmp_path / "merged") if places[0] == "local" else f"{urls[0]}-merged"
    prepare_shards.main(["merge", target, *inputs])
    manifest = verify_shards(target)
    assert manifest == merge_shards(tmp_path / "locally", local)
    assert manifest.num_samples == 2 * 1797
    with pytest.raises(DataError, match="must go into a directory of its own"):
        prepare_shards.main(["merge", target, *inputs])


def test_verify_and_merge_survive_a_bad_network(
    published: Callable[[str, str], str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [published("a", "digits"), published("b", "more")]
    with FaultyProxy(endpoint, failing=0.3, stalling=0.02, seed=7) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        prepare_shards.main(["merge", f"{urls[0]}-merged", *urls, "--deadline-s", "8"])
        prepare_shards.main(["verify", f"{urls[0]}-merged", "--deadline-s", "8"])
        assert sum(count for kind, count in proxy.faults.items() if kind != "none") >= 5


def test_prepare_reads_images_from_s3(tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = write_tree(tmp_path / "tree")
    url = s3.upload(endpoint, tmp_path / "tree", tmp_path.name + "/tree")
    shards = ["--resolution", "16", "--samples-per-shard", "5", "--max-bad-fraction", "0.5"]
    arguments = ["--source", "folder", *shards, "--launcher", "local"]
    prepare_shards.main([*arguments, "--input", str(tmp_path / "tree"), "--out", str(tmp_path / "local")])
    with FaultyProxy(endpoint, failing=0.1, seed=1) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        prepare_shards.main([*arguments, "--input", url, "--out", str(tmp_path / "s3"), "--deadline-s", "8"])
        assert sum(count for kind, count in proxy.faults.items() if kind != "none") >= 2
    for name in ("index.npy", "report.json", *(path.name for path in (tmp_path / "local").glob("*.tar"))):
        assert (tmp_path / "s3" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    report = json.loads((tmp_path / "s3" / "report.json").read_text())
    assert [image["name"] for image in report["skipped_images"]] == broken


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
