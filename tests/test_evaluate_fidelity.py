"""The figures of merged statistics equal torch-fidelity's from one process, on the same images and extractor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.statistics import PARTS_OF, MetricSettings, compute, image_statistics, merged, parts_of
from eqm_dist.evaluate.train_classifier import digits
from tests import fidelity

METRICS = [metric for metric in PARTS_OF if metric != "sfid"]  # torch-fidelity has no sFID
SUBSETS, SUBSET_SIZE = 20, 300

# The packaged classifier in float64: of float32 features torch-fidelity takes the mean in float32.
CODE = f"""
import json, sys
import numpy as np
import torch_fidelity
from eqm_dist.evaluate.features import load_digit_classifier

class Digits(torch_fidelity.FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.classifier = load_digit_classifier().double()
    def forward(self, images):
        images = images.permute(0, 2, 3, 1)
        outputs = {{"features": self.classifier(images), "logits": self.classifier.logits(images)}}
        return tuple(outputs[name] for name in self.features_list)
    @staticmethod
    def get_provided_features_list():
        return "features", "logits"
    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "features"
    @staticmethod
    def can_be_compiled():
        return False

class Images(torch.utils.data.Dataset):
    def __init__(self, path):
        self.images = torch.from_numpy(np.load(path)).permute(0, 3, 1, 2)
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.images[index]

torch_fidelity.register_feature_extractor("digits", Digits)
print(json.dumps(torch_fidelity.calculate_metrics(
    input1=Images(sys.argv[1]), input2=Images(sys.argv[2]), feature_extractor="digits", cuda=False, save_cpu_ram=True,
    fid=True, kid=True, isc=True, prc=True, kid_subsets={SUBSETS}, kid_subset_size={SUBSET_SIZE}, cache=False,
    verbose=False)))
"""


def test_merged_statistics_give_torch_fidelitys_figures(tmp_path: Path) -> None:
    images, _ = digits()
    reference = images[:900]
    noise = torch.randn(images[900:].shape, generator=torch.Generator().manual_seed(0))
    generated = (images[900:] + 24 * noise).round().clamp(0, 255).to(torch.uint8)
    for name, side in (("generated", generated), ("reference", reference)):
        np.save(tmp_path / f"{name}.npy", side.numpy())
    theirs: dict[str, Any] = fidelity.run(CODE, tmp_path / "generated.npy", tmp_path / "reference.npy")

    extractor = load_digit_classifier().double()

    def statistics(images: torch.Tensor, workers: int):
        """As so many workers make them, of unequal parts, and joined in another order."""
        shares = images.tensor_split([len(images) * worker // (workers + 1) for worker in range(1, workers)])
        starts = np.cumsum([0, *map(len, shares)])
        parts = parts_of(METRICS)
        pieces = [
            image_statistics(extractor, share.split(64), parts=parts, first=int(start))
            for share, start in zip(shares, starts, strict=False)
        ]
        return merged(reversed(pieces))

    settings = MetricSettings(kid_subsets=SUBSETS, kid_subset_size=SUBSET_SIZE)
    ours = compute(METRICS, statistics(generated, 3), statistics(reference, 2), settings)

    names = {"fid": "frechet_inception_distance", "precision": "precision", "recall": "recall"}
    for metric, short in (("kid", "kernel_inception_distance"), ("is", "inception_score")):
        names |= {metric: f"{short}_mean", f"{metric}_std": f"{short}_std"}
    assert ours.keys() == names.keys()
    assert 0 < ours["recall"] < 1  # figures that say something
    assert 0 < ours["precision"] < 1
    for metric in ("precision", "recall"):  # a mean of ones and zeros, which torch-fidelity takes in float32
        assert ours[metric] == pytest.approx(theirs[names.pop(metric)], rel=2**-24)
    for metric, name in names.items():
        # Float64 on both sides: only the order of sums differs, and with it the rounding of the FID's eigenvalues.
        assert ours[metric] == pytest.approx(theirs[name], rel=1e-9), metric
