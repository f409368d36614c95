"""Sources: every layout gives the same images, in a fixed order, from any place."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eqm_dist.data.preprocess import PreparedImages
from eqm_dist.data.sources import IdxImages, ImageFolder, ImageTable, ImageTars, LabelledImage, RawSource
from eqm_dist.errors import DataError
from tests.images import pixels, png, write_idx, write_tar

LABELS = [0, 0, 1, 2, 2, 2, 4]
NAMES = ["ant", "bee", "cow", "dog", "elk"]
IMAGES = [pixels(index, 16, 16) for index in range(len(LABELS))]


def folder(root: Path) -> RawSource:
    for name in NAMES:
        (root / name).mkdir()
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (root / NAMES[label] / f"{index}.png").write_bytes(png(image))
    return ImageFolder(root)


def tars(root: Path) -> RawSource:
    for number, part in enumerate((range(4), range(4, 7))):
        write_tar(
            root / f"{number}.tar",
            {f"a/{i}.{kind}": png(IMAGES[i]) if kind == "png" else b"%d" % LABELS[i] for i in part for kind in KINDS},
        )
    return ImageTars(str(root / "*.tar"))


KINDS = ("png", "cls")


def tars_with_json(root: Path) -> RawSource:
    members = {}
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        members[f"{index}.json"] = json.dumps({"caption": "x", "label": label}).encode()
        members[f"{index}.png"] = png(image)
    return ImageTars(str(write_tar(root / "one.tar", members)))


def table(images: pa.Array) -> pa.Table:
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": images, "label": pa.array(LABELS, pa.int64())}).replace_schema_metadata(metadata)


def parquet(root: Path) -> RawSource:
    cells = table(pa.array([{"bytes": png(image), "path": None} for image in IMAGES]))
    pq.write_table(cells.slice(0, 5), root / "0.parquet", row_group_size=2)
    pq.write_table(cells.slice(5), root / "1.parquet")
    return ImageTable(root)


def arrow_stream(root: Path) -> RawSource:
    cells = table(pa.array([png(image) for image in IMAGES], pa.binary()))
    with pa.OSFile(str(root / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, cells.schema) as writer:
        writer.write_table(cells, max_chunksize=3)
    return ImageTable(root / "x.arrow")


def arrow_file(root: Path) -> RawSource:
    cells = table(pa.array([png(image) for image in IMAGES], pa.large_binary()))
    with pa.OSFile(str(root / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, cells.schema) as writer:
        writer.write_table(cells)
    return ImageTable(root)


@pytest.mark.parametrize("make", [folder, tars, tars_with_json, parquet, arrow_stream, arrow_file])
def test_every_layout_gives_the_same_images(tmp_path: Path, make: Callable[[Path], RawSource]) -> None:
    raw = pickle.loads(pickle.dumps(make(tmp_path)))  # as a worker gets it
    source = PreparedImages(raw, resolution=16, channels=3)
    samples = list(source.read(0, len(source)))
    assert len(source) == len(samples) == len(LABELS)
    assert source.num_classes == 5
    for sample, image, label in zip(samples, IMAGES, LABELS, strict=True):
        assert isinstance(sample, LabelledImage)
        assert sample.label == label
        assert np.array_equal(sample.image, image)  # PNG is lossless, and an image of that size stays as it is
    assert len({sample.key for sample in samples}) == len(samples)
    assert not any("." in sample.key for sample in samples)
    # From any place, and in any order.
    for start, stop in [(6, 7), (2, 5), (0, 1)]:
        assert [sample.key for sample in source.read(start, stop)] == [sample.key for sample in samples[start:stop]]
    assert source.class_names == (() if make in (tars, tars_with_json) else tuple(NAMES))
    assert "16x16" in source.id


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_give_grey_images(tmp_path: Path, packed: bool) -> None:
    grey = np.stack([image[..., 0] for image in IMAGES])
    for name, array in {"images-idx3": grey, "labels-idx1": np.array(LABELS, np.uint8)}.items():
        file = tmp_path / f"train-{name}-ubyte"
        write_idx(file, array)
        if packed:
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    source = PreparedImages(IdxImages(tmp_path), resolution=None, channels=1, num_classes=10)
    assert source.num_classes == 10
    samples = [sample for sample in source.read(0, len(source)) if isinstance(sample, LabelledImage)]
    assert [sample.label for sample in samples] == LABELS
    assert np.array_equal(np.stack([sample.image for sample in samples])[..., 0], grey)


def test_the_id_of_a_folder_changes_with_its_files(tmp_path: Path) -> None:
    before = folder(tmp_path).id
    assert ImageFolder(tmp_path).id == before
    (tmp_path / "ant" / "new.png").write_bytes(b"")
    assert ImageFolder(tmp_path).id != before


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"must be a directory, but .*/absent is none"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(DataError, match=r"must hold CLASS/NAME.jpg"):
        ImageFolder(tmp_path / "empty")
    with pytest.raises(DataError, match="nothing matches"):
        ImageTars(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match="names no Parquet or Arrow file"):
        ImageTable(tmp_path / "empty")
    with pytest.raises(DataError, match="must have the file"):
        IdxImages(tmp_path / "empty")
    with pytest.raises(DataError, match="local path, received the s3: URL"):
        ImageFolder("s3://bucket/tree")


def test_images_without_a_class_are_refused(tmp_path: Path) -> None:
    image = png(IMAGES[0])
    with pytest.raises(DataError, match=r"1 of .*/x.tar have none, b.png first"):
        ImageTars(str(write_tar(tmp_path / "x.tar", {"a.png": image, "a.cls": b"0", "b.png": image})))
    with pytest.raises(DataError, match="integer classes"):
        ImageTars(str(write_tar(tmp_path / "x.tar", {"a.png": image, "a.cls": b"cat"})))
    pq.write_table(pa.table({"image": [image, image], "label": pa.array([1, None])}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="an integer in every row, found int64 with 1 empty of 2"):
        ImageTable(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": [image], "label": [-1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"the lowest of .* is -1"):
        ImageTable(tmp_path / "x.parquet")
    with pytest.raises(DataError, match="must have the columns picture and label, found image, label"):
        ImageTable(tmp_path / "x.parquet", image_column="picture")
    with pytest.raises(DataError, match="must hold the bytes of image files, found int64"):
        ImageTable(tmp_path / "x.parquet", image_column="label")


def test_damaged_containers_are_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", {"a.png": png(IMAGES[0]), "a.cls": b"0"}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"x\.tar must be a whole tar"):
        ImageTars(str(tmp_path / "x.tar"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(DataError, match=r"x\.parquet must be a Parquet or Arrow file"):
        ImageTable(tmp_path / "x.parquet")
    write_idx(tmp_path / "a-images-idx3-ubyte", np.zeros((3, 2, 2), np.uint8))
    write_idx(tmp_path / "a-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(DataError, match=r"found 3 in .* and 2 in"):
        IdxImages(tmp_path / "a-images-idx3-ubyte")
    (tmp_path / "b-images-idx3-ubyte").write_bytes(bytes([0, 0, 13, 3]))
    write_idx(tmp_path / "b-labels-idx1-ubyte", np.zeros(2, np.uint8))
    with pytest.raises(DataError, match="begins with 00 00 0d 03 instead of 00 00 08 03"):
        IdxImages(tmp_path / "b-images-idx3-ubyte")


def test_more_classes_than_stated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_classes must be at least the 5 of folder"):
        PreparedImages(folder(tmp_path), resolution=16, channels=3, num_classes=4)
