"""Extractors by name: the true code path of Inception and DINOv2 with random weights, and modules of one's own."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.extractors import _rgb, load_extractor
from eqm_dist.evaluate.features import ImageClassifier, load_digit_classifier, save_classifier
from eqm_dist.evaluate.statistics import extract
from tests import fidelity, tiny

OWN = """
import torch

class Pixels(torch.nn.Module):
    num_features = 4
    def forward(self, images):
        return images.flatten(1).float()

class Named(Pixels):
    id = "pixels 1"
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(4))

def function():
    return lambda images: images

def broken():
    raise ValueError("no such thing")
"""


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_extractors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_extractors", raising=False)
    return "own_extractors"


def test_digits_and_files_are_named_after_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(save_classifier(ImageClassifier((8, 8, 1), 10)))
    digits, other = load_extractor("digits"), load_extractor(str(path))
    assert isinstance(digits, ImageClassifier)
    assert isinstance(other, ImageClassifier)
    assert digits.id == load_digit_classifier().id
    assert digits.id != other.id


def test_a_module_of_ones_own_is_an_extractor(own_module: str) -> None:
    images = torch.arange(8, dtype=torch.uint8).view(2, 2, 2, 1)
    extractor = load_extractor(f"{own_module}:Pixels")
    assert extract(extractor, images, {"features"})["features"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert getattr(extractor, "id", None) is None  # nothing vouches for it
    named, again = (load_extractor(f"{own_module}:Named") for _ in range(2))
    assert "pixels 1" in str(named.id)
    assert named.id == again.id
    assert not next(named.parameters()).requires_grad


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("own_extractors:absent", "AttributeError: .*absent"),
        ("own_extractors:broken", "ValueError: no such thing"),
        ("no_such_module:thing", "ModuleNotFoundError: .*no_such_module"),
        ("own_extractors:function", "made function"),
        ("torch.nn:Identity", "made Identity"),
    ],
)
def test_what_is_no_extractor_is_refused(own_module: str, factory: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_extractor(factory)


def test_weights_are_for_inception_only() -> None:
    with pytest.raises(ConfigError, match="received some for digits"):
        load_extractor("digits", "weights.pth")


def test_without_torch_fidelity_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    for name in ("inception", "dinov2-vit-s-14"):
        with pytest.raises(ConfigError, match=r"need torch-fidelity .* pip install 'eqm-dist\[inception\]'"):
            load_extractor(name)


INCEPTION = """
import json, sys
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
import torch_fidelity.feature_extractor_inceptionv3 as reference
from eqm_dist.evaluate.extractors import load_extractor
from eqm_dist.evaluate.statistics import extract

torch.manual_seed(0)
reference.load_state_dict_from_url = lambda *_, **__: {}
FeatureExtractorInceptionV3.load_state_dict, load = lambda *_, **__: None, FeatureExtractorInceptionV3.load_state_dict
theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
for module in theirs.modules():  # random weights keep the signal's size, so that places differ at all depths
    if isinstance(module, torch.nn.BatchNorm2d):
        module.running_var.fill_(1 / 6)
torch.save(theirs.state_dict(), sys.argv[1])
FeatureExtractorInceptionV3.load_state_dict = load

inception = load_extractor("inception", sys.argv[1])
images = torch.randint(0, 256, (3, 24, 20, 3), dtype=torch.uint8)
found = extract(inception, images, {"features", "spatial", "logits"})
features, logits = theirs(images.permute(0, 3, 1, 2))

x = reference.interpolate_bilinear_2d_like_tensorflow1x(
    images.permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False)
x = (x - 128) / 128
for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
             "MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"):
    x = getattr(theirs, name)(x)
mixed_6 = x[:, :7].flatten(1)  # the 1x1 branch comes first in the block

grey = images[..., :1]
print(json.dumps({
    "id": inception.id,
    "shapes": {name: list(tensor.shape) for name, tensor in found.items()},
    "features": torch.equal(found["features"], features),
    "logits": torch.equal(found["logits"], logits),
    "spatial": torch.equal(found["spatial"], mixed_6),
    "spread": mixed_6.std().item(),
    "grey": torch.equal(inception(grey), inception(grey.expand(-1, -1, -1, 3))),
    "frozen": not any(parameter.requires_grad for parameter in inception.parameters()) and not inception.training,
}))
"""


def test_inception_is_torch_fidelitys_and_its_spatial_features_are_adms(tmp_path: Path) -> None:
    found: dict[str, Any] = fidelity.run(INCEPTION, tmp_path / "weights.pth")
    assert found["shapes"] == {"features": [3, 2048], "spatial": [3, 7 * 17 * 17], "logits": [3, 1008]}
    assert found["spread"] > 1e-3
    assert found["features"]
    assert found["logits"]
    assert found["spatial"]
    assert found["grey"]
    assert found["frozen"]
    assert found["id"].startswith("inception (torch-fidelity ")


REFUSED = """
import json, sys
from eqm_dist.errors import DataError
from eqm_dist.evaluate.extractors import load_extractor
import torch.hub
torch.hub.set_dir(sys.argv[1])
def offline(*_, **__):
    raise OSError("Network is unreachable")
torch.hub.urlopen = offline
sentences = []
for name, weights in json.loads(sys.argv[2]):
    try:
        load_extractor(name, weights)
    except DataError as error:
        sentences.append(str(error))
print(json.dumps(sentences))
"""
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


def test_offline_the_sentence_says_what_to_fetch_and_where_to_put_it(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(Harmful(), tmp_path / "harmful.pth")
    hub = tmp_path / "hub"
    asked = [["inception", None], ["dinov2-vit-l-14", None]]
    asked += [["inception", str(tmp_path / name)] for name in ("absent.pth", "other.pth", "harmful.pth")]
    offline, dino, absent, other, harmful = fidelity.run(REFUSED, hub, json.dumps(asked))
    name = URL.rpartition("/")[2]
    assert f"(Network is unreachable); where there is a network, fetch {URL}" in offline
    assert f"put it at {hub}/checkpoints/{name}, or name it with --extractor-weights" in offline
    assert "unpack https://github.com/facebookresearch/dinov2/archive/main.zip" in dino
    assert f"{hub}/facebookresearch_dinov2_main" in dino
    assert "dinov2_vitl14/dinov2_vitl14_pretrain.pth" in dino
    assert f"absent.pth is none; fetch {URL}" in absent
    assert "must hold the weights of torch-fidelity's Inception" in other
    assert "must hold the weights of torch-fidelity's Inception" in harmful
    assert not (tmp_path / "executed").exists()
    assert not list(hub.rglob("*.pth"))


DINO = """
import json, sys
from pathlib import Path
import torch.hub
repository = Path(sys.argv[1]) / "facebookresearch_dinov2_main"
repository.mkdir(parents=True)
(repository / "hubconf.py").write_text('''
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(3, 384, bias=False)
        torch.nn.init.constant_(self.proj.weight, 2.0)
    def forward(self, x):
        return self.proj(x.mean((2, 3)))
def dinov2_vits14():
    return Net()
''')
torch.hub.set_dir(sys.argv[1])
def offline(*_, **__):
    raise torch.hub.URLError("offline")
torch.hub.urlopen = offline
from eqm_dist.evaluate.extractors import load_extractor
dino = load_extractor("dinov2-vit-s-14")
images = torch.full((2, 30, 20, 3), 100, dtype=torch.uint8)
print(json.dumps([list(dino(images).shape), dino(images)[0, 0].item(), dino.id]))
"""


def test_dinov2_runs_as_torch_fidelity_runs_it(tmp_path: Path) -> None:
    # The repository of the hub is replaced by one whose model is the sum of the normalised mean colours, twice.
    shape, value, name = fidelity.run(DINO, tmp_path / "hub")
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert shape == [2, 384]
    assert value == pytest.approx(sum(2 * (100 / 255 - m) / s for m, s in zip(mean, deviation, strict=True)), rel=1e-5)
    assert name.startswith("dinov2-vit-s-14 (torch-fidelity ")


def test_inception_refuses_what_is_no_picture() -> None:
    for images in (torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 4, dtype=torch.uint8)):
        with pytest.raises(DataError, match=r"shape \[B, H, W, 1 or 3\]"):
            _rgb(images)


def test_a_run_is_evaluated_with_a_module_of_ones_own(own_module: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "own_extractors.py").write_text(OWN.replace("= 4", "= 16"))  # the blots have 16 pixels
    options = {"evaluation.every": 6, "evaluation.samples": 20}
    for factory, code, said in (("Pixels", 0, "fid_yardstick"), ("absent", 2, "has no attribute 'absent'")):
        options |= {"evaluation.extractor": f"{own_module}:{factory}", "run.name": factory}
        outcome = tiny.train(*tiny.flags(tiny.overrides(tmp_path, shards, **options)))
        assert outcome.code == code, outcome.err
        assert said in outcome.out + outcome.err
