"""Sets of images on disk: every format reads back, and a set is of one kind."""

import gc
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from webdataset.compat import WebDataset

from eqm_dist.data.image_set import FORMATS, Format, ImageSet, open_image_set
from eqm_dist.errors import ConfigError, DataError

SETTINGS = {"seed": 3, "sampler": {"name": "gd"}}


def images_of(channels: int, count: int = 7) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 5, 4, channels), dtype=np.uint8)


def facts_of(numbers: np.ndarray) -> dict[str, np.ndarray]:
    return {"label": numbers % 3, "nfe": numbers + 10, "complete": numbers != 2, "finite": numbers < 4}


def fill(images: ImageSet, pixels: np.ndarray) -> None:
    for unit in images.missing():
        numbers = np.arange(unit.start, unit.stop)
        images.write(unit, pixels[unit.start : unit.stop], facts_of(numbers), "fp32")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_written_reads_back(tmp_path: Path, format: Format, channels: int) -> None:
    pixels = images_of(channels)
    images = open_image_set(tmp_path / "out", SETTINGS, format, count=7, unit=3)
    fill(images, pixels)
    record = images.finish({"a": 1})
    assert record["nfe"] == {"mean": 13.0, "min": 10, "max": 16}
    assert record["label_histogram"] == [3, 2, 2]
    assert np.array_equal(np.stack(list(images.read(7))), pixels)
    assert len(list(images.read(2))) == 2
    lines = (tmp_path / "out" / "samples.csv").read_text().splitlines()
    assert lines[:4] == ["index,label,nfe,complete,finite", "0,0,10,1,1", "1,1,11,1,1", "2,2,12,0,1"]
    assert (record["cut_off"], record["not_finite"]) == (1, 3)
    assert images.nfe() == list(range(10, 17))
    assert json.loads((tmp_path / "out" / "samples.json").read_bytes())["a"] == 1
    again = open_image_set(tmp_path / "out", SETTINGS, format, count=7, unit=5)
    assert again.complete()
    assert again.missing() == []


def test_the_npz_is_the_one_of_adm(tmp_path: Path) -> None:
    pixels = images_of(3)
    images = open_image_set(tmp_path, SETTINGS, "npz", count=7, unit=2)
    fill(images, pixels)
    images.finish({})
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], pixels)
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_stock_webdataset_reads_the_tars(tmp_path: Path) -> None:
    pixels = images_of(3)
    images = open_image_set(tmp_path, SETTINGS, "tar", count=7, unit=4)
    fill(images, pixels)
    images.finish({})
    tars = sorted(str(path) for path in tmp_path.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        read = list(cast("Iterable[dict[str, Any]]", WebDataset(tars, shardshuffle=False).decode("rgb8")))
        gc.collect()
    assert [sample["__key__"] for sample in read] == [f"{i:06d}" for i in range(7)]
    assert [sample["cls"] for sample in read] == [0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal(np.stack([sample["png"] for sample in read]), pixels)


def test_a_set_that_was_begun_keeps_its_units_and_its_settings(tmp_path: Path) -> None:
    first = open_image_set(tmp_path, SETTINGS, "png", count=7, unit=3)
    unit = first.units()[1]
    first.write(unit, images_of(1)[3:6], facts_of(np.arange(3, 6)), "fp32")
    again = open_image_set(tmp_path, SETTINGS, "png", count=7, unit=100)
    assert [unit.number for unit in again.missing()] == [0, 2]
    with pytest.raises(ConfigError, match="was begun with seed 3, and now it is 4; keep it, or choose another --out"):
        open_image_set(tmp_path, {**SETTINGS, "seed": 4}, "png", count=7, unit=3)
    with pytest.raises(ConfigError, match="was begun with samples 7, and now it is 8"):
        open_image_set(tmp_path, SETTINGS, "png", count=8, unit=3)


def test_the_record_names_every_precision_that_units_were_drawn_in(tmp_path: Path) -> None:
    images = open_image_set(tmp_path, SETTINGS, "png", count=6, unit=3)
    for unit, precision in zip(images.units(), ("fp32", "bf16"), strict=True):  # killed on a GPU, gone on without
        images.write(unit, images_of(1)[:3], facts_of(np.arange(unit.start, unit.stop)), precision)
    assert images.finish({})["precision"] == "bf16 and fp32"


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="must be a new or an empty directory"):
        open_image_set(tmp_path, SETTINGS, "png", count=7, unit=3)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "content", [b"{", b"null", b"[" * 100_000, b'{"unit": 0}', b'{"unit": "7"}', b"{}", b" " * (64 << 20) + b"{}"]
)
def test_damaged_settings_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(DataError, match=r"settings.json is damaged .*; delete its directory to start over"):
        open_image_set(tmp_path, SETTINGS, "png", count=7, unit=3)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"[" * 100_000, b'{"facts": []}', b'{"precision": 1}']
    + [b'{"facts": {"label": %s}}' % label for label in (b"1", b"[]", b'["0"]')],
)
def test_a_damaged_record_of_a_unit_is_refused(content: bytes, tmp_path: Path) -> None:
    images = open_image_set(tmp_path, SETTINGS, "png", count=7, unit=3)
    fill(images, images_of(1))
    record = tmp_path / ".units" / "00001.json"
    good = json.loads(record.read_bytes())
    if content.startswith(b"{"):
        bad = json.loads(content)
        if isinstance(bad.get("facts"), dict):
            bad["facts"] = {**good["facts"], **bad["facts"]}
        content = json.dumps({**good, **bad}).encode()
    record.write_bytes(content)
    with pytest.raises(DataError, match=r"00001.json is damaged .*; delete it and run the same command again"):
        images.finish({})


def test_a_damaged_table_of_facts_is_refused(tmp_path: Path) -> None:
    images = open_image_set(tmp_path, SETTINGS, "png", count=7, unit=3)
    fill(images, images_of(1))
    images.finish({})
    for content in ("index,nfe\n0,x\n", "index\n0\n", "index,nfe\n0\n"):
        (tmp_path / "samples.csv").write_text(content)
        with pytest.raises(DataError, match=r"samples.csv is damaged"):
            images.nfe()
