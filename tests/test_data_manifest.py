"""The manifest: what it refuses, in the user's words."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eqm_dist.data.manifest import Description, FileRecord, Manifest, ShardRecord, read_manifest, write_manifest
from eqm_dist.errors import DataError
from eqm_dist.storage.open import open_folder

MANIFEST = Manifest(
    name="tiny",
    source="made up",
    autoencoder="identity",
    latent_scale=0.18215,
    latent_shift=0.5,
    dtype="float16",
    moments_shape=(2, 8, 32, 16),
    num_classes=3,
    label_histogram=(4, 0, 3),
    shards=(
        ShardRecord(name="tiny-000000.tar", bytes=10240, sha256="0" * 64, samples=5),
        ShardRecord(name="tiny-000001.tar", bytes=10240, sha256="1" * 64, samples=2),
    ),
    index=FileRecord(name="index.npy", bytes=212, sha256="a" * 64),
)


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(open_folder(tmp_path), MANIFEST)
    manifest = read_manifest(str(tmp_path))
    assert manifest == MANIFEST
    assert manifest.num_samples == 7
    assert manifest.latent_shape == (4, 32, 16)


def test_no_data_set_says_how_to_make_one(tmp_path: Path) -> None:
    for directory in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match=f"{directory} .*python pipelines/prepare_shards.py .*--out {directory}"):
            read_manifest(directory)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "must have version 1, but .* has version 2"),
        ({"version": None}, "must have version 1"),
        ({"surprise": 1}, "Extra inputs"),
        ({"dtype": "object"}, "'float16' or 'float32'"),
        ({"moments_shape": [3, 8, 32, 16]}, "less than or equal to 2"),
        ({"moments_shape": [2, 7, 32, 16]}, "even number of channels"),
        ({"label_histogram": [4, 0, 4]}, "must count 7 samples in 3 classes"),
        ({"label_histogram": [4, 3]}, "must count 7 samples in 3 classes"),
        ({"shards": []}, "at least 1 item"),
        ({"latent_scale": float("nan")}, "latent_scale: Input should be"),
        ({"latent_scale": float("inf")}, "latent_scale: Input should be"),
        ({"latent_scale": 0.0}, "latent_scale: Input should be greater than 0"),
        ({"latent_shift": float("nan")}, "latent_shift: Input should be"),
        ({"label_histogram": [-1, 8, 0]}, "label_histogram.0: Input should be greater than or equal to 0"),
        ({"num_classes": 10**12}, "num_classes: Input should be less than or equal to 1000000"),
        ({"moments_shape": [1, 2, 2**40, 2**40]}, "a sample must have at most 1,073,741,824 bytes"),
        ({"shards": [json.loads(MANIFEST.shards[1].model_dump_json())] * 2}, "every file must be listed once"),
        ({"index": {"name": "index.npy", "bytes": 10**30, "sha256": "a" * 64}}, "index.bytes: Input should be"),
        *(
            ({"index": {"name": name, "bytes": 1, "sha256": "a" * 64}}, "is not the name of a file in its directory")
            for name in ("../index.npy", "/etc/passwd", "..", "", ".hidden", "a\n", "pipe:cat", "\u202e", "x" * 300)
        ),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    fields = json.loads(MANIFEST.model_dump_json()) | change
    if change.get("shards"):
        fields["label_histogram"] = [4, 0, 0]
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=reason):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["ü.tar", "my shard.tar", "数据-000.tar", "-a.tar"])
def test_files_may_have_names_of_any_script(name: str) -> None:
    assert FileRecord(name=name, bytes=1, sha256="a" * 64).name == name


def test_what_no_manifest_could_say_is_refused_before_anything_is_computed() -> None:
    good = Description("x", "y", "identity", None, 1.0, 0.0, 3, ("a", "b", "c"))
    good.check()
    for change, reason in (
        ({"class_names": ("a",)}, "class_names must be 3 or none, not 1"),
        ({"num_classes": 10**12, "class_names": ()}, "Classes must be 1 to 1,000,000"),
        ({"latent_scale": float("nan")}, "latent_scale"),
        ({"name": "a/b"}, "not the name of a file"),
    ):
        with pytest.raises(DataError, match=reason):
            replace(good, **change).check()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "\x00", "null", "3", "[" * 100_000, '{"version": 1' + ', "a": {"b"' * 99_999]
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path)
