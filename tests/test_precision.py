"""The arithmetic of products: what auto is on a device, and what is said of a part is in effect while it computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqm_dist import precision
from eqm_dist.build import build_field, build_model, build_run
from eqm_dist.config import Config
from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.extractors import load_extractor
from eqm_dist.evaluate.metrics import feature_moments
from eqm_dist.evaluate.statistics import MOMENTS, image_statistics
from eqm_dist.models.autoencoder import load_autoencoder
from eqm_dist.open_run import open_run
from eqm_dist.precision import in_effect, products, set_products
from tests import tiny
from tests.vae import save_tiny_vae

GPU, CPU = torch.device("cuda"), torch.device("cpu")
FULL, SHORT = ["ieee"] * 3, ["tf32"] * 3


def switches() -> list[str]:
    """What GPUs would do with products of fp32: of matrices, in convolutions, in recurrent networks."""
    backends: Any = torch.backends
    return [part.fp32_precision for part in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)]


@pytest.fixture(autouse=True)
def _switches_as_before() -> Any:
    with products("fp32"):
        yield


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "tf32")])
def test_auto_is_what_is_fast_on_the_device(has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert in_effect("auto", GPU, "sampler.precision") == precision
    assert in_effect("auto", CPU, "sampler.precision") == "fp32"
    for asked in ("fp32", "bf16"):
        assert in_effect(asked, CPU, "sampler.precision") == asked
    assert in_effect("tf32", GPU, "sampler.precision") == "tf32"


def test_tf32_is_refused_where_there_is_none(shards: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, shards, **{"sampler.precision": "tf32"})
    with pytest.raises(ConfigError, match=r"sampler\.precision=tf32 needs a GPU, and this process has cpu; use fp32"):
        build_field(config, build_model(config), 3)


def test_products_are_set_inside_and_set_back() -> None:
    set_products("tf32")
    with products("fp32"):
        assert switches() == FULL  # cuDNN's convolutions too, which are in TF32 by default
        with products("bf16"):
            assert switches() == SHORT
        assert switches() == FULL
    assert switches() == SHORT


@pytest.mark.parametrize(("precision", "expected"), [("fp32", FULL), ("bf16", SHORT)])
def test_training_sets_them_for_its_steps(precision: str, expected: list[str], shards: Path, tmp_path: Path) -> None:
    build_run(open_run(tiny.config(tmp_path, shards, **{"train.precision": precision})), CPU)
    assert switches() == expected


def seen_in(module: nn.Module, work: Callable[[], Any]) -> list[tuple[list[str], bool]]:
    """The switches, and whether autocast is on, at every pass through a module."""
    seen: list[tuple[list[str], bool]] = []
    hook = module.register_forward_hook(lambda *_: seen.append((switches(), torch.is_autocast_enabled("cpu"))))
    work()
    hook.remove()
    return seen


@pytest.mark.parametrize("energy", ["none", "dot"])
@pytest.mark.parametrize(("precision", "expected"), [("fp32", (FULL, False)), ("bf16", (SHORT, True))])
def test_a_field_is_computed_in_the_samplers_precision_and_given_in_fp32(
    precision: str, expected: tuple[list[str], bool], energy: str, shards: Path, tmp_path: Path
) -> None:
    settings = {"sampler.precision": precision, "sampler.cfg_scale": 2.0, "objective.energy": energy}
    config = tiny.config(tmp_path, shards, **settings, **{"model.zero_init": False})
    model = build_model(config)
    found: list[Tensor] = []
    x, labels = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    field = build_field(config, model, 3)
    assert seen_in(model, lambda: found.append(field(x, labels, torch.zeros(2)))) == [expected]
    assert found[0].dtype == torch.float32
    exact = build_field(with_precision(config, "fp32"), model, 3)(x, labels, torch.zeros(2))
    error = (found[0] - exact).norm() / exact.norm()
    assert (error > 1e-4) == (precision == "bf16")  # the products were rounded: to 8 bits, or not at all
    assert error < 0.05


def with_precision(config: Config, precision: str) -> Config:
    from eqm_dist.options import with_overrides

    return with_overrides(config, {"sampler.precision": precision})


def test_features_and_decoders_compute_in_fp32_wherever_they_are_asked(tmp_path: Path) -> None:
    set_products("tf32")
    images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    extractor = load_extractor("digits")
    for work in (
        lambda: image_statistics(extractor, [images], parts=[MOMENTS]),
        lambda: feature_moments(extractor, [images]),
    ):
        assert seen_in(extractor, work) == [(FULL, False)]
    autoencoder: Any = load_autoencoder(str(save_tiny_vae(tmp_path / "vae")))
    assert seen_in(autoencoder._vae.decoder, lambda: autoencoder.decode(torch.zeros(1, 4, 2, 2))) == [(FULL, False)]
    assert seen_in(autoencoder._vae.encoder, lambda: autoencoder.encode(torch.zeros(1, 8, 8, 3).byte())) == [
        (FULL, False)
    ]
    assert switches() == SHORT


def test_only_a_run_that_asks_for_it_is_deterministic(shards: Path, tmp_path: Path) -> None:
    for asked in (True, False):
        opened = open_run(tiny.config(tmp_path, shards, **{"run.name": f"{asked}", "train.deterministic": asked}))
        build_run(opened, CPU)
        assert torch.are_deterministic_algorithms_enabled() == asked


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu avx2 amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("Features\t: fp asimd", False),
        ("processor\t: 0", True),  # it does not say
    ],
)
def test_bf16_on_a_processor_that_emulates_it_is_warned_of(
    flags: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    assert precision.cpu_has_bf16(tmp_path / "cpuinfo") is has
    assert precision.cpu_has_bf16(tmp_path / "missing")
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)  # the processor
    precision._warn_of_emulation.cache_clear()
    for _ in range(2):
        assert precision.in_effect("bf16", CPU, "train.precision") == "bf16"
    sentence = "train.precision=bf16 is over ten times slower than fp32 on this processor"
    assert [sentence in line for line in caplog.messages] == [True] * (not has)  # once
