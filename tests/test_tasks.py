"""Tasks beside drawing: closed forms for what they compute, and their commands from model to picture."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from eqm_dist.commands import compose, denoise, ood
from eqm_dist.core.guidance import blind_to_time
from eqm_dist.core.samplers import GradientDescent
from eqm_dist.core.sampling import SamplingMethod
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.generate import generate
from eqm_dist.tasks.compose import composed, share_of_both
from eqm_dist.tasks.denoise import restore
from eqm_dist.tasks.ood import detect, field_norm, made_up_sets
from tests import tiny

# --- closed forms ---


def to_bytes(latents: Tensor) -> Tensor:
    return ((latents + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def test_descent_to_known_points_restores_them_by_its_own_rate() -> None:
    points = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def draw(starts: Tensor, gamma: float) -> object:
        return generate(
            blind_to_time(lambda x, labels: points[labels] - x),
            indices=torch.arange(5), labels=torch.arange(5), latent_shape=(1, 4, 4),
            method=SamplingMethod(GradientDescent(0.1), 20), seed=0, decode=to_bytes, batch=2,
            start=lambda rows: starts[rows],
        )  # fmt: skip

    results = restore(draw, to_bytes, points, [1.0, 0.5, 0.0], seed=0)  # pyright: ignore[reportArgumentType]
    assert [result.start_noise for result in results] == [1.0, 0.5, 0.0]
    assert results[0].start_error > results[1].start_error > results[2].start_error == 0
    # What is left of the distance is 0.9^20 = 0.12 of it; images are clamped to [-1, 1], which noise leaves, so the
    # start's error is smaller than that of its latents and only bounds from below what may remain.
    for result in results[:2]:
        assert result.error < 0.3 * result.start_error
    assert results[2].error == 0
    assert results[0].nfe == 20


def test_the_auroc_of_scores_that_are_known() -> None:
    field = field_norm(lambda x: -3 * x)
    known = torch.full((4, 1, 2, 2), 0.1)
    far, near = torch.full((6, 1, 2, 2), 2.0), torch.zeros(3, 1, 2, 2)
    assert torch.allclose(field(far), torch.tensor(6.0))
    found = detect({"field norm": field}, known, {"far": far, "same": known, "near": near}, batch=4)
    assert [detection.auroc for detection in found] == [1.0, 0.5, 0.0]


def test_made_up_sets_are_what_they_are_called() -> None:
    images = torch.randint(0, 256, (8, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sets = made_up_sets(images, seed=1)
    assert torch.equal(255 - sets["inverted"], images)
    assert sets["constant"].flatten(1, 2).unique(dim=1).shape[1] == 1
    assert len(sets["constant"].flatten(1).unique(dim=0)) == 8
    assert sets["noise"].float().std() > 60  # uniform: 256 / sqrt(12) = 74
    again = made_up_sets(images[:3], seed=1)
    assert all(torch.equal(again[name], sets[name][:3]) for name in sets)


def test_the_sum_of_two_gaussians_fields_rests_at_their_product() -> None:
    centres, precisions = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 3.0])

    def field(x: Tensor, labels: Tensor, time: Tensor) -> Tensor:
        return precisions[labels][:, None] * (centres[labels] - x)

    both = composed(field, [0, 1], [0.5, 0.5])
    x, unused = torch.zeros(3, 2), torch.zeros(3)
    for _ in range(200):
        x = x + 0.1 * both(x, unused, unused)
    product = (precisions[:, None] * centres).sum(0) / precisions.sum()
    assert torch.allclose(x, product.expand(3, 2), atol=1e-5)  # (1 - 0.2)^200 is far below the rounding of fp32
    with pytest.raises(ConfigError, match="2 labels and 1 weights"):
        composed(field, [0, 1], [1.0])


def test_the_share_that_shows_both_conditions() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0], [4.0, 1.0, 5.0], [5.0, 4.0, 1.0], [0.0, 9.0, 8.0]])
    assert share_of_both(logits, [2, 0]) == 0.5
    assert share_of_both(logits, [1]) == 0.25


# --- commands ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A trained tiny run, and one of an explicit energy."""
    root = tmp_path_factory.mktemp("runs")
    for name, extra in (("tiny", {}), ("energy", {"objective.energy": "dot"})):
        options = {"run.name": name, "evaluation.extractor": "tests.test_tasks:extractor", **extra}
        tiny.trained(root, shards, **options)
    return root


class Pixels(torch.nn.Module):
    """Two numbers of an image as its features."""

    num_features = 2

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1).float()
        return torch.stack([flat.mean(1), flat.std(1)], dim=1)


def extractor() -> torch.nn.Module:
    return Pixels()


def test_denoise(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(runs / "tiny"), "--run.root", str(runs), "--samples", "20", "--out", str(tmp_path / "out")]
    denoise.main([*common, "--start-noise", "1,0.2"])
    record = json.loads((tmp_path / "out" / "denoise.json").read_bytes())
    assert [level["start_noise"] for level in record["levels"]] == [1, 0.2]
    assert record["levels"][0]["rms_error_of_start"] > record["levels"][1]["rms_error_of_start"] > 0
    for name in ("restored.png", "curve.png"):
        Image.open(tmp_path / "out" / name).verify()
    assert "RMS error" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--start-noise must be levels from 0 to 1 like 1,0.5,0, got 2"):
        denoise.main([*common, "--start-noise", "2"])


@pytest.mark.parametrize(("run", "scores"), [("tiny", ["field norm"]), ("energy", ["field norm", "energy"])])
def test_ood(runs: Path, shards: Path, tmp_path: Path, run: str, scores: list[str]) -> None:
    common = ["--model", str(runs / run), "--run.root", str(runs), "--samples", "16", "--out", str(tmp_path / "out")]
    ood.main([*common, "--against", f"inverted,{shards}"])
    record = json.loads((tmp_path / "out" / "ood.json").read_bytes())
    assert list(dict.fromkeys(row["score"] for row in record["auroc"])) == scores
    assert record["auroc"][1]["auroc"] == 0.5  # the known images against themselves
    Image.open(tmp_path / "out" / "scores.png").verify()
    with pytest.raises(ConfigError, match="--label must be a class below 3, or 3 for none, got 4"):
        ood.main([*common, "--label", "4"])


def test_images_of_another_size_are_not_foreign_but_wrong(runs: Path, tmp_path: Path) -> None:
    for index in range(2):
        Image.new("L", (6, 6), index).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"must have one size, .* have \[4, 4, 1\], .* \[6, 6, 1\]"):
        ood.main(
            [
                "--model",
                str(runs / "tiny"),
                "--run.root",
                str(runs),
                "--against",
                str(tmp_path),
                "--out",
                str(tmp_path / "out"),
            ]
        )


def test_compose(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(runs / "tiny"), "--run.root", str(runs), "--samples", "5", "--out", str(tmp_path / "out")]
    compose.main([*common, "--labels", "0,2", "--weights", "0.7,0.3"])
    record = json.loads((tmp_path / "out" / "compose.json").read_bytes())
    assert record["weights"] == [0.7, 0.3]
    with Image.open(tmp_path / "out" / "composed.png") as picture:
        assert picture.height > 3 * 40
    assert "composed.png" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="2 labels and 1 weights"):
        compose.main([*common, "--labels", "0,2", "--weights", "1"])
    for labels, sentence in (("0,9", "classes from 0 to 2, got 9"), ("0,3", "classes from 0 to 2, got 3"),
                             ("1,1", "must differ"), ("a", "must be numbers"), ("-1", "must be numbers"),
                             ("9" * 5000, "must be numbers"), ("", "must be numbers")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--labels {sentence}|--labels must be {sentence}"):
            compose.main([*common, "--labels", labels])
    with pytest.raises(ConfigError, match="--weights must be numbers"):
        compose.main([*common, "--weights", "nan,1"])
