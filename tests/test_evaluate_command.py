"""``pipelines/evaluate.py``: figures of images and of models, the same by any route, with their records."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eqm_dist.commands.evaluate import main
from eqm_dist.commands.sample import main as sample
from eqm_dist.errors import ConfigError, DataError, StorageError
from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.metrics import FeatureMoments, frechet_distance
from eqm_dist.evaluate.statistics import compute, image_statistics, parts_of
from eqm_dist.evaluate.train_classifier import digits
from eqm_dist.metric_settings import METRIC_NAMES, MetricSettings
from eqm_dist.track.mlflow import MlflowRun
from tests import tiny

SCRIPT = Path(__file__).parent.parent / "pipelines" / "evaluate.py"
OWN = """
import torch

class Pixels(torch.nn.Module):
    id = "pixels"
    num_features = 16
    image_shape = (4, 4, 1)
    def forward(self, images):
        return images.flatten(1).double() / 255
    spatial = forward
    def logits(self, images):
        return self(images)[:, :3]

class AdmPixels(Pixels):
    adm_statistics = True
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A tiny run that was recorded in MLflow, and an extractor of one's own."""
    root = tmp_path_factory.mktemp("evaluate")
    tiny.trained(root, shards, **tiny.FAR, **{"track.mlflow": True})
    (root / "command_extractor.py").write_text(OWN)
    sys.path.insert(0, str(root))
    return root


def evaluate(root: Path, *arguments: str, out: str = "out.jsonl") -> tuple[dict[str, dict[str, Any]], str]:
    """The records of one call by metric, and what it printed."""
    path = root / out
    path.unlink(missing_ok=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cache = [] if "is" in arguments else ["--cache", str(root / "cache")]  # which the IS alone does not use
        main(["--launcher", "local", *cache, "--out", str(path), *arguments])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["metric"]: record for record in records}, printed.getvalue()


def test_figures_of_images_are_those_of_their_pixels(tmp_path: Path) -> None:
    images, _ = digits()
    (tmp_path / "generated" / "deep").mkdir(parents=True)
    for index, image in enumerate(images[:300].numpy()):
        Image.fromarray(image[..., 0]).save(tmp_path / "generated" / "deep" / f"{index:04d}.png")
    np.savez(tmp_path / "reference.npz", images[300:700].numpy())
    metrics = [metric for metric in METRIC_NAMES if metric != "sfid"]
    flags = ["--reference", str(tmp_path / "reference.npz"), "--extractor", "digits", "--kid-subset-size", "200"]
    records, printed = evaluate(
        tmp_path, "--images", str(tmp_path / "generated"), "--metrics", ",".join(metrics), "--batch", "7", *flags
    )

    sides = [
        image_statistics(load_digit_classifier(), part.split(7), parts=parts_of(metrics))
        for part in (images[:300], images[300:700])
    ]
    expected = compute(metrics, sides[0], sides[1], MetricSettings(kid_subset_size=200))
    assert list(records) == metrics
    for metric in metrics:
        record = records[metric]
        # The float32 features of an image depend on the images beside it in a batch, by 1e-7 of their size.
        assert record["value"] == pytest.approx(expected[metric], rel=1e-4), metric
        assert f"{metric} " in printed
        assert (record["samples"], record["reference_samples"]) == (300, 400)
        assert record["extractor"] == load_digit_classifier().id
        assert record["reference"].endswith("reference.npz")
        assert record["versions"]["torch"] == torch.__version__
        assert {"labels", "sampler", "nfe", "seed", "commit"} <= record.keys()
    assert records["kid"]["std"] == pytest.approx(expected["kid_std"], rel=1e-4)
    assert records["kid"]["settings"] == {"kid_subsets": 100, "kid_subset_size": 200, "seed": 2020}
    assert records["fid"]["settings"] == {}


def test_a_model_gives_the_figures_of_the_images_that_it_draws(root: Path, shards: Path) -> None:
    metrics, own = ",".join(METRIC_NAMES), ["--extractor", "command_extractor:Pixels", "--kid-subset-size", "20"]
    drawing = [
        "--model",
        str(root / "tiny"),
        "--run.root",
        str(root),
        "--samples",
        "90",
        "--seed",
        "5",
        "--labels",
        "random",
    ]
    drawing += ["--sampler.nfe", "6"]
    directly, printed = evaluate(root, *drawing, "--metrics", metrics, *own, "--batch", "32")
    sample([*drawing, "--out", str(root / "drawn"), "--launcher", "local", "--batch", "32", "--format", "npz"])
    reference = str(shards)
    kept, _ = evaluate(root, "--images", str(root / "drawn"), "--reference", reference, "--metrics", metrics, *own)
    assert list(directly) == list(kept) == list(METRIC_NAMES)
    for metric, record in directly.items():
        # A pixel may round to its neighbour's value where the units that were drawn together differ.
        assert record["value"] == pytest.approx(kept[metric]["value"], rel=1e-3, abs=1e-6), metric
        for name in ("samples", "labels", "sampler", "precision", "nfe", "seed", "step", "weights_sha256", "extractor"):
            assert record[name] == kept[metric][name], name
    record = directly["fid"]
    assert (record["samples"], record["labels"], record["seed"], record["step"]) == (90, "random", 5, 30)
    assert record["nfe"] == {"mean": 6, "min": 6, "max": 6}
    assert record["precision"] == "fp32"  # what auto was on this machine
    assert record["reference"] == reference  # what it was trained on
    assert record["reference_samples"] == 48
    assert "90 of" in printed
    assert directly["fid"]["value"] == pytest.approx(directly["sfid"]["value"])  # here one is the other


def test_a_reference_is_measured_once_and_may_be_kept_by_name(root: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", np.random.default_rng(1).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8))
    np.savez(tmp_path / "reference.npz", np.random.default_rng(2).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8))
    common = ["--images", str(tmp_path / "images.npz"), "--extractor", "command_extractor:Pixels"]
    saved = tmp_path / "reference.safetensors"
    measured, _ = evaluate(
        tmp_path, *common, "--reference", str(tmp_path / "reference.npz"), "--save-reference", str(saved)
    )
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cached, _ = evaluate(tmp_path, *common, "--reference", str(tmp_path / "reference.npz"))
    (tmp_path / "reference.npz").unlink()
    named, _ = evaluate(tmp_path, *common, "--reference", str(saved))
    assert measured["fid"]["value"] == cached["fid"]["value"] == named["fid"]["value"]
    assert named["fid"]["reference"] == f"{saved} ({tmp_path / 'reference.npz'})"
    with pytest.raises(DataError, match=r"precision needs features\.rows of the reference"):
        evaluate(tmp_path, *common, "--reference", str(saved), "--metrics", "precision")
    with pytest.raises(DataError, match=r"reference is of .*pixels, .* and the images of classifier"):
        evaluate(tmp_path, "--images", str(root / "digits.npz"), "--extractor", "digits", "--reference", str(saved))


def test_published_moments_stand_beside_the_images_of_their_file(root: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    images, few = (random.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8) for count in (40, 30))
    features = random.normal(size=(500, 16))  # of images that the file does not hold
    moments = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(tmp_path / "images.npz", images)
    np.savez(tmp_path / "adm.npz", arr_0=few, **moments)
    np.savez(tmp_path / "plain.npz", arr_0=few)

    def measure(reference: str) -> dict[str, dict[str, Any]]:
        flags = ["--images", str(tmp_path / "images.npz"), "--extractor", "command_extractor:AdmPixels"]
        flags += ["--metrics", "fid,kid,precision", "--kid-subset-size", "20"]
        return evaluate(tmp_path, *flags, "--reference", str(tmp_path / reference))[0]

    adm, plain = measure("adm.npz"), measure("plain.npz")
    values = torch.from_numpy(images).flatten(1).double() / 255
    expected = frechet_distance(
        FeatureMoments.of_gaussian(torch.from_numpy(moments["mu"]), torch.from_numpy(moments["sigma"])),
        FeatureMoments.of(values),
    )
    assert adm["fid"]["value"] == pytest.approx(expected, rel=1e-9)  # float64; sums in another order
    assert adm["fid"]["value"] != pytest.approx(plain["fid"]["value"], rel=0.1)
    for metric in ("kid", "precision"):
        assert adm[metric]["value"] == plain[metric]["value"]  # of arr_0 on either side
    assert adm["fid"]["reference_samples"] is None
    assert plain["fid"]["reference_samples"] == 30


@pytest.fixture(autouse=True)
def some_digits(root: Path) -> None:
    np.savez(root / "digits.npz", digits()[0][:30].numpy())


def test_figures_reach_the_mlflow_record_of_the_run(root: Path) -> None:
    from mlflow import MlflowClient

    records, _ = evaluate(
        root, "--model", str(root / "tiny"), "--run.root", str(root), "--samples", "60",
        "--extractor", "command_extractor:Pixels",
        "--metrics", "fid,precision", "--mlflow", str(root / "tiny"),
    )  # fmt: skip
    run = MlflowRun(**json.loads((root / "tiny" / "mlflow.json").read_bytes()))
    client = MlflowClient(run.tracking_uri)
    for metric, record in records.items():
        (point,) = client.get_metric_history(run.run_id, f"eval/{metric}_Pixels")
        assert (point.value, point.step) == (record["value"], 30)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--images digits.npz --extractor digits", "compare with a reference; add --reference"),
        ("--images digits.npz --seed 3", "--seed has no effect on --images"),
        ("--images digits.npz --sampler.nfe 9", "--sampler.nfe has no effect"),
        ("--images digits.npz --reference digits.npz --metrics fid,fit", "received 'fit'"),
        ("--images digits.npz --reference digits.npz --save-reference x", r"must end in \.safetensors"),
        (
            "--images digits.npz --extractor digits --metrics is --save-reference x.safetensors",
            "--save-reference has no effect with --metrics is",
        ),
        ("--images digits.npz --reference digits.npz --extractor digits --metrics sfid", "need spatial"),
        (
            "--images digits.npz --reference digits.npz --extractor digits --metrics kid",
            "kid needs at least 1000 images in digits.npz, got 30; bring more or lower --kid-subset-size",
        ),
        (
            "--model tiny --samples 9 --extractor digits --reference digits.npz --metrics is",
            "is has no effect|--reference has no effect with --metrics is",
        ),
        (
            "--model tiny --samples 9 --extractor digits --metrics is",
            "is needs at least 10 drawn images, got 9; raise --samples",
        ),
        (
            "--images digits.npz --reference digits.npz --extractor digits --run.root . --mlflow absent",
            "has no mlflow.json",
        ),
        (
            "--images digits.npz --reference digits.npz --extractor digits --mlflow tiny",
            "must name one of your own runs",
        ),
        ("--images digits.npz --run.root .", "--run.root has no effect on --images"),
        ("--images digits.npz --metrics is --cache x", "--cache has no effect with --metrics is"),
        (
            "--images digits.npz --reference digits.npz --kid-subsets 9",
            "--kid-subsets has no effect with --metrics fid",
        ),
        ("--images digits.npz --reference digits.npz --actors 2", "--actors has no effect with --launcher local"),
        ("--images digits.npz --reference digits.npz --extractor digits --resolution 4", "holds arrays of 8x8"),
        ("--images digits.npz --reference digits.npz --extractor digits --channels 3", "holds arrays of 1"),
        (
            "--images digits.npz --reference digits.npz --extractor digits --max-image-pixels 9",
            "--max-image-pixels has no effect where no image files or tars are read",
        ),
        ("--images digits.npz --reference digits.npz --extractor digits --extractor-weights x", "received some for"),
    ],
)
def test_bad_input_is_one_sentence(root: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, reason: str) -> None:
    monkeypatch.chdir(root)
    with pytest.raises((ConfigError, DataError), match=reason):
        evaluate(root, *arguments.split())


def test_images_above_the_limit_are_let_in_by_a_flag(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses twice as many
    generator = np.random.default_rng(0)
    for number in range(20):
        (tmp_path / "large").mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "large" / f"{number}.png")
    flags = ["--images", str(tmp_path / "large"), "--reference", str(root / "digits.npz"), "--extractor", "digits"]
    with pytest.raises(DataError, match=r"it has more than 63 pixels, which --max-image-pixels of .* can raise"):
        evaluate(root, *flags, "--max-image-pixels", "63")
    assert evaluate(root, *flags, "--max-image-pixels", "64")[0]["fid"]["value"] > 0


NAN = """

class Nan(Pixels):
    def forward(self, images):
        return super().forward(images) * float("nan")

class Half(Pixels):
    def forward(self, images):
        return images.flatten(1).half() * 1000
"""


@pytest.mark.parametrize("name", ["Nan", "Half"])
def test_features_that_are_no_numbers_make_a_sentence_and_no_record(root: Path, shards: Path, name: str) -> None:
    (root / "nan_extractor.py").write_text(OWN + NAN)
    blots = str(shards)
    flags = ["--images", blots, "--reference", blots, "--extractor", f"nan_extractor:{name}"]
    with pytest.raises(DataError, match=rf"must give finite numbers, and .*{name}.* gave features that are infinite"):
        evaluate(root, *flags, out="nan.jsonl")
    assert not (root / "nan.jsonl").exists()


OWN_IMAGES = ["--images", "digits.npz", "--reference", "digits.npz", "--extractor", "digits", "--launcher", "local"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--out", "/proc/nowhere/x.jsonl", "--cache", "none"], "Cannot append to /proc/nowhere/x.jsonl"),
        (["--out", ".", "--cache", "none"], "Cannot append to .*: Is a directory"),
        (["--cache", "digits.npz/below"], "Cannot write to .*digits.npz/below"),
        (["--save-reference", "/proc/x.safetensors", "--cache", "none"], "Cannot write to /proc"),
        (["--metrics", "is,kid", "--cache", "none"], "kid needs at least 1000 images in digits.npz, got 30"),
    ],
)
def test_what_cannot_be_kept_or_measured_is_said_before_the_work(
    root: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sentence: str
) -> None:
    monkeypatch.chdir(root)
    monkeypatch.setattr("eqm_dist.launch.evaluation.run_units", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises((StorageError, DataError), match=sentence):
        main([*OWN_IMAGES, *flags])


def test_figures_are_printed_whatever_becomes_of_their_record(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(StorageError, match="Cannot append to /dev/full: No space left"):
        main([*OWN_IMAGES, "--cache", "none", "--out", "/dev/full"])
    assert "  fid " in capsys.readouterr().out


def test_statistics_of_inception_are_refused_for_another_extractor(root: Path, shards: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "text.npz", mu=np.array(["a"] * 16), sigma=np.zeros((16, 16)))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(16), sigma=np.full((16, 16), np.nan))
    flags = ["--images", str(root / "digits.npz"), "--extractor", "digits", "--reference"]
    with pytest.raises(DataError, match=r"holds statistics of Inception alone, and the extractor is classifier"):
        evaluate(root, *flags, str(tmp_path / "stats.npz"))
    own = ["--images", str(shards), "--extractor", "command_extractor:AdmPixels", "--reference"]
    for name, reason in (("text", "mean of <U1 is not all finite"), ("nan", "covariance of float64 is not all finite")):
        with pytest.raises(DataError, match=reason):
            evaluate(root, *own, str(tmp_path / f"{name}.npz"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"evaluation.samples": 1}, "fid needs at least 2 generated images, got 1; raise evaluation.samples."),
        (
            {"evaluation.metrics": ["fid", "kid"], "evaluation.samples": 999},
            "kid needs at least 1000 generated images, got 999; raise evaluation.samples, or leave kid out of",
        ),
        (
            {"evaluation.metrics": ["fid", "kid"], "evaluation.samples": 1000},
            "kid needs at least 1000 real images, got 48; train on more than ",
        ),
        ({"evaluation.metrics": ["fid", "is"], "evaluation.extractor": "few_extractor:Plain"}, "need logits of the"),
        ({"evaluation.extractor": "few_extractor:Wrong"}, r"must give features of shape \[1, 16\] for 1 images"),
        ({"evaluation.extractor": "nan_extractor:Nan"}, "must give finite numbers"),
    ],
)
def test_training_counts_its_images_at_the_start(
    root: Path, shards: Path, tmp_path: Path, options: Any, sentence: str
) -> None:
    (root / "nan_extractor.py").write_text(OWN + NAN)
    (root / "few_extractor.py").write_text(
        OWN
        + "\nclass Wrong(Pixels):\n    def forward(self, images):\n        return images.flatten(1)[:, :3].double()\n"
        "class Plain(Pixels):\n    logits = None\n"
    )
    extractor = {"evaluation.extractor": "command_extractor:Pixels", "evaluation.every": 2}
    values = tiny.overrides(tmp_path, shards, **extractor) | options
    ended = tiny.train(*tiny.flags(values))
    assert ended.code == 2, ended.out
    assert re.search(sentence, ended.err), ended.err
    assert not (tmp_path / "tiny" / "checkpoints").exists()


def test_the_command_leaves_with_its_exit_codes(root: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ})

    help = run("--help")
    assert help.returncode == 0
    assert "--kid-subset-size" in help.stdout
    wrong = run("--images", "digits.npz", "--metric", "fid")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --metric is not an option")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_actors_change_no_figure(root: Path) -> None:
    images, _ = digits()
    np.savez(root / "others.npz", images[30:60].numpy())  # of digits.npz itself the FID is 0 and its rounding error
    own = ["--extractor", "digits", "--metrics", "fid,is", "--reference", str(root / "digits.npz")]
    own += ["--images", str(root / "others.npz")]
    alone, _ = evaluate(root, *own)
    together, _ = evaluate(root, *own, "--launcher", "ray", "--actors", "2", "--cache", "none")
    assert alone["fid"]["value"] > 1
    for metric, record in alone.items():
        assert together[metric]["value"] == pytest.approx(record["value"], rel=1e-4)  # float32 features
