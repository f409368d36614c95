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
from eqm_dist.data.sources.files import find_files
from eqm_dist.errors import DataError
from tests import s3
from tests.images import pixels, png, write_idx, write_tar
from tests.s3 import FaultyProxy

LABELS = [0, 0, 1, 2, 2, 2, 4]
NAMES = ["ant", "bee", "cow", "dog", "elk"]
IMAGES = [pixels(index, 16, 16) for index in range(len(LABELS))]


Place = Callable[[Path], str]
"""From the directory in which a layout was written to where it is read: there, or on S3 after a copy."""


def folder(root: Path, place: Place = str) -> RawSource:
    for name in NAMES:
        (root / name).mkdir()
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        (root / NAMES[label] / f"{index}.png").write_bytes(png(image))
    return ImageFolder(place(root))


def tars(root: Path, place: Place = str) -> RawSource:
    for number, part in enumerate((range(4), range(4, 7))):
        write_tar(
            root / f"{number}.tar",
            {f"a/{i}.{kind}": png(IMAGES[i]) if kind == "png" else b"%d" % LABELS[i] for i in part for kind in KINDS},
        )
    return ImageTars(f"{place(root)}/*.tar")


KINDS = ("png", "cls")


def tars_with_json(root: Path, place: Place = str) -> RawSource:
    members = {}
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        members[f"{index}.json"] = json.dumps({"caption": "x", "label": label}).encode()
        members[f"{index}.png"] = png(image)
    write_tar(root / "one.tar", members)
    return ImageTars(f"{place(root)}/one.tar")


def table(images: pa.Array) -> pa.Table:
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table({"image": images, "label": pa.array(LABELS, pa.int64())}).replace_schema_metadata(metadata)


def parquet(root: Path, place: Place = str) -> RawSource:
    cells = table(pa.array([{"bytes": png(image), "path": None} for image in IMAGES]))
    pq.write_table(cells.slice(0, 5), root / "0.parquet", row_group_size=2)
    pq.write_table(cells.slice(5), root / "1.parquet")
    return ImageTable(place(root))


def arrow_stream(root: Path, place: Place = str) -> RawSource:
    cells = table(pa.array([png(image) for image in IMAGES], pa.binary()))
    with pa.OSFile(str(root / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, cells.schema) as writer:
        writer.write_table(cells, max_chunksize=3)
    return ImageTable(f"{place(root)}/x.arrow")


def arrow_file(root: Path, place: Place = str) -> RawSource:
    cells = table(pa.array([png(image) for image in IMAGES], pa.large_binary()))
    with pa.OSFile(str(root / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, cells.schema) as writer:
        writer.write_table(cells)
    return ImageTable(f"{place(root)}/**/*.arrow")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "local":
        return str
    address = request.getfixturevalue("endpoint")
    s3.use(monkeypatch, address)
    return lambda root: s3.upload(address, root, root.name)


@pytest.mark.parametrize("make", [folder, tars, tars_with_json, parquet, arrow_stream, arrow_file])
def test_every_layout_gives_the_same_images(
    tmp_path: Path, make: Callable[[Path, Place], RawSource], place: Place
) -> None:
    raw = pickle.loads(pickle.dumps(make(tmp_path, place)))  # as a worker gets it
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
def test_idx_files_give_grey_images(tmp_path: Path, packed: bool, place: Place) -> None:
    grey = np.stack([image[..., 0] for image in IMAGES])
    for name, array in {"images-idx3": grey, "labels-idx1": np.array(LABELS, np.uint8)}.items():
        file = tmp_path / f"train-{name}-ubyte"
        write_idx(file, array)
        if packed:
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    source = PreparedImages(IdxImages(place(tmp_path)), resolution=None, channels=1, num_classes=10)
    assert source.num_classes == 10
    samples = [sample for sample in source.read(0, len(source)) if isinstance(sample, LabelledImage)]
    assert [sample.label for sample in samples] == LABELS
    assert np.array_equal(np.stack([sample.image for sample in samples])[..., 0], grey)


@pytest.mark.parametrize(
    ("make", "kind"), [(folder, ImageFolder), (tars, ImageTars), (parquet, ImageTable), (arrow_stream, ImageTable)]
)
def test_a_bad_network_changes_no_image(
    make: Callable[[Path], RawSource],
    kind: Callable[..., RawSource],
    tmp_path: Path,
    endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clean = list(make(tmp_path).read(0, len(LABELS)))
    url = s3.upload(endpoint, tmp_path, tmp_path.name)
    with FaultyProxy(endpoint, failing=0.3, stalling=0.01, seed=5) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        for _ in range(3):
            assert list(kind(url, deadline_s=8).read(0, len(LABELS))) == clean
        assert sum(count for fault, count in proxy.faults.items() if fault != "none") >= 3


def test_images_in_a_tar_on_s3_take_few_requests(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {f"{i:03d}.{kind}": png(pixels(i)) if kind == "png" else b"0" for i in range(100) for kind in KINDS}
    write_tar(tmp_path / "many.tar", members)
    url = s3.upload(endpoint, tmp_path, "many")
    with FaultyProxy(endpoint) as proxy:
        s3.use(monkeypatch, proxy.endpoint)
        source = ImageTars(f"{url}/many.tar")
        assert [raw.content for raw in source.read(0, 64)] == [png(pixels(i)) for i in range(64)]
        assert proxy.requests["GET /bucket/many/many.tar"] == 2  # to scan the headers, to read the images


@pytest.mark.parametrize("place", [str, "s3"])
def test_a_location_is_a_file_a_directory_or_a_glob(
    place: Place | str, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tar", "b.tar", "b.txt", "x/c.tar", "x/y/d.tar", "z.tar/e.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    s3.use(monkeypatch, endpoint)
    root = str(tmp_path) if place is str else s3.upload(endpoint, tmp_path, "locations")
    for pattern, expected in {
        "": ["a.tar", "b.tar"],
        "/": ["a.tar", "b.tar"],
        "/a.tar": ["a.tar"],
        "/b.txt": ["b.txt"],
        "/z.tar": ["e.tar"],
        "/absent": [],
        "/absent/*.tar": [],
        "/[bc].tar": ["b.tar"],
        "/?.t*": ["a.tar", "b.tar", "b.txt"],
        "/*/*.tar": ["x/c.tar", "z.tar/e.tar"],
        "/x/*/*.tar": ["y/d.tar"],
        "/**/?.tar": ["a.tar", "b.tar", "x/c.tar", "x/y/d.tar", "z.tar/e.tar"],
    }.items():
        found, names = find_files(root + pattern, [".tar"], 5)
        assert [name for name in names if found.size(name) is not None] == expected, pattern


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
    with pytest.raises(DataError, match="local path, received the gs: URL"):
        ImageFolder("gs://bucket/tree")


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
