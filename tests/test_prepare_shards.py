"""The command that prepares and verifies shards."""

import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from eqm_dist.commands.prepare_shards import main, start
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.manifest import read_manifest
from eqm_dist.data.verify import verify_shards
from eqm_dist.errors import ConfigError, DataError, StorageError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from tests import tiny
from tests.images import encoded, pixels, write_idx, write_tar, write_tree
from tests.processes import wait_for
from tests.test_data_shards import read_with_webdataset
from tests.vae import save_tiny_vae

SCRIPT = Path(__file__).parents[1] / "pipelines" / "prepare_shards.py"
LOCAL = ["--launcher", "local"]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def run(*arguments: str) -> tiny.Outcome:
    """The command in this process; the first command of the documentation below is a process of its own."""
    return tiny.run(start, str(SCRIPT), *arguments)


def test_prepares_then_verifies_then_names_the_damage(tmp_path: Path) -> None:
    out = tmp_path / "digits"
    prepared = run("--source", "digits", "--out", str(out), "--samples-per-shard", "600", "--dtype", "float16", *LOCAL)
    assert prepared.code == 0, prepared.err
    assert "Wrote digits-000001.tar: 1,200 of 1,797 images" in prepared.out
    assert f"{out} holds 1,797 samples in 3 shards." in prepared.out
    assert prepared.err == ""
    assert read_manifest(out).dtype == "float16"

    shard = out / "digits-000001.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    verified = run("verify", str(out))
    assert verified.code == 2
    assert verified.err.startswith(f"error: {shard} must have the sha256")
    assert verified.err.count("\n") == 1


def test_verify_accepts_a_whole_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--source", "digits", "--out", str(tmp_path), "--mirror", *LOCAL])
    assert read_manifest(tmp_path).moments_shape == (2, 2, 8, 8)
    main(["verify", str(tmp_path)])
    assert "is whole: 1,797 samples in 8 shards." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (["verify", "/nowhere"], DataError, "/nowhere does not exist; prepare one with"),
        (["--source", "digits", "--out", "s3://bucket/x"], ConfigError, "an s3:// --out needs --staging"),
        (
            ["--source", "digits", "--out", "x", "--staging", "y"],
            ConfigError,
            "--staging has no effect on a local --out",
        ),
        (["--source", "digits", "--out", "gs://bucket/x"], DataError, "must be a local path, received the gs: URL"),
        (["--source", "digits", "--out", "x", "--samples-per-shard", "0"], DataError, "must be at least 1, received 0"),
        (["--source", "digits", "--out", "/dev/null/x"], StorageError, "Cannot create /dev/null/x: Not a directory"),
        (["--source", "digits"], ConfigError, "--source and --out must be given"),
        ([], ConfigError, "--source and --out must be given"),
        (["--source", "idx", "--out", "x"], ConfigError, "--source idx needs --input"),
        (["--source", "digits", "--out", "x", "--resolution", "8"], ConfigError, "--resolution has no effect with"),
        (
            ["--source", "digits", "--out", "x", "--max-image-pixels", "9"],
            ConfigError,
            "--max-image-pixels has no effect",
        ),
        (
            ["--source", "idx", "--input", "y", "--out", "x", "--resolution", "5000"],
            ConfigError,
            "at most 4,096, received",
        ),
        (
            ["--source", "idx", "--input", "y", "--out", "x", "--num-classes", "0"],
            ConfigError,
            "whole number of at least",
        ),
        (["index", "y", "--num-classes", "0"], ConfigError, "whole number of at least 1, got 0"),
        (["--source", "idx", "--out", "x", "--label-column", "y"], ConfigError, "--label-column has no effect with"),
        (["--source", "digits", "--out", "x", "--dtype", "bfloat16"], ConfigError, "npy format has no bfloat16"),
        (["--source", "digits", "--out", "x", "--autoencoder", "./no"], DataError, "but ./no is neither"),
        (["--source", "digits", "--out", "x", "--max-bad-fraction", "2"], DataError, r"must lie in \[0, 1\]"),
        (["--source", "digits", "--out", "x", "--deadline-s", "5"], ConfigError, "no effect where nothing is on s3://"),
        (["--source", "idx", "--input", "s3://b/x", "--out", "x", "--deadline-s", "0"], ConfigError, "must be above 0"),
        (["--source", "photos", "--out", "x"], ConfigError, "invalid choice: 'photos'"),
        (["--sources", "digits"], ConfigError, "--sources is not an option .* did you mean --source[?]"),
        (["index", "/nowhere"], DataError, "must hold tars, but /nowhere holds none"),
        (["merge", "out", "/nowhere"], DataError, "/nowhere does not exist"),
        (["merge", "out"], ConfigError, "required: DIR"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as raised:
        main([*arguments, *(LOCAL if "--source" in arguments else [])])
    assert "\n" not in str(raised.value)


# --- the documentation ---

PAGE = (SCRIPT.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python pipelines/prepare_shards.py (.*?)\s*(?:#.*)?$", PAGE.replace("\\\n", " "), re.MULTILINE)


def test_the_first_command_of_the_documentation_prepares_ones_own_images(tmp_path: Path) -> None:
    for index, (side, name) in enumerate([(64, "cat/a.png"), (200, "cat/b.png"), (90, "dog/c.png")]):
        path = tmp_path / "my-images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(pixels(index, side, side + 10)), "PNG"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *COMMANDS[0].split(), *LOCAL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    flags = "--data.shards data/mine --data.latent_shape [3,64,64] --data.num_classes 2"
    assert done.stdout.splitlines()[-1].endswith(flags)
    assert verify_shards(tmp_path / "data" / "mine").class_names == ("cat", "dog")


def test_every_flag_of_the_documentation_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 5
    for page in ([], ["index"]):
        with pytest.raises(SystemExit):
            main([*page, "--help"])
    flags = set(re.findall(r"`?(--[a-z][a-z-]+)", PAGE))
    assert {"--resolution", "--mirror"} <= flags
    assert flags | {"--samples-per-shard"} <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


# --- broken images ---


def files(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != ".lock"
    }


def prepare_tree(tree: Path, out: Path, *more: str) -> None:
    arguments = f"--source folder --input {tree} --resolution 16 --samples-per-shard 5 --mirror --out {out}"
    main([*arguments.split(), *LOCAL, "--max-bad-fraction", "0.5", *more])


def test_a_tree_with_broken_files_goes_through_prepare_and_train(tmp_path: Path) -> None:
    broken = write_tree(tmp_path / "tree")
    out = tmp_path / "out"
    prepare_tree(tmp_path / "tree", out)
    manifest = verify_shards(out)
    assert manifest.class_names == ("cat", "dog")
    assert manifest.num_samples == 28
    assert manifest.moments_shape == (2, 6, 16, 16)
    report = json.loads((out / "report.json").read_text())
    assert (report["images"], report["read"], report["skipped"]) == (31, 31, 3)
    assert [image["name"] for image in report["skipped_images"]] == broken
    assert "truncated" in report["skipped_images"][0]["reason"]
    samples = read_with_webdataset(out)  # stock readers pass over the list of skipped images
    assert len(samples) == 28
    assert not {image["key"] for image in report["skipped_images"]} & {sample["__key__"] for sample in samples}

    result = train_shards(tmp_path, out, "[3,16,16]", 2, "--data.flip", "true")
    assert result["step"] == 3


def train_shards(root: Path, shards: Path, latent_shape: str, classes: int, *more: str) -> dict:
    """Run pipelines/train.py for three steps; returns result.json."""
    command = (
        f"--launcher local --run.root {root} --run.name run --data.shards {shards} "
        f"--data.latent_shape {latent_shape} --data.num_classes {classes} --evaluation.every 0 --track.mlflow false "
        "--model.hidden_size 32 --model.depth 1 --model.num_heads 2 --train.steps 3 --train.global_batch 8 "
        "--train.log_every 1 --optimizer.warmup_steps 1 --model.patch_size 4"
    ).split()
    done = tiny.train(*command, *more)
    assert done.code == 0, done.err
    return json.loads((root / "run" / "result.json").read_text())


def test_too_many_broken_images_end_the_run_until_they_are_allowed(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    out = tmp_path / "out"
    with pytest.raises(
        DataError, match=r"At most 0 of 31 images may be broken, but 2 are: cat/truncated.jpg"
    ) as raised:
        prepare_tree(tmp_path / "tree", out, "--max-bad-fraction", "0")
    assert "raise --max-bad-fraction" in str(raised.value)
    assert raised.value.exit_code == 2
    assert not (out / "manifest.json").exists()
    assert json.loads((out / "report.json").read_text())["skipped"] == 2
    with pytest.raises(DataError, match=r"At most 0.07 of 31 images may be broken, but 3 are"):
        prepare_tree(tmp_path / "tree", out, "--max-bad-fraction", "0.07")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    prepare_tree(tmp_path / "tree", out)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was written is not written again
    prepare_tree(tmp_path / "tree", tmp_path / "straight")
    assert files(out) == files(tmp_path / "straight")


@pytest.mark.parametrize("source", ["folder", "tars", "parquet"])
def test_repaired_and_replaced_images_of_every_source_are_taken(tmp_path: Path, source: str) -> None:
    images = [encoded(Image.fromarray(pixels(number, 8, 8)), "PNG") for number in range(4)]

    def put(contents: list[bytes]) -> None:
        if source == "folder":
            for number, content in enumerate(contents):
                path = tmp_path / "in" / "a" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        elif source == "tars":
            members = {
                f"{n}.{kind}": c if kind == "png" else b"0" for n, c in enumerate(contents) for kind in ("png", "cls")
            }
            (tmp_path / "in").mkdir(exist_ok=True)
            write_tar(tmp_path / "in" / "x.tar", members)
        else:
            (tmp_path / "in").mkdir(exist_ok=True)
            cells = pa.array(contents, pa.binary())
            parquet.write_table(pa.table({"image": cells, "label": [0] * 4}), tmp_path / "in" / "x.parquet")

    def prepared() -> list[np.ndarray]:
        main(
            f"--source {source} --input {tmp_path / 'in'} --samples-per-shard 2 --out {tmp_path / 'out'}".split()
            + LOCAL
        )
        moments, _ = ShardReader(tmp_path / "out").read(np.arange(4))
        return list(IdentityAutoencoder().decode(moments[:, 0, :3]).numpy())

    put([images[0], b"broken", images[2], images[3]])
    with pytest.raises(DataError, match="but 1 are"):
        prepared()
    put(images)
    assert np.array_equal(prepared(), [pixels(number, 8, 8) for number in range(4)])
    put([images[0], images[1], images[3], images[3]])
    assert np.array_equal(prepared(), [pixels(number, 8, 8) for number in (0, 1, 3, 3)])


def test_idx_files_that_change_are_taken(tmp_path: Path) -> None:
    grey = np.stack([pixels(number, 8, 8)[:, :, 0] for number in range(4)])
    labels = np.array([0, 1, 2, 1], np.uint8)

    def prepared(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, list[int]]:
        write_idx(tmp_path / "train-images-idx3-ubyte", images)
        write_idx(tmp_path / "train-labels-idx1-ubyte", labels)
        flags = f"--source idx --input {tmp_path} --samples-per-shard 2 --channels 1 --out {tmp_path / 'out'}"
        main([*flags.split(), *LOCAL])
        moments, found = ShardReader(tmp_path / "out").read(np.arange(4))
        return IdentityAutoencoder().decode(moments[:, 0, :1]).numpy()[..., 0], found.tolist()

    for images, classes in ((grey, labels), (grey[[0, 1, 3, 3]], labels), (grey[[0, 1, 3, 3]], labels[::-1].copy())):
        read, found = prepared(images, classes)
        assert np.array_equal(read, images)
        assert found == classes.tolist()
    with pytest.raises(DataError, match=r"A directory holds one data set.*of 16x4"):
        prepared(grey.reshape(4, 4, 16), labels)


def test_more_classes_than_folders_are_named_by_their_numbers(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", good=6)
    prepare_tree(tmp_path / "tree", tmp_path / "out", "--num-classes", "4")
    assert verify_shards(tmp_path / "out").class_names == ("cat", "dog", "2", "3")


def test_a_larger_limit_of_pixels_lets_images_in_that_were_broken(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for number in range(3):
        content = encoded(Image.fromarray(pixels(number, 20 + number, 20)), "PNG")
        (tmp_path / "tree" / "a" / f"{number}.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a/2\.png \(OSError: it has more than 420 pixels, which --max-image-pixels"):
        prepare_tree(tmp_path / "tree", tmp_path / "out", "--max-image-pixels", "420", "--max-bad-fraction", "0")
    prepare_tree(tmp_path / "tree", tmp_path / "out", "--max-image-pixels", "440", "--max-bad-fraction", "0")
    assert verify_shards(tmp_path / "out").num_samples == 3


def test_a_shard_of_broken_images_alone_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tree" / "a").mkdir(parents=True)
    for index in range(6):
        content = b"broken" if index >= 4 else encoded(Image.fromarray(pixels(index)), "PNG")
        (tmp_path / "tree" / "a" / f"{index}.png").write_bytes(content)
    for _ in range(2):  # and running it again does not stumble over it
        main(
            f"--source folder --input {tmp_path / 'tree'} --resolution 16 --samples-per-shard 2 "
            f"--max-bad-fraction 0.4 --out {tmp_path / 'out'}".split()
            + LOCAL
        )
        manifest = verify_shards(tmp_path / "out")
        assert [shard.samples for shard in manifest.shards] == [2, 2]
        assert len(list((tmp_path / "out").glob("*.tar"))) == 3
        (tmp_path / "out" / "manifest.json").unlink()


# --- Ray ---


@pytest.fixture
def local_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_cluster")
def test_ray_changes_no_byte_and_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree", good=30)
    vae = save_tiny_vae(tmp_path / "vae")
    arguments = (
        f"--source folder --input {tmp_path / 'tree'} --resolution 64 --mirror --autoencoder {vae} "
        "--samples-per-shard 2 --max-bad-fraction 0.2 --out"
    ).split()
    alone, out = tmp_path / "alone", tmp_path / "ray"
    main([*arguments, str(alone), *LOCAL])

    command = [sys.executable, str(SCRIPT), *arguments, str(out)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: written(out) >= 3, first)
    everything = psutil.Process(first.pid).children(recursive=True)
    actors = [process for process in everything if "ray::_Actor" in " ".join(process.cmdline())]
    assert actors
    actors[0].send_signal(signal.SIGKILL)
    reached = written(out)
    wait_for(lambda: written(out) >= reached + 6, first)  # the actor comes back, or the others do its work
    os.kill(first.pid, signal.SIGKILL)
    for process in everything:  # they would go by themselves, but slowly
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    first.communicate()
    assert not (out / "manifest.json").exists()

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    second = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert second.returncode == 0, second.stderr + second.stdout
    assert "images/s" in second.stdout
    assert "s left" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert files(out) == files(alone)


@pytest.mark.ray
@pytest.mark.usefixtures("local_cluster")
def test_what_an_actor_refuses_is_one_sentence(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree")
    with pytest.raises(DataError, match=r"All images must have one size, but .* give --resolution"):
        main(
            f"--source folder --input {tmp_path / 'tree'} --out {tmp_path / 'out'} --max-bad-fraction 0.5 "
            "--samples-per-shard 50".split()
        )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("nodes", "count", "cpus", "gpus"),
    [
        ([{"CPU": 4.0}, {"CPU": 2.0}], 6, 1, 0),
        ([{"CPU": 64.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 48.0, "GPU": 4.0}], 6, 8, 1),  # a head without a GPU
        ([{"CPU": 1.0, "GPU": 2.0}], 1, 1, 1),  # a second actor would wait for a core without end
    ],
)
def test_each_gpu_gets_an_actor_that_fits_its_node(
    nodes: list[dict[str, float]], count: int, cpus: int, gpus: int
) -> None:
    from eqm_dist.launch.ray_actors import _divide

    found, share = _divide(nodes)
    assert (found, share.cpus, share.gpus) == (count, cpus, gpus)


def written(directory: Path) -> int:
    return len(list(directory.glob("*.tar")))


# --- index and merge ---


def test_index_makes_a_data_set_of_bare_tars(tmp_path: Path) -> None:
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    main(["--source", "digits", "--out", str(whole), *LOCAL])
    bare.mkdir()
    for tar in whole.glob("*.tar"):
        shutil.copy(tar, bare)
    main(["index", str(bare), "--images", "sklearn-digits"])
    expected = read_manifest(whole).model_copy(update={"name": "bare"})
    assert verify_shards(bare) == expected
    assert (bare / "index.npy").read_bytes() == (whole / "index.npy").read_bytes()
    with pytest.raises(DataError, match=r"must have no manifest.json"):
        main(["index", str(bare)])
    (bare / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"Labels must lie in \[0, 9\), found 0 to 9"):
        main(["index", str(bare), "--num-classes", "9"])


def test_merge_joins_what_machines_wrote_without_copying(tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        for label in "ab":
            (tmp_path / f"tree{number}" / label).mkdir(parents=True)
            for index in range(number + 1):
                content = encoded(Image.fromarray(pixels(10 * number + index)), "PNG")
                (tmp_path / f"tree{number}" / label / f"{index}.png").write_bytes(content)
        parts.append(str(tmp_path / f"part{number}"))
        prepare_tree(tmp_path / f"tree{number}", Path(parts[-1]))
    out = tmp_path / "out"
    main(["merge", str(out), *parts])
    manifest = verify_shards(out)
    assert manifest.num_samples == 2 + 4 + 6
    assert manifest.label_histogram == (6, 6)
    assert manifest.class_names == ("a", "b")
    assert os.path.samefile(out / "folder-000000.tar", Path(parts[0]) / "folder-000000.tar")
    together = ShardReader(out).read(np.arange(12))
    separate = [ShardReader(part).read(np.arange(count)) for part, count in zip(parts, (2, 4, 6), strict=True)]
    for found, expected in zip(together, zip(*separate, strict=True), strict=True):
        assert np.array_equal(found, np.concatenate(expected))
    with pytest.raises(DataError, match="must go into a directory of its own"):
        main(["merge", str(out), *parts])
    for leftover in ("manifest.json", "folder-000001.tar"):  # as if it had been killed before these
        (out / leftover).unlink()
    main(["merge", str(out), *parts])
    assert verify_shards(out) == manifest
    with pytest.raises(DataError, match="Each data set can be joined once"):
        main(["merge", str(out), parts[0], parts[0]])


def test_merge_refuses_data_sets_that_differ(tmp_path: Path) -> None:
    main(["--source", "digits", "--out", str(tmp_path / "a"), *LOCAL])
    main(["--source", "digits", "--out", str(tmp_path / "b"), "--dtype", "float16", *LOCAL])
    with pytest.raises(DataError, match=r"must have one dtype, but .*/a has 'float32' and .*/b 'float16'"):
        main(["merge", str(tmp_path / "out"), str(tmp_path / "a"), str(tmp_path / "b")])
    assert not (tmp_path / "out").exists()


# --- real images ---


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
@pytest.mark.parametrize("kind", ["idx", "folder"])
def test_images_of_ones_own_go_through_prepare_classifier_training_and_fid(kind: str, tmp_path: Path) -> None:
    """One command each, on 400 images: as IDX files, or as a tree of mixed kinds with a broken file in a hundred."""
    number = 400
    images, labels = (
        np.frombuffer(gzip.decompress((FASHION_MNIST / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for name, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    images, labels = images.reshape(-1, 28, 28)[:number], labels[:number]
    source = tmp_path / "images"
    source.mkdir()
    if kind == "idx":
        write_idx(source / "train-images-idx3-ubyte", images)
        write_idx(source / "train-labels-idx1-ubyte", labels)
    else:
        write_mixed_tree(source, images, labels)
    options = [] if kind == "idx" else ["--resolution", "28", "--channels", "1", "--max-bad-fraction", "0.02"]
    shards, classifier = tmp_path / "shards", tmp_path / "classifier.safetensors"
    done = run("--source", kind, "--input", str(source), "--out", str(shards), *options, *LOCAL)
    assert done.code == 0, done.err
    assert read_manifest(shards).num_samples == (number if kind == "idx" else number - number // 100)

    command = f"pipelines/train_classifier.py --shards {shards} --out {classifier} --steps 60"
    trained = subprocess.run([sys.executable, *command.split()], cwd=SCRIPT.parents[1], capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    evaluated = f"--evaluation.every 3 --evaluation.samples 100 --evaluation.extractor {classifier}".split()
    result = train_shards(
        tmp_path,
        shards,
        "[1,28,28]",
        10,
        *evaluated,
        "--sampler.nfe",
        "5",
        "--model.patch_size",
        "7",
    )
    assert result["metrics"]["eval/fid"] > result["metrics"]["eval/fid_yardstick"] > 0
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def write_mixed_tree(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Grey images as PNG and JPEG files of several modes; one in a hundred is broken."""
    modes = ["L", "RGB", "RGBA", "LA"]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        kind, suffix = ("JPEG", "jpg") if number % 5 == 4 else ("PNG", "png")
        mode = "L" if kind == "JPEG" else modes[number % 5]
        content = encoded(Image.fromarray(image).convert(mode), kind)
        path = root / f"{label}" / f"{number:03d}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content[: len(content) // 2] if number % 100 == 50 else content)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the Debian package dataset-fashion-mnist")
def test_fashion_mnist_goes_through_prepare_and_train(tmp_path: Path) -> None:
    out = tmp_path / "fashion"
    images = FASHION_MNIST / "t10k-images-idx3-ubyte.gz"
    done = run("--source", "idx", "--input", str(images), "--out", str(out), "--samples-per-shard", "1000", *LOCAL)
    assert done.code == 0, done.err
    assert "--data.latent_shape [1,28,28] --data.num_classes 10" in done.out
    manifest = read_manifest(out)
    assert manifest.label_histogram == (1000,) * 10  # as published
    assert train_shards(tmp_path, out, "[1,28,28]", 10)["step"] == 3
