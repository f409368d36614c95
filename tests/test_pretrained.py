"""Models from everywhere, and out again: runs, checkpoints, exports, official files."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import eqm_dist
from eqm_dist.commands.export import main as export_main
from eqm_dist.config import Config
from eqm_dist.errors import CheckpointError, ConfigError, DataError
from eqm_dist.export import export
from eqm_dist.models import SiT
from eqm_dist.options import parse
from eqm_dist.pretrained import newest_run
from tests import tiny

SAMPLER = {"sampler.name": "gd", "sampler.step_size": 0.1, "sampler.nfe": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The runs directory with one finished tiny run."""
    return tiny.trained(tmp_path_factory.mktemp("runs"), shards).parent


def official_model(seed: int = 1) -> SiT:
    model = SiT(8, 2, 4, hidden_size=48, depth=2, num_heads=4, num_classes=10, learn_sigma=True, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # as if trained: labels and depth matter
        for name, parameter in model.named_parameters():
            if "adaLN" in name or name == "final_layer.linear.weight":
                parameter.normal_(0, 0.1, generator=generator)
    return model


def test_a_run_a_checkpoint_and_an_export_draw_the_same_images(root: Path, tmp_path: Path) -> None:
    run = eqm_dist.load(root / "tiny")
    assert run.step == 6
    images = run.sample([2, 0, 1], seed=5)
    assert images.shape == (3, 4, 4, 1)
    assert images.dtype == torch.uint8
    checkpoint = eqm_dist.load(root / "tiny" / "checkpoints" / "step_00000006")
    exported = eqm_dist.load(export(run, tmp_path / "export"))
    for other in (checkpoint, exported):
        assert torch.equal(other.sample([2, 0, 1], seed=5), images)
        assert other.sha256 == run.sha256
    assert not torch.equal(run.sample([2, 0, 1], seed=6), images)


def test_an_older_checkpoint_holds_older_weights(root: Path) -> None:
    older = eqm_dist.load(root / "tiny" / "checkpoints" / "step_00000004")
    assert older.step == 4
    assert older.sha256 != eqm_dist.load(root / "tiny").sha256


def test_the_sampler_can_be_changed(root: Path) -> None:
    model = eqm_dist.load(root / "tiny")
    ours = model.sample([0], name="gd", step_size=0.1, nfe=3)
    assert torch.equal(ours, eqm_dist.load(root / "tiny", overrides=SAMPLER).sample([0]))
    with pytest.raises(ConfigError, match="momentum has no effect with name=gd"):
        model.sample([0], name="gd", momentum=0.3)
    with pytest.raises(ConfigError, match=r"did you mean sampler.step_size"):
        model.sample([0], stepsize=3)
    layers = [({"sampler": {"name": "nag", "momentum": 0.7}}, "best.yaml"), ({"sampler.name": "gd"}, "command line")]
    assert eqm_dist.load(root / "tiny", overrides=layers).config.sampler.momentum is None


def test_labels_outside_the_model_are_refused(root: Path) -> None:
    model = eqm_dist.load(root / "tiny")
    with pytest.raises(DataError, match=r"Labels must lie in 0..2, or be 3 for none, got 0 to 4"):
        model.sample([0, 4])


@pytest.mark.parametrize("wrap", ["ema", "bare"])
def test_an_official_checkpoint_loads_with_its_sizes(tmp_path: Path, wrap: str) -> None:
    ema, raw = official_model(1), official_model(2)
    content: Any = ema.state_dict()
    if wrap == "ema":
        arguments = argparse.Namespace(model="EqM-B/2", num_classes=10)
        content = {"model": raw.state_dict(), "ema": ema.state_dict(), "opt": {}, "args": arguments}
    torch.save(content, tmp_path / "official.pt")
    overrides = {"model.num_heads": 4, **SAMPLER}
    model = eqm_dist.load(tmp_path / "official.pt", autoencoder="identity", overrides=overrides)
    assert model.config.model.learn_sigma
    assert model.config.data.latent_shape == (4, 8, 8)
    assert model.config.data.num_classes == 10
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 10])
    assert torch.equal(model.model(x, labels), ema(x, labels))
    assert model.sample([3]).shape == (1, 8, 8, 4)
    assert not torch.equal(model.sample([3]), model.sample([4]))


def test_an_official_size_tells_its_heads(tmp_path: Path) -> None:
    with torch.device("meta"):
        weights = SiT(32, 2, 4, hidden_size=384, depth=12, num_heads=6, num_classes=1000, learn_sigma=True).state_dict()
    # All of a tensor's elements may share one place in the file, so it is small.
    save_file({name: torch.zeros(t.shape) for name, t in weights.items()}, tmp_path / "s2.safetensors")
    model = eqm_dist.load(tmp_path / "s2.safetensors", overrides={"objective.kind": "time_free_flow_matching"})
    assert model.config.model.num_heads == 6
    assert model.config.objective.kind == "time_free_flow_matching"
    with pytest.raises(DataError, match="does not say which autoencoder decodes its latents; name it"):
        model.autoencoder  # noqa: B018


def test_heads_that_cannot_be_known_are_asked_for(tmp_path: Path) -> None:
    save_file(official_model().state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(ConfigError, match=r"no official size \(48 wide, 2 deep\); give model.num_heads"):
        eqm_dist.load(tmp_path / "small.safetensors")


class _Runs:
    """Pickles as a call: what a hostile file would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": _Runs()}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match="cannot be read as one without executing what is in it"):
        eqm_dist.load(tmp_path / "hostile.pt")
    assert "executed" not in capsys.readouterr().out


def test_other_files_and_places_are_refused(tmp_path: Path, root: Path) -> None:
    torch.save({"unet.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="must hold the weights of a SiT backbone"):
        eqm_dist.load(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not exist; correct the path"):
        eqm_dist.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is none of these"):
        eqm_dist.load(root)


def test_a_damaged_ema_is_refused(root: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(root / "tiny", tmp_path / "tiny")
    file = copy / "checkpoints" / "step_00000006" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema.safetensors is damaged"):
        eqm_dist.load(copy)


def test_the_newest_run_is_the_one_saved_last(root: Path, tmp_path: Path) -> None:
    assert newest_run(root) == root / "tiny"
    with pytest.raises(CheckpointError, match=r"no run with a checkpoint in .*; train one with `make train`"):
        newest_run(tmp_path)


def test_an_export_says_what_it_is(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "export"
    export_main(["--model", str(root / "tiny"), "--out", str(out), "--license", "cc-by-4.0"])
    assert f"eqm_dist.load({str(out)!r})" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert "6 steps of 4 images" in card
    assert "blots: 48 samples" in card
    description = json.loads((out / "model.json").read_bytes())
    assert description["step"] == 6
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == eqm_dist.load(root / "tiny").model.state_dict().keys()
    assert str(root) not in (out / "config.yaml").read_text()  # nothing of this machine
    parse(Config, yaml.safe_load((out / "config.yaml").read_text()))
    with pytest.raises(ConfigError, match="holds files; name another"):
        export_main(["--model", str(root / "tiny"), "--out", str(out)])
