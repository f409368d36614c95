"""The figures of merged statistics equal torch-fidelity's from one process, on the same images and extractor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eqm_dist.evaluate.features import load_digit_classifier
from eqm_dist.evaluate.statistics import compute, image_statistics, merged, parts_of
from eqm_dist.evaluate.train_classifier import digits
from eqm_dist.metric_settings import METRIC_NAMES, MetricSettings
from tests import fidelity

METRICS = [metric for metric in METRIC_NAMES if metric != "sfid"]  # torch-fidelity has no sFID
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


INCEPTION = """
import contextlib, json, sys
from pathlib import Path
import numpy as np
import torch_fidelity
import torch_fidelity.feature_extractor_inceptionv3 as reference
from eqm_dist.commands.evaluate import main

root = Path(sys.argv[1])
torch.manual_seed(0)
Network = reference.FeatureExtractorInceptionV3
reference.load_state_dict_from_url, load = lambda *_, **__: {}, Network.load_state_dict
Network.load_state_dict = lambda *_, **__: None
network = Network("inception-v3-compat", ["2048"])
for module in network.modules():  # random weights that keep the signal's size
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_var.fill_(1 / 6)
torch.save(network.state_dict(), root / "weights.pth")
Network.load_state_dict = load

random = np.random.default_rng(0)
sides = {"generated": random.integers(0, 256, (24, 16, 16, 3)), "reference": random.integers(0, 250, (30, 16, 16, 3))}
for name, images in sides.items():
    np.savez(root / f"{name}.npz", images.astype(np.uint8))
command = ["--images", str(root / "generated.npz"), "--extractor", "inception", "--extractor-weights",
           str(root / "weights.pth"), "--launcher", "local", "--cache", "none", "--kid-subset-size", "10"]
main([*command, "--reference", str(root / "reference.npz"), "--metrics", "fid,sfid,kid,is,precision,recall",
      "--out", str(root / "ours.jsonl")])

spatial, pooled = [], []
network = Network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(root / "weights.pth"))
network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: spatial.append(call[2][:, :7].flatten(1)))
images = torch.from_numpy(sides["reference"].astype(np.uint8)).permute(0, 3, 1, 2)
pooled = network(images)[0].double().numpy()
spatial = spatial[0].double().numpy()
np.savez(root / "adm.npz", mu=pooled.mean(0), sigma=np.cov(pooled, rowvar=False), mu_s=spatial.mean(0),
         sigma_s=np.cov(spatial, rowvar=False))
main([*command, "--reference", str(root / "adm.npz"), "--metrics", "fid,sfid", "--out", str(root / "adm.jsonl")])

class Images(torch.utils.data.Dataset):
    def __init__(self, name):
        self.images = torch.from_numpy(sides[name].astype(np.uint8)).permute(0, 3, 1, 2)
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        return self.images[index]

theirs = torch_fidelity.calculate_metrics(
    input1=Images("generated"), input2=Images("reference"), feature_extractor="inception-v3-compat", cuda=False,
    feature_extractor_weights_path=str(root / "weights.pth"), save_cpu_ram=True, fid=True, kid=True, isc=True, prc=True,
    kid_subset_size=10, cache=False, verbose=False)
found = {}
for name in ("ours", "adm"):
    records = map(json.loads, (root / f"{name}.jsonl").read_text().splitlines())
    found[name] = {record["metric"]: record["value"] for record in records}
print(json.dumps({**found, "theirs": theirs}))
"""


@pytest.mark.slow
def test_the_command_with_inception_gives_torch_fidelitys_figures(tmp_path: Path) -> None:
    found: dict[str, Any] = fidelity.run(INCEPTION, tmp_path)
    ours, theirs, adm = found["ours"], found["theirs"], found["adm"]
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    # torch-fidelity takes the third power of float32 kernels, about 1e-7 of values near 8 that cancel to the KID.
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-5)
    assert [ours["precision"], ours["recall"]] == pytest.approx([theirs["precision"], theirs["recall"]], rel=2**-24)
    assert 0 < ours["precision"] < 1
    # ADM's file holds means and covariances of float32 features, taken in one pass by numpy.
    assert adm == pytest.approx({name: ours[name] for name in ("fid", "sfid")}, rel=1e-6)
    assert ours["sfid"] > 0
