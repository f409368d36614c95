"""Shards: what they hold, who can read them, and that no accident while writing changes them."""

import gc
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from eqm_dist.data.assemble import index_directory
from eqm_dist.data.index import index_shard
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.manifest import Manifest, read_manifest
from eqm_dist.data.shards import digits_shards, write_shards
from eqm_dist.data.sources import Digits, LabelledImage, SkippedImage
from eqm_dist.data.verify import verify_shards
from eqm_dist.errors import DataError, StorageError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.storage.folder import LocalFolder
from tests.disk import no_file_larger_than
from tests.processes import forked


class Stripes:
    """150 images [4, 6, 3] of random pixels, in ``delay_s`` a range; ``log`` gets a line for each range read."""

    id = "stripes"
    num_classes = 7

    def __init__(self, delay_s: float = 0.0, log: Path | None = None) -> None:
        self._delay_s = delay_s
        self._log = log

    def __len__(self) -> int:
        return 150

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        time.sleep(self._delay_s)
        if self._log is not None:
            with self._log.open("a") as log:
                log.write(f"{start} to {stop}\n")
        for index in range(start, stop):
            image = np.random.default_rng(index).integers(0, 256, (4, 6, 3), dtype=np.uint8)
            yield LabelledImage(f"folder/{index:04d}", image, index * index % 7)


class GaussianAutoencoder:
    """Half the size in both directions, with a posterior that is not a point."""

    id = "gaussian"
    latent_channels: int | None = None
    location: str | None = None
    latent_scale = 0.18215
    latent_shift = 0.25

    def encode(self, images: Tensor) -> Tensor:
        mean = images.permute(0, 3, 1, 2)[:, :, ::2, ::2].to(torch.float32) / 100
        return torch.cat([mean, -1 - mean], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def write_stripes(directory: Path, delay_s: float = 0.0, log: Path | None = None) -> None:
    source = Stripes(delay_s, log)
    write_shards(
        directory, "stripes", source, IdentityAutoencoder(), samples_per_shard=40, dtype="float16", mirror=True
    )


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def read_with_webdataset(directory: Path) -> list[dict[str, Any]]:
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(cast("Iterable[dict[str, Any]]", WebDataset(urls, shardshuffle=False).decode()))
        gc.collect()
    return samples


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("digits")
    digits_shards(directory)
    return directory


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stripes")
    write_stripes(directory)
    return directory


def test_digits_are_scikit_learns(digits: Path) -> None:
    levels, labels = load_digits(return_X_y=True)
    pixels = np.stack([sample.image for sample in Digits().read(0, len(Digits()))]).reshape(-1, 64)
    assert len(Digits()) == len(levels) == 1797
    assert np.array_equal(np.rint(pixels * (16 / 255)), levels)
    assert np.unique(pixels[levels == 8]).tolist() == [128]
    assert np.unique(pixels[levels == 16]).tolist() == [255]

    manifest = read_manifest(digits)
    assert manifest.label_histogram == tuple(np.bincount(labels))
    assert [shard.samples for shard in manifest.shards] == [256] * 7 + [5]
    assert manifest.moments_shape == (1, 2, 8, 8)
    assert manifest.latent_shape == (1, 8, 8)


def test_stock_webdataset_reads_the_digits(digits: Path) -> None:
    samples = read_with_webdataset(digits)
    expected = IdentityAutoencoder().encode(torch.from_numpy(np.stack([s.image for s in Digits().read(0, 1797)])))
    assert torch.equal(torch.from_numpy(np.stack([sample["moments.npy"] for sample in samples]))[:, 0], expected)
    assert [sample["cls"] for sample in samples] == load_digits(return_X_y=True)[1].tolist()
    assert [sample["__key__"] for sample in samples] == [f"{index:06d}" for index in range(1797)]


def test_the_mirror_is_flipped_before_encoding(tmp_path: Path) -> None:
    encoder = GaussianAutoencoder()
    manifest = write_shards(tmp_path, "x", Stripes(), encoder, samples_per_shard=99, dtype="float32", mirror=True)
    assert manifest.moments_shape == (2, 6, 2, 3)
    assert (manifest.autoencoder, manifest.latent_scale, manifest.latent_shift) == ("gaussian", 0.18215, 0.25)
    for sample, image in zip(read_with_webdataset(tmp_path), Stripes().read(0, 150), strict=True):
        views = torch.from_numpy(np.stack([image.image, image.image[:, ::-1]]))
        assert torch.equal(torch.from_numpy(sample["moments.npy"]), encoder.encode(views))
        assert sample["__key__"] == image.key
        assert sample["cls"] == image.label


def test_the_bytes_depend_on_nothing_but_the_request(stripes: Path, tmp_path: Path) -> None:
    write_stripes(tmp_path)
    assert contents(tmp_path) == contents(stripes)
    assert verify_shards(tmp_path).num_samples == 150


def test_asking_again_touches_nothing(tmp_path: Path) -> None:
    write_stripes(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write_stripes(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_missing_files_are_written_again(stripes: Path, tmp_path: Path) -> None:
    for missing in ("stripes-000001.tar", "index.npy", "manifest.json"):
        write_stripes(tmp_path)
        (tmp_path / missing).unlink()
        write_stripes(tmp_path)
        assert contents(tmp_path) == contents(stripes)


def test_a_new_manifest_does_not_vouch_for_a_changed_shard(tmp_path: Path) -> None:
    write_stripes(tmp_path)
    (tmp_path / "stripes-000001.tar").unlink()
    flip_a_bit(tmp_path / "stripes-000002.tar")
    with pytest.raises(DataError, match=r"stripes-000002.tar must have the sha256"):
        write_stripes(tmp_path)


def test_a_directory_belongs_to_one_data_set(stripes: Path, tmp_path: Path) -> None:
    before = contents(stripes)
    with pytest.raises(DataError, match=r"holds another, with name='stripes', not 'digits'.*samples=150, not 1797"):
        digits_shards(stripes)
    assert contents(stripes) == before

    (tmp_path / "photos-000000.tar").write_bytes(b"not ours")
    with pytest.raises(DataError, match=f"but {tmp_path} holds tars"):
        digits_shards(tmp_path)
    assert (tmp_path / "photos-000000.tar").read_bytes() == b"not ours"

    (stripes / "preparation.json").rename(tmp_path / "preparation.json")
    try:
        with pytest.raises(DataError, match="holds another"):
            write_stripes(stripes)
    finally:
        (tmp_path / "preparation.json").rename(stripes / "preparation.json")


def test_moments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    class Loud(GaussianAutoencoder):
        def encode(self, images: Tensor) -> Tensor:
            moments = super().encode(images)
            moments[3, 0] = 1e5  # beyond float16's 65,504
            return moments

    with pytest.raises(DataError, match="finite in float16, but those of folder/0003 are not"):
        write_shards(tmp_path / "a", "x", Stripes(), Loud(), samples_per_shard=99, dtype="float16")
    write_shards(tmp_path / "b", "x", Stripes(), Loud(), samples_per_shard=99, dtype="float32")


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="samples_per_shard must be at least 1, received 0"):
        write_shards(tmp_path, "x", Stripes(), IdentityAutoencoder(), samples_per_shard=0, dtype="float32")

    class Mislabelled(Stripes):
        num_classes = 3

    with pytest.raises(DataError, match=r"Labels must lie in \[0, 3\), found 0 to 4"):
        write_shards(tmp_path, "x", Mislabelled(), IdentityAutoencoder(), samples_per_shard=99, dtype="float32")


# --- accidents ---


def die_at_event(directory: Path, fatal: int) -> None:
    """Write, and die of SIGKILL just before the ``fatal``-th file is opened for writing or renamed."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "os.rename" or (event == "open" and str(directory) in str(arguments[0]) and arguments[1] != "rb"):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    write_stripes(directory)


def test_a_writer_killed_between_any_two_operations_loses_and_repeats_nothing(stripes: Path, tmp_path: Path) -> None:
    expected = contents(stripes)
    fatal, exit_code = 0, -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        fatal += 1
        directory = tmp_path / str(fatal)
        child = forked().Process(target=die_at_event, args=(directory, fatal))
        child.start()
        child.join()
        exit_code = child.exitcode
        finished = {path: path.stat().st_mtime_ns for path in directory.glob("*.tar")}
        if exit_code == -signal.SIGKILL and not (directory / "manifest.json").exists():
            with pytest.raises(DataError):
                read_manifest(directory)
        write_stripes(directory)
        assert contents(directory) == expected
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert exit_code == 0
    # The request, 4 shards, the index, the manifest: each opened and renamed; and the lock.
    assert fatal - 1 >= 15


def test_a_writer_killed_again_and_again_at_random_gets_there(stripes: Path, tmp_path: Path) -> None:
    moments = random.Random(0)
    kills = 0
    while not (tmp_path / "manifest.json").exists():
        child = forked().Process(target=write_stripes, args=(tmp_path, 0.03))
        child.start()
        child.join(0.2 * moments.random() * (1 + kills))  # longer each time, so that a slow machine gets there too
        if child.exitcode is None:
            child.kill()
            kills += 1
        child.join()
    write_stripes(tmp_path)
    assert contents(tmp_path) == contents(stripes)
    assert kills > 0


def die_while_writing(directory: Path, limit: int) -> None:
    """Write, and be killed by the kernel in the middle of the first file that grows beyond ``limit`` bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    write_stripes(directory)


@pytest.mark.parametrize(("limit", "victim"), [(100, "preparation.json"), (30_000, "stripes-000000.tar")])
def test_a_writer_killed_in_the_middle_of_a_file_leaves_no_half_file(
    stripes: Path, tmp_path: Path, limit: int, victim: str
) -> None:
    child = forked().Process(target=die_while_writing, args=(tmp_path, limit))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGXFSZ
    [leftover] = tmp_path.glob(f".{victim}.*")
    assert leftover.stat().st_size == limit
    assert not (tmp_path / victim).exists()
    write_stripes(tmp_path)
    assert contents(tmp_path) == contents(stripes)


def test_several_processes_may_ask_at_once_and_one_does_the_work(stripes: Path, tmp_path: Path) -> None:
    directory, log = tmp_path / "stripes", tmp_path / "log"
    children = [forked().Process(target=write_stripes, args=(directory, 0.05, log)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert log.read_text().splitlines() == ["0 to 40", "40 to 80", "80 to 120", "120 to 150"]
    assert contents(directory) == contents(stripes)


def test_a_full_disk_is_named_and_what_was_written_stays(stripes: Path, tmp_path: Path) -> None:
    too_large = pytest.raises(StorageError, match=r"Cannot write .*stripes-000000.tar: .*free space")
    with no_file_larger_than(60_000), too_large:  # enough for the last shard alone
        write_stripes(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "preparation.json"}
    write_stripes(tmp_path)
    assert contents(tmp_path) == contents(stripes)


def test_a_truncated_shard_found_while_preparing_is_named(tmp_path: Path) -> None:
    write_stripes(tmp_path)
    (tmp_path / "manifest.json").unlink()
    shard = tmp_path / "stripes-000001.tar"
    whole = shard.read_bytes()
    for size in (0, 300, 20_000, 20_480, 40_960):
        shard.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"stripes-000001.tar .*delete it and prepare the data set again"):
            write_stripes(tmp_path)
    shard.write_bytes(whole)
    write_stripes(tmp_path)


# --- images that change ---


class Gallery:
    """Ten images in files, one of which may be broken: what PreparedImages is, without decoding."""

    id = "gallery"
    num_classes = 1

    def __init__(self, root: Path) -> None:
        self._root = root
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 10

    def read(self, start: int, stop: int) -> Iterator[LabelledImage | SkippedImage]:
        for number in range(start, stop):
            self.reads.append(number)
            content = (self._root / str(number)).read_bytes()
            stored = hashlib.sha256(content).hexdigest()
            if content == b"broken":
                yield SkippedImage(f"{number:08d}", str(number), "it is broken", stored)
            else:
                yield LabelledImage(f"{number:08d}", np.full((2, 2, 1), content[0], np.uint8), 0, stored)

    def versions(self) -> list[str]:
        return list(LocalFolder(self._root).versions(list(map(str, range(10)))))

    def stored(self, start: int, stop: int) -> Iterator[str]:
        return (hashlib.sha256((self._root / str(number)).read_bytes()).hexdigest() for number in range(start, stop))


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    root = tmp_path / "gallery"
    root.mkdir()
    for number in range(10):
        (root / str(number)).write_bytes(bytes([number]))
    return root


def hang(root: Path, out: Path, **options: Any) -> list[int]:
    """Prepare the gallery; returns which images were read."""
    source = Gallery(root)
    write_shards(out, "x", source, IdentityAutoencoder(), samples_per_shard=2, dtype="float32", **options)
    return source.reads


def shown(out: Path) -> list[int]:
    reader = ShardReader(out)
    moments, _ = reader.read(np.arange(reader.manifest.num_samples))
    return IdentityAutoencoder().decode(moments[:, 0, :1])[:, 0, 0, 0].tolist()


def test_a_repaired_image_is_added_when_the_command_is_given_again(gallery: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (gallery / "5").write_bytes(b"broken")
    with pytest.raises(DataError, match="At most 0 of 10 images may be broken, but 1 are"):
        hang(gallery, out)
    (gallery / "5").write_bytes(b"\x05")
    assert hang(gallery, out) == [4, 5, 6, 7, 8, 9]  # its shard, and those that were to come
    assert shown(out) == list(range(10))


def test_a_repaired_image_is_added_to_a_finished_data_set(gallery: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (gallery / "5").write_bytes(b"broken")
    hang(gallery, out, max_bad_fraction=0.5)
    before = contents(out)
    assert hang(gallery, out) == [5]
    assert contents(out) == before
    (gallery / "5").write_bytes(b"\x05")
    hang(gallery, out)
    assert shown(out) == list(range(10))
    assert json.loads((out / "report.json").read_bytes())["skipped"] == 0
    changed = {name for name, digest in contents(out).items() if before[name] != digest}
    assert changed == {".source", "index.npy", "manifest.json", "report.json", "x-000002.tar"}
    verify_shards(out)


def test_images_that_were_replaced_under_their_names_are_encoded_anew(gallery: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hang(gallery, out)
    assert hang(gallery, out) == []
    (gallery / "3").write_bytes(b"\x63")  # of the same size
    os.utime(gallery / "3", ns=(1, 1))
    assert hang(gallery, out) == [2, 3]
    assert shown(out) == [0, 1, 2, 99, *range(4, 10)]
    verify_shards(out)


def test_the_same_images_with_other_times_are_encoded_once(gallery: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hang(gallery, out)
    before = contents(out)
    for number in range(10):
        os.utime(gallery / str(number), ns=(number, number))
    assert hang(gallery, out) == []
    assert {name for name, digest in contents(out).items() if before[name] != digest} == {".source"}


def test_sizes_are_compared_between_batches_and_shards(tmp_path: Path) -> None:
    class Growing(Stripes):
        def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
            for index in range(start, stop):
                side = 4 if index < 70 else 6
                yield LabelledImage(f"{index:04d}", np.zeros((side, side, 3), np.uint8), 0)

    for samples, reason in ((150, "0000 has .* and 0070"), (70, "give moments .* give --resolution and a new --out")):
        with pytest.raises(DataError, match=rf"All images must have one size, but .*{reason}"):
            write_shards(
                tmp_path / str(samples),
                "x",
                Growing(),
                IdentityAutoencoder(),
                samples_per_shard=samples,
                dtype="float32",
            )


# --- tars of others ---


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


ARRAY = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)


def test_the_index_points_at_the_arrays_of_any_plain_tar(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file, TarWriter(file) as tar:
        for index in range(5):
            long = {"caption": "word " * 200 * index}
            tar.write({"__key__": f"{'deep/' * 30}{index}", "moments.npy": ARRAY + index, "cls": index, "json": long})
    found = index_shard(path)
    assert found.moments_shape == (1, 2, 2, 2)
    assert found.records["label"].tolist() == list(range(5))
    content = path.read_bytes()
    for index, offset in enumerate(found.records["offset"].tolist()):
        assert content[offset : offset + 32] == (ARRAY + index).tobytes()


@pytest.mark.parametrize(
    "members",
    [
        [],
        [("a.moments.npy", npy(ARRAY))],
        [("a.cls", b"1")],
        [("a.moments.npy", npy(ARRAY)), ("b.cls", b"1")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"cat")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1"), ("b.moments.npy", npy(ARRAY[..., :1])), ("b.cls", b"1")],
        [("a.moments.npy", npy(ARRAY[0])), ("a.cls", b"1")],
        [("a.moments.npy", npy(np.asfortranarray(ARRAY))), ("a.cls", b"1")],
        [("a.moments.npy", b"\x80\x04N."), ("a.cls", b"1")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1"), ("a.moments.npy", npy(ARRAY))],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1"), ("a.cls", b"1")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"-1")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"2147483646")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1_0")],
        [("a.moments.npy", npy(ARRAY)[:-4]), ("a.cls", b"1")],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1"), ("__skipped__", b"[" * 100_000)],
        [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1"), ("__skipped__", b'[{"key": 1, "name": [], "reason": {}}]')],
    ],
    ids=[
        "empty", "no class", "no moments", "unpaired", "class name", "two shapes", "flat", "fortran", "pickle", "twice",
        "two classes", "negative", "huge", "underscore", "short", "deep", "no text",
    ],
)  # fmt: skip
def test_tars_without_whole_samples_are_refused(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    with pytest.raises(DataError, match=r"x\.tar"):
        index_shard(write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("dtype", [">f4", "<f8", "|O"])
def test_moments_that_the_loader_would_misread_are_refused(tmp_path: Path, dtype: str) -> None:
    write_tar(tmp_path / "x.tar", [("a.moments.npy", npy(ARRAY.astype(dtype))), ("a.cls", b"1")])
    with pytest.raises(DataError, match=rf"little-endian float16 or float32, but .*x\.tar holds {re.escape(dtype)}"):
        index(tmp_path)


def index(directory: Path, num_classes: int | None = None) -> Manifest:
    return index_directory(
        directory,
        source="x",
        autoencoder="x",
        autoencoder_location=None,
        latent_scale=1.0,
        latent_shift=0.0,
        num_classes=num_classes,
    )


@pytest.mark.parametrize(("channel", "value"), [(0, np.nan), (0, np.inf), (1, np.nan), (1, np.inf), (1, 200.0)])
def test_numbers_that_are_no_moments_are_refused(tmp_path: Path, channel: int, value: float) -> None:
    broken = ARRAY.copy()
    broken[0, channel, 1, 0] = value
    members = [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1"), ("b.moments.npy", npy(broken)), ("b.cls", b"0")]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=r"those of sample 1 of .*x\.tar are not; compute them again"):
        index(tmp_path)
    write_tar(tmp_path / "x.tar", [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1")])
    index(tmp_path)
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content.replace(ARRAY.tobytes(), broken.tobytes()))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = contents(tmp_path)["x.tar"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"those of sample 0 of .*x\.tar are not"):
        verify_shards(tmp_path)


def test_a_point_is_a_moment(tmp_path: Path) -> None:
    point = ARRAY.copy()
    point[0, 1] = -np.inf
    write_tar(
        tmp_path / "x.tar",
        [("a.1.cls", b"1"), ("b.cls", b"0")] + [(f"{key}.moments.npy", npy(point)) for key in ("b", "a.1")],
    )
    assert index(tmp_path).label_histogram == (1, 1)  # keys with dots, in any order
    verify_shards(tmp_path)


@pytest.mark.parametrize(
    ("directory", "tar"), [("my set", "my shard.tar"), ("été", "ü.tar"), (".hidden", "-a.tar"), ("a:b\\c", "a.tar")]
)
def test_directories_and_tars_of_any_name_are_indexed(tmp_path: Path, directory: str, tar: str) -> None:
    (tmp_path / directory).mkdir()
    write_tar(tmp_path / directory / tar, [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1")])
    (tmp_path / directory / f"._{tar}").write_bytes(b"a Mac's")
    assert index(tmp_path / directory).shards[0].name == tar
    assert verify_shards(tmp_path / directory).num_samples == 1


def test_names_that_are_no_text_are_refused_before_the_tars_are_read(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(b"")
    with pytest.raises(DataError, match=r"holds 'caf\\\\xe9\.tar'; rename it"):
        index(tmp_path)
    named = tmp_path / os.fsdecode(b"d\xe9")
    named.mkdir()
    with pytest.raises(DataError, match=r"must be text in UTF-8, received .*d\\xe9; rename"):
        index(named)
    directory = tmp_path / "d"
    directory.mkdir()
    write_tar(directory / "a.tar", [("a.moments.npy", npy(ARRAY)), ("a.cls", b"1")])
    with pytest.raises(DataError, match="Classes must be 1 to 1,000,000"):
        index(directory, num_classes=10**12)
    assert index(directory).num_samples == 1


# --- the full check ---


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize("damage", [flip_a_bit, shorten, Path.unlink])
def test_verify_names_every_damaged_shard(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_stripes(tmp_path)
    for number in (0, 3):
        damage(tmp_path / f"stripes-{number:06d}.tar")
    with pytest.raises(DataError) as error:
        verify_shards(tmp_path)
    lines = str(error.value).splitlines()
    assert [line.split(" ")[0] for line in lines] == [str(tmp_path / f"stripes-00000{number}.tar") for number in (0, 3)]


@pytest.mark.parametrize("damage", [flip_a_bit, shorten, Path.unlink])
def test_verify_reads_the_index(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_stripes(tmp_path)
    damage(tmp_path / "index.npy")
    with pytest.raises(DataError, match=r"index\.npy must"):
        verify_shards(tmp_path)


def test_verify_compares_the_index_with_the_shards(tmp_path: Path) -> None:
    write_stripes(tmp_path)
    records = np.load(tmp_path / "index.npy")
    records[[1, 2]] = records[[2, 1]]
    np.save(tmp_path / "index.npy", records)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["index"]["sha256"] = hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"stripes-000000.tar must hold the samples that the index"):
        verify_shards(tmp_path)
