import subprocess
import sys

import pytest
import torch

from eqm_dist.errors import DataError
from eqm_dist.evaluate import features
from eqm_dist.evaluate.features import DigitClassifier, load_digit_classifier
from eqm_dist.evaluate.train_digit_classifier import HELD_OUT, accuracy, digits


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return load_digit_classifier()


def test_packaged_classifier_knows_digits_it_was_not_trained_on(classifier):
    images, labels = digits()
    assert accuracy(classifier, images[-HELD_OUT:], labels[-HELD_OUT:]) == 359 / 360  # as the docstring says


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
        features._classifier(b"not the weights")


@pytest.mark.slow
def test_training_script_reaches_the_stated_accuracy(tmp_path):
    path = tmp_path / "classifier.safetensors"
    command = [sys.executable, "-m", "eqm_dist.evaluate.train_digit_classifier", str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    held_out = next(line for line in output.splitlines() if "held-out" in line)
    assert float(held_out.split()[-1]) >= 0.98
    assert path.stat().st_size < 300_000
