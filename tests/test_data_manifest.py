"""The manifest: what it refuses, in the user's words."""

import json
from pathlib import Path
from typing import Any

import pytest

from eqm_dist.data.manifest import FileRecord, Manifest, ShardRecord, read_manifest, write_manifest
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
        ({"index": {"name": "../index.npy", "bytes": 1, "sha256": "a" * 64}}, "match pattern"),
        ({"index": {"name": "/etc/passwd", "bytes": 1, "sha256": "a" * 64}}, "match pattern"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    fields = json.loads(MANIFEST.model_dump_json()) | change
    (tmp_path / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match=reason):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path)
