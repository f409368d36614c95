"""Sets of images from every kind of place: the same pixels from each, whatever is read at once."""

import io
import pickle
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqm_dist.data.image_set import open_image_set
from eqm_dist.errors import ConfigError, DataError, StorageError
from eqm_dist.evaluate.images import Images, open_images
from tests import images as pictures
from tests import s3, tiny


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 6, 5, 3), dtype=np.uint8)


def read(images: Images, batch: int = 4) -> np.ndarray:
    return torch.cat(list(images.read(0, len(images), batch))).numpy()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, pixels: np.ndarray) -> dict[str, str]:
    root = tmp_path_factory.mktemp("images")
    (root / "folder" / "deep").mkdir(parents=True)
    members: dict[str, bytes] = {}
    for index, image in enumerate(pixels):
        file = root / "folder" / ("deep" if index < 4 else "") / f"img{index:02d}.png"  # deep/ sorts before img
        Image.fromarray(image).save(file)
        members[f"{index:02d}.png"] = file.read_bytes()
        members[f"{index:02d}.txt"] = b"a caption"
    (root / "folder" / "notes.txt").write_text("no image")
    (root / "tars").mkdir()
    names = list(members)
    pictures.write_tar(root / "tars" / "0.tar", {name: members[name] for name in names[:10]})
    pictures.write_tar(root / "tars" / "1.tar", {name: members[name] for name in names[10:]})
    np.savez(root / "plain.npz", pixels)
    np.savez_compressed(root / "packed.npz", arr_0=pixels, arr_1=np.arange(11))
    return {
        "folder": str(root / "folder"),
        "tars": str(root / "tars"),
        "glob": str(root / "tars" / "*.tar"),
        "plain": str(root / "plain.npz"),
        "packed": str(root / "packed.npz"),
    }


@pytest.mark.parametrize("kind", ["folder", "tars", "glob", "plain", "packed"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_place_gives_the_same_pixels(places: dict[str, str], pixels: np.ndarray, kind: str, batch: int) -> None:
    images = open_images(places[kind])
    assert len(images) == 11
    np.testing.assert_array_equal(read(images, batch), pixels)
    copy = pickle.loads(pickle.dumps(images))  # as an actor gets it
    np.testing.assert_array_equal(torch.cat(list(copy.read(3, 8, batch))).numpy(), pixels[3:8])


@pytest.mark.parametrize("kind", ["png", "tar", "npz"])
def test_what_sample_writes_is_read(tmp_path: Path, pixels: np.ndarray, kind: str) -> None:
    written = open_image_set(tmp_path / "set", {"seed": 0}, kind, 11, 4)  # pyright: ignore[reportArgumentType]
    for unit in written.units():
        count = unit.stop - unit.start
        one = np.ones(count, np.int64)
        facts = {"label": 0 * one, "nfe": one, "complete": one > 0, "finite": one > 0}
        written.write(unit, pixels[unit.start : unit.stop], facts, "fp32")
    written.finish({})
    for picture in ("grid.png", "nfe.png"):  # as the command leaves them
        Image.new("RGB", (50, 50)).save(tmp_path / "set" / picture)
    np.testing.assert_array_equal(read(open_images(str(tmp_path / "set"))), pixels)


def test_shards_give_their_images(shards: Path) -> None:
    images = open_images(str(shards))
    expected = np.stack([sample.image for sample in tiny.Blots().read(0, 48)])
    np.testing.assert_array_equal(read(images, 7), expected)
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(torch.cat(list(copy.read(40, 48, 3))).numpy(), expected[40:])


@pytest.mark.parametrize("kind", ["folder", "tars", "plain"])
def test_the_content_decides_the_identity(tmp_path: Path, places: dict[str, str], kind: str) -> None:
    source, moved = Path(places[kind]), tmp_path / f"moved{Path(places[kind]).suffix}"
    (shutil.copytree if source.is_dir() else shutil.copy)(source, moved)
    identity = open_images(str(moved)).content_id()
    assert identity == open_images(places[kind]).content_id()
    if kind == "plain":
        array = np.load(moved)["arr_0"]
        array[5, 0, 0, 0] ^= 1
        np.savez(moved, array)
    else:
        file = next(moved.rglob("*.png" if kind == "folder" else "*.tar"))
        content = bytearray(file.read_bytes())
        content[600 if kind == "tars" else -20] ^= 1  # within the first picture
        file.write_bytes(content)
    assert open_images(str(moved)).content_id() != identity


def test_how_files_are_read_is_part_of_the_identity(places: dict[str, str]) -> None:
    whole, grey, cropped = (
        open_images(places["folder"], **how) for how in ({}, {"channels": 1}, {"channels": 3, "resolution": 5})
    )
    assert len({images.content_id() for images in (whole, grey, cropped)}) == 3
    assert read(grey).shape == (11, 6, 5, 1)
    assert read(cropped).shape == (11, 5, 5, 3)


def test_bad_images_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (9, 7)).save(folder / "b.png")
    with pytest.raises(DataError, match=r"one size, and .*mixed holds 8x8 and 9x7; give a resolution"):
        read(open_images(str(folder)))
    assert read(open_images(str(folder), resolution=6)).shape == (2, 6, 6, 3)
    (folder / "b.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"b\.png of .*mixed cannot be decoded"):
        read(open_images(str(folder)))


def test_hidden_copies_and_shadows_are_no_images(places: dict[str, str], pixels: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(places["folder"], folder)
    some = (folder / "img05.png").read_bytes()
    for name in (".ipynb_checkpoints/a.png", "__MACOSX/deep/._a.png", "._img05.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(some)
    (folder / "up").symlink_to("..")
    (folder / "here").symlink_to(".")
    assert len(open_images(str(folder))) == 11
    tar = pictures.write_tar(tmp_path / "x.tar", {"._0.png": b"", "0.png": some, "__MACOSX/0.png": some})
    assert len(open_images(str(tar))) == 1


def test_a_picture_of_ones_own_counts_whatever_its_name(tmp_path: Path) -> None:
    for name in ("grid.png", "nfe.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert len(open_images(str(tmp_path))) == 3
    (tmp_path / "settings.json").write_text('{"a program": "of others"}')
    assert len(open_images(str(tmp_path))) == 3


def test_a_set_that_is_not_finished_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    written = open_image_set(tmp_path / "set", {"seed": 0}, "png", 11, 4)
    one = np.ones(4, np.int64)
    facts = {"label": 0 * one, "nfe": one, "complete": one > 0, "finite": one > 0}
    written.write(written.units()[0], pixels[:4], facts, "fp32")
    with pytest.raises(DataError, match=r"begun and not finished; run it again"):
        open_images(str(tmp_path / "set"))


def test_a_location_of_several_kinds_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "both"
    shutil.copytree(places["folder"], folder)
    shutil.copy(Path(places["tars"]) / "0.tar", folder)
    with pytest.raises(DataError, match=r"holds 1 tars and 11 image files; name the file, or move the others"):
        open_images(str(folder))
    assert len(open_images(str(folder / "0.tar"))) == 5
    shutil.copy(places["plain"], folder / "samples.npz")
    (folder / "0.tar").unlink()
    with pytest.raises(DataError, match=r"holds a samples\.npz and 11 image files"):
        open_images(str(folder))


def test_a_path_with_brackets_is_read(places: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "a [1]" / "tars [v2]"
    shutil.copytree(places["tars"], folder)
    (folder / "0.tar").rename(folder / "t [0].tar")
    assert len(open_images(str(folder))) == 11
    assert len(open_images(str(folder / "t [0].tar"))) == 5
    assert len(open_images(str(folder / "*.tar"))) == 11
    shutil.copytree(places["folder"], tmp_path / "in [v2]")
    assert len(open_images(str(tmp_path / "in [v2]" / "*.png"))) == 7
    shutil.copy(folder / "1.tar", tmp_path / "in [v2]")
    with pytest.raises(DataError, match="holds 1 tars and 7 image files"):
        open_images(str(tmp_path / "in [v2]" / "*"))


@pytest.mark.parametrize("part", [(0, 2), (1, 2), (0, 1)])
def test_sizes_are_compared_with_the_first_image_of_all(tmp_path: Path, part: tuple[int, int]) -> None:
    """Whatever the batches, and whichever part an actor reads."""
    for number, size in enumerate([(8, 8), (9, 7)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    images = open_images(str(tmp_path))
    if part == (0, 1):
        assert len(list(images.read(*part, 1))) == 1
        return
    with pytest.raises(DataError, match=r"one size, and .* holds 8x8 and 9x7"):
        list(images.read(*part, 1))


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        ((4, 3, 8, 8), r"of which C is 1 or 3; transpose it with images\.transpose\(0, 2, 3, 1\)"),
        ((4, 1, 8, 8), r"transpose it with"),
        ((4, 8, 8, 4), "of which C is 1 or 3; convert it"),
        ((0, 8, 8, 3), "with images of 1 to 16,777,216 pixels"),
        ((4, 0, 8, 3), "with images of 1 to 16,777,216 pixels"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, shape: tuple[int, ...], remedy: str) -> None:
    np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
    with pytest.raises(DataError, match=remedy):
        open_images(str(tmp_path / "x.npz"))


def test_an_array_that_says_more_than_it_holds_takes_no_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 4096, 4096, 3)}
    )
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    images = open_images(str(tmp_path / "x.npz"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"whole \.npz .*ends before image 64"):
            list(images.read(0, 64, 64))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_that_python_cannot_unpack_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    np.savez(tmp_path / "x.npz", pixels)
    content = (tmp_path / "x.npz").read_bytes()
    for at, value in ((8, b"\x63"), (6, b"\x01")):  # an unknown compression; encrypted
        damaged = bytearray(content)
        damaged[at : at + 1] = value
        central = content.index(b"PK\x01\x02")
        damaged[central + at + 2 : central + at + 3] = value
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"whole \.npz"):
            open_images(str(tmp_path / "x.npz"))


def test_what_holds_no_images_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    (tmp_path / "empty").mkdir()
    for location in (tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(DataError, match="holds none; correct the path"):
            open_images(str(location))
    np.savez(tmp_path / "other.npz", images=pixels)
    np.savez(tmp_path / "floats.npz", pixels.astype(np.float32))
    np.savez(tmp_path / "objects.npz", np.array([{}, []], dtype=object))
    (tmp_path / "text.npz").write_text("no zip")
    for name, reason in (
        ("other", "with the array arr_0"),
        ("floats", r"uint8 \[N, H, W, C\], and is float32 \[11, 6, 5, 3\]"),
        ("objects", r"uint8 \[N, H, W, C\], and is object \[2\]"),
        ("text", "whole .npz"),
    ):
        with pytest.raises(DataError, match=reason):
            open_images(str(tmp_path / f"{name}.npz"))
    with pytest.raises(StorageError, match=r"absent\.npz: No such file"):
        open_images(str(tmp_path / "absent.npz"))


def test_a_damaged_npz_is_refused(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, pixels)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"whole \.npz"):
        read(open_images(str(path)))


def test_a_resolution_is_for_files_and_tars(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plain\.npz holds arrays of 5x6"):
        open_images(places["plain"], resolution=4)
    np.savez(tmp_path / "square.npz", np.zeros((2, 4, 4, 3), np.uint8))
    assert len(open_images(str(tmp_path / "square.npz"), resolution=4)) == 2


def test_images_on_s3_are_those_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, shards: Path, places: dict[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache goes
    s3.use(monkeypatch, endpoint)
    for local, name in ((shards, "blots"), (Path(places["tars"]), "tars")):
        ours, remote = open_images(str(local)), open_images(s3.upload(endpoint, local, name))
        np.testing.assert_array_equal(read(remote), read(ours))
        assert remote.content_id() == ours.content_id()
