import subprocess
import sys

import numpy as np
import pytest
import torch

from eqm_dist.commands import prepare_shards, train_classifier
from eqm_dist.errors import DataError, UserError
from eqm_dist.evaluate import features
from eqm_dist.evaluate.features import ImageClassifier, load_classifier, load_digit_classifier
from eqm_dist.evaluate.train_classifier import accuracy, digits
from tests import tiny


@pytest.fixture(scope="module")
def classifier() -> ImageClassifier:
    return load_digit_classifier()


def test_packaged_classifier_knows_digits_it_was_not_trained_on(classifier):
    images, labels = digits()
    assert accuracy(classifier, images[-360:], labels[-360:]) == 359 / 360  # as the docstring says


def test_weights_are_small_and_frozen(classifier):
    assert sum(p.numel() for p in classifier.parameters()) * 4 < 300_000
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not classifier.training


def test_features_have_the_promised_shape_and_do_not_depend_on_the_batch(classifier):
    images, _ = digits()
    together = classifier(images[:7])
    assert together.shape == (7, classifier.num_features)
    alone = torch.cat([classifier(image[None]) for image in images[:7]])
    torch.testing.assert_close(alone, together)  # float32 sums in another order


def test_covariance_of_half_the_digits_has_full_rank(classifier):
    images, _ = digits()
    spectrum = torch.linalg.eigvalsh(classifier(images[:898]).double().T.cov())
    assert spectrum[0] > 1e-5 * spectrum[-1] > 0


@pytest.mark.parametrize(
    ("images", "received"),
    [
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"uint8 \[2, 32, 32, 3\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"uint8 \[2, 1, 8, 8\]"),
        (torch.zeros(8, 8, 1, dtype=torch.uint8), r"uint8 \[8, 8, 1\]"),
        (torch.zeros(2, 8, 8, 1), r"float32 \[2, 8, 8, 1\]"),
    ],
)
def test_other_images_are_refused(classifier, images, received):
    with pytest.raises(DataError, match=rf"\[B, 8, 8, 1\], got {received}"):
        classifier(images)


def test_damaged_weights_are_refused():
    with pytest.raises(DataError, match="install eqm-dist again"):
        features._packaged(b"not the weights")


@pytest.mark.slow
def test_training_script_reaches_the_stated_accuracy(tmp_path):
    path = tmp_path / "classifier.safetensors"
    command = [sys.executable, "pipelines/train_classifier.py", "--out", str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    held_out = next(line for line in output.splitlines() if "held-out" in line)
    assert float(held_out.split()[-1]) >= 0.98
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--steps", "0", "--out", "x"], "must be a whole number of at least 1, got 0"),
        (["--steps", "-5", "--out", "x"], "must be a whole number of at least 1"),
        (["--out", "."], "--out must be a file, got the directory ."),
    ],
)
def test_bad_flags_are_refused_before_a_classifier_is_trained(flags, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        train_classifier.main(flags)


def test_a_classifier_of_other_images_measures_them(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (300, 13, 13), dtype=np.uint8)
    labels = np.arange(300, dtype=np.uint8) % 3
    pixels[labels == 1, :, :6] = 0
    pixels[labels == 2, :6] = 0
    for name, kind, sizes, content in (("images-idx3", 3, [300, 13, 13], pixels), ("labels-idx1", 1, [300], labels)):
        header = bytes([0, 0, 8, kind]) + np.array(sizes, ">i4").tobytes()
        (images / f"train-{name}-ubyte").write_bytes(header + content.tobytes())
    shards, file = tmp_path / "shards", tmp_path / "classifier.safetensors"
    train = (
        f"--launcher local --run.root {tmp_path / 'runs'} --data.shards {shards} --train.steps 2"
        " --data.latent_shape [1,13,13] --data.num_classes 3 --track.mlflow false --evaluation.samples 30"
        " --model.patch_size 13 --model.hidden_size 16 --model.depth 1 --model.num_heads 2"
        f" --evaluation.extractor {file}"
    ).split()
    prepare = f"--source idx --input {images} --out {shards} --launcher local".split()
    done = tiny.run(prepare_shards.start, "pipelines/prepare_shards.py", *prepare)
    assert done.code == 0, done.err
    classify = f"--shards {shards} --out {file} --steps 40".split()
    done = tiny.run(train_classifier.start, "pipelines/train_classifier.py", *classify)
    assert done.code == 0, done.err
    done = tiny.train(*train)
    assert done.code == 0, done.err
    assert load_classifier(file).image_shape == (13, 13, 1)
    assert "times the yardstick" in done.out

    wrong = tiny.train(*train, "--evaluation.extractor", "digits", "--run.name", "wrong")
    assert wrong.code == 2, wrong.err  # before the first step
    assert "step" not in wrong.out
    assert "evaluation.extractor" in wrong.err


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"0" * 100)
    for name in (path, tmp_path / "absent"):
        with pytest.raises(DataError, match="cannot be read as one"):
            load_classifier(str(name))
