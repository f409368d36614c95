"""Sources: every layout gives the same images, in a fixed order, from any place."""

import contextlib
import gzip
import json
import logging
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eqm_dist.data.preprocess import PreparedImages
from eqm_dist.data.shards import write_shards
from eqm_dist.data.sources import IdxImages, ImageFolder, ImageTable, ImageTars, LabelledImage, RawSource
from eqm_dist.data.sources.files import find_files
from eqm_dist.errors import DataError, StorageError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from tests import s3
from tests.images import encoded, pixels, png, write_idx, write_tar
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
    with pytest.raises(DataError, match=r"must lie in .* has -1; number them from 0, or leave out what has no class"):
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


# --- which files, members and rows are images ---


def names(source: RawSource) -> list[str]:
    return [raw.name.rpartition(":")[2] for raw in source.read(0, len(source))]


def labels(source: RawSource) -> list[int]:
    return [raw.label for raw in source.read(0, len(source))]


def tar_of(tmp_path: Path, members: dict[str, bytes]) -> ImageTars:
    return ImageTars(str(write_tar(tmp_path / "x.tar", members)))


def test_a_key_in_a_tar_may_have_dots(tmp_path: Path) -> None:
    keys = ["img_a", "img_1.5", "v1.2/img.b", "Track 2.0 (x)"]
    members = {f"{key}.{kind}": png(IMAGES[0]) if kind == "png" else b"1" for key in keys for kind in KINDS}
    assert names(tar_of(tmp_path, members)) == [f"{key}.png" for key in keys]


def test_tars_take_every_kind_that_folders_take(tmp_path: Path) -> None:
    image = Image.fromarray(IMAGES[0])
    kinds = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "ppm": "PPM", "TIFF": "TIFF"}
    members = {f"{index}.{suffix}": encoded(image, kind) for index, (suffix, kind) in enumerate(kinds.items())}
    source = tar_of(tmp_path, members | {f"{index}.cls": b"0" for index in range(len(kinds))})
    samples = list(PreparedImages(source, resolution=None, channels=3).read(0, len(source)))
    assert [type(sample) for sample in samples] == [LabelledImage] * len(kinds)


@pytest.mark.parametrize("extra", ["a.png", "a.jpg", "./a.png", "a.CLS", "a.cls"])
def test_two_images_or_classes_of_one_key_are_refused(tmp_path: Path, extra: str) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": png(IMAGES[0]), "a.cls": b"0"})
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo(extra))
    with pytest.raises(DataError, match=r"one image and one class, but .*x\.tar holds two of the key a"):
        ImageTars(tmp_path / "x.tar")


def test_the_other_images_of_a_sample_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = png(IMAGES[0])
    both = {"0.png": image, "0.mask.png": image, "0.cls": b"3", "._0.png": b"", "__MACOSX/._0.png": b""}
    with caplog.at_level(logging.WARNING):
        source = tar_of(tmp_path, both)
    assert (names(source), labels(source)) == (["0.png"], [3])
    assert "Left out 1 images" in caplog.text
    assert "0.mask.png first" in caplog.text
    assert "Left out 2 hidden images" in caplog.text
    assert names(tar_of(tmp_path, {"0.image.png": image, "0.cls": b"3"})) == ["0.image.png"]
    with pytest.raises(DataError, match=r"holds 0\.a\.png and 0\.b\.png for one class; name the image 0\.png"):
        tar_of(tmp_path, {"0.a.png": image, "0.b.png": image, "0.cls": b"3"})


@pytest.mark.parametrize("text", [b"null", b"[1]", b"5", b'{"label": null}', b'{"label": "cat"}', b"no", b"[" * 10**5])
def test_json_that_has_no_class_is_no_fault_beside_one_that_has(tmp_path: Path, text: bytes) -> None:
    image = png(IMAGES[0])
    members = {"0.png": image, "0.cls": b" 2\n", "0.json": text, "info.json": text}
    assert labels(tar_of(tmp_path, members)) == [2]
    with pytest.raises(DataError, match=r"1 of .*x\.tar have none, 0\.png first"):
        tar_of(tmp_path, {"0.png": image, "0.json": text})


@pytest.mark.parametrize("label", [b"-1", b"1000000", b"99999999999999999999", b"1_0", b"1.5", b"", b"9" * 5000])
def test_a_class_must_be_one(tmp_path: Path, label: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.tar"):
        tar_of(tmp_path, {"0.png": png(IMAGES[0]), "0.cls": label})
    for value in (b"1.9", b"true", b"1e300", label or b'""'):
        with pytest.raises(DataError, match=r"x\.tar"):
            tar_of(tmp_path, {"0.png": png(IMAGES[0]), "0.json": b'{"label": %s}' % value})


def write(path: Path, content: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_hidden_files_are_neither_images_nor_classes(
    tmp_path: Path, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat/0.png", "dog/1.png", ".ipynb_checkpoints/0.png", "__MACOSX/cat/._0.png", "cat/._0.png", ".git/x"):
        write(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        source = ImageFolder(place(tmp_path))
    assert (source.class_names, names(source), labels(source)) == (("cat", "dog"), ["cat/0.png", "dog/1.png"], [0, 1])
    assert " hidden files of " in caplog.text


def test_images_beside_the_folders_of_classes_are_refused(tmp_path: Path, place: Place) -> None:
    for name in ("cat/0.png", "1.png", "2.jpg", "notes.txt"):
        write(tmp_path / name)
    with pytest.raises(DataError, match=r"2 of 3 lie directly in .*, 1\.png first; move them"):
        ImageFolder(place(tmp_path))


def test_links_to_parents_and_to_each_other_end(tmp_path: Path) -> None:
    for name in ("a/0.png", "b/1.png", "b/deep/2.png"):
        write(tmp_path / name)
    for name, target in {"a/up": "..", "b/deep/top": "../..", "b/again": "deep", "c": "a", "b/self": "self"}.items():
        (tmp_path / name).symlink_to(target)
    for depth in range(30):  # two ways into each: a billion names
        (tmp_path / "d" / f"{depth}").mkdir(parents=True)
        for way in "lr":
            (tmp_path / "d" / f"{depth}" / way).symlink_to(f"../{depth + 1}")
    write(tmp_path / "d" / "30" / "3.png")
    source = ImageFolder(tmp_path)
    assert names(source) == ["a/0.png", "b/1.png", "b/deep/2.png", "c/0.png", "d/30/3.png"]


@pytest.mark.parametrize("name", [b"caf\xe9", "été ü 图".encode(), b"a\nb", b"a [1]"])
def test_classes_of_any_name_are_prepared(tmp_path: Path, name: bytes) -> None:
    root = tmp_path / "tree [v2]"
    write(Path(os.fsdecode(os.fsencode(root) + b"/" + name + b"/" + name + b".png")), png(IMAGES[0]))
    images = PreparedImages(ImageFolder(root), resolution=8, channels=1)
    manifest = write_shards(
        tmp_path / "out", "x", images, IdentityAutoencoder(),
        samples_per_shard=4, dtype="float32", class_names=images.class_names,
    )  # fmt: skip
    assert manifest.class_names == (name.decode("utf-8", "backslashreplace"),)


def test_a_path_with_brackets_is_a_path_before_it_is_a_pattern(tmp_path: Path, place: Place) -> None:
    for name in ("a [1]/t [0].tar", "a [1]/b.tar", "a 1/c.tar"):
        write(tmp_path / name)
    root = place(tmp_path)
    for pattern, expected in {
        "/a [1]/t [0].tar": ["t [0].tar"],
        "/a [1]/*.tar": ["b.tar", "t [0].tar"],
        "/a [0-9]/c.tar": ["a 1/c.tar"],  # where there is no such path
    }.items():
        assert find_files(root + pattern, [".tar"], 5)[1] == expected, pattern


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    os.mkfifo(tmp_path / "a" / "0.png")
    (tmp_path / "a" / "1.png").symlink_to("/dev/zero")
    source = ImageFolder(tmp_path)
    for number in (0, 1):
        with pytest.raises(StorageError, match="a pipe or a device, and no file"):
            list(source.read(number, number + 1))


# --- tables ---


def write_table(path: Path, labels: pa.Array, images: pa.Array | None = None) -> Path:
    cells = images if images is not None else pa.array([png(IMAGES[0])] * len(labels), pa.binary())
    pq.write_table(pa.table({"image": cells, "label": labels}), path)
    return path


def test_integers_of_any_width_are_classes(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.int8(), pa.int32(), pa.int64(), pa.uint64())):
        write_table(tmp_path / f"{number}.parquet", pa.array([number, 0], kind))
    assert labels(ImageTable(tmp_path)) == [0, 0, 1, 0, 2, 0, 3, 0]
    for value, kind in ((2**63, pa.uint64()), (2**62, pa.int64()), (-(2**63), pa.int64()), (10**6, pa.int32())):
        write_table(tmp_path / "0.parquet", pa.array([value], kind))
        with pytest.raises(DataError, match=r"Classes must lie in \[0, 1,000,000\)"):
            ImageTable(tmp_path)


def test_empty_tables_count_for_nothing(tmp_path: Path) -> None:
    write_table(tmp_path / "0.parquet", pa.array([], pa.int64()))
    with pytest.raises(DataError, match="must have a row"):
        ImageTable(tmp_path)
    write_table(tmp_path / "1.parquet", pa.array([1]))
    assert labels(ImageTable(tmp_path)) == [1]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_cells_that_only_name_files_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    images = pa.array([{"bytes": None, "path": "0.png"}] * 2, STRUCT)
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        write_table(path, pa.array([0, 1]), images)
    else:
        write_arrow(path, pa.table({"image": images, "label": [0, 1]}))
    with pytest.raises(DataError, match="must hold the bytes of images, but its cells are empty or name files"):
        ImageTable(path)


def write_arrow(path: Path, cells: pa.Table, compression: str | None = None) -> None:
    how = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, cells.schema, options=how) as writer:
        writer.write_table(cells)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_table_is_a_table_or_a_sentence(tmp_path: Path, kind: str) -> None:
    cells = pa.table({"image": [png(image) for image in IMAGES], "label": LABELS})
    path = tmp_path / f"table.{kind}"
    with open(path, "wb") as file:
        if kind == "parquet":
            pq.write_table(cells, file)
        else:
            with pa.ipc.new_file(file, cells.schema) as writer:
                writer.write_table(cells)
    whole, random = path.read_bytes(), np.random.default_rng(1)
    assert labels(ImageTable(path)) == LABELS
    for start in random.integers(0, len(whole), 60):
        damaged = bytearray(whole)
        # Anywhere, or in the schema: it comes first in an Arrow file, and last in a Parquet file.
        at = int(start) if start % 2 else int(start) % 900
        damaged[-at if kind == "parquet" else at] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            source = ImageTable(path)
            list(source.read(0, len(source)))


def test_packed_arrow_files_are_refused(tmp_path: Path) -> None:
    cells = pa.table({"image": pa.array([b"x" * 10**6], pa.binary()), "label": [0]})
    for codec in ("zstd", "lz4"):
        write_arrow(tmp_path / "x.arrow", cells, compression=codec)
        with pytest.raises(DataError, match="its buffers are compressed"):
            ImageTable(tmp_path)


def test_an_arrow_file_whose_offsets_lead_out_of_it_is_refused(tmp_path: Path) -> None:
    """pyarrow follows them without a look, into memory that is not there."""
    write_arrow(tmp_path / "x.arrow", pa.table({"image": pa.array([b"abc", b"defg"], pa.binary()), "label": [0, 1]}))
    content = (tmp_path / "x.arrow").read_bytes()
    offsets = np.array([0, 3, 7], np.int32).tobytes()
    assert content.count(offsets) == 1
    (tmp_path / "x.arrow").write_bytes(content.replace(offsets, np.array([0, 3, 2**30], np.int32).tobytes()))
    with pytest.raises(DataError, match=r"x\.arrow must be a Parquet or Arrow file"):
        list(ImageTable(tmp_path).read(0, 2))


def test_one_picture_that_all_rows_name_takes_its_own_memory(tmp_path: Path) -> None:
    """A dictionary makes a hundred megabytes of one."""
    rows = 100
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([b"x" * 10**6], pa.binary()))
    write_table(tmp_path / "x.parquet", pa.array(np.zeros(rows, np.int64)), images.cast(pa.binary()))
    before = pa.total_allocated_bytes()
    del images
    source = ImageTable(tmp_path)
    for raw in source.read(0, 5):
        assert len(raw.content) == 10**6
        assert pa.total_allocated_bytes() - before < 20 * 10**6


# --- IDX ---


def test_a_packed_idx_file_takes_the_memory_that_its_header_says(tmp_path: Path) -> None:
    write_idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(2, np.uint8))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    bomb = bytes([0, 0, 8, 3]) + np.array([2, 2, 2], ">u4").tobytes() + bytes(100 * 10**6)
    path.write_bytes(gzip.compress(bomb, 1))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="must be a whole IDX file"):
            IdxImages(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
    finally:
        tracemalloc.stop()
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + np.array([2**31, 2**31, 9], ">u4").tobytes()))
    with pytest.raises(DataError, match="bytes by its header, more than 4,294,967,296"):
        IdxImages(tmp_path)


def test_more_classes_than_stated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_classes must be at least the 5 of folder"):
        PreparedImages(folder(tmp_path), resolution=16, channels=3, num_classes=4)
