"""From the options of a sampler to samples: what is built, and evaluations of real runs with it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from eqm_dist.build import build_field, build_model, build_sampler, build_sampling_method
from eqm_dist.config import Config, SamplerConfig
from eqm_dist.core.energy import ExplicitEnergy
from eqm_dist.core.guidance import guided
from eqm_dist.core.ode import Dopri5, Euler, Heun
from eqm_dist.core.samplers import (
    Adam,
    BacktrackingStep,
    ConstantStep,
    DecayingStep,
    GradientDescent,
    NesterovGradientDescent,
    Sampler,
)
from eqm_dist.core.sampling import GradientNormStop
from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.figures import nfe_histogram
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.options import parse, with_overrides
from eqm_dist.presets import digits
from eqm_dist.pretrained import Pretrained
from tests import tiny
from tests.test_config import sampler as sampler_overrides
from tests.test_track import recorded_flags

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 5, 9])
TIME = torch.tensor([0.0, 0.3, 0.6, 0.9])
SMALL = {"model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2, "model.zero_init": False}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, GradientDescent(0.003, ConstantStep())),
        ({"step_size": 0.1, "step_policy": "decay"}, GradientDescent(0.1, DecayingStep(0.01))),
        ({"step_policy": "decay", "final_step_size": 0.5}, GradientDescent(0.003, DecayingStep(0.5))),
        ({"step_policy": "backtracking"}, GradientDescent(0.003, BacktrackingStep())),
        ({"name": "nag"}, NesterovGradientDescent(0.003, 0.3)),
        (
            {"name": "nag", "momentum": 0.0, "step_policy": "backtracking"},
            NesterovGradientDescent(0.003, 0.0, BacktrackingStep()),
        ),
        ({"name": "adam", "step_size": 0.1, "step_policy": "decay"}, Adam(0.1, DecayingStep(0.01))),
        ({"name": "euler", "horizon": 1.0}, Euler(1.0)),
        ({"name": "heun", "nfe": 10, "horizon": 0.4}, Heun(0.4)),
        ({"name": "dopri5", "horizon": 1.0}, Dopri5(1.0, 1e-3, 1e-6)),
        ({"name": "dopri5", "horizon": 0.4, "rtol": 1e-2, "atol": 1e-3}, Dopri5(0.4, 1e-2, 1e-3)),
    ],
)
def test_every_sampler_is_built_from_its_options(options: dict[str, Any], expected: Sampler) -> None:
    assert build_sampler(parse(SamplerConfig, options)) == expected


def test_a_stopping_rule_is_built_where_one_is_asked_for() -> None:
    assert build_sampling_method(SamplerConfig()).stop is None
    assert build_sampling_method(SamplerConfig(stop_norm=0.1)).stop == GradientNormStop(norm=0.1)
    assert build_sampling_method(SamplerConfig(stop_ratio=0.1)).stop == GradientNormStop(ratio=0.1)


def small(**overrides: Any) -> Config:
    return with_overrides(digits(), SMALL | overrides)


def test_an_explicit_energy_is_descended_along_its_gradient() -> None:
    config = small(**{"objective.energy": "dot"})
    model = build_model(config)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ExplicitEnergy(model, "dot").energy(x, LABELS).sum(), x)
    field = build_field(config, model, 10)(X, LABELS, TIME)
    torch.testing.assert_close(field, -gradient, rtol=1e-5, atol=1e-6)  # single precision
    assert (field - model(X, LABELS)).abs().max() > 0.1 * field.abs().max()  # unlike the official script's


def test_the_field_of_flow_matching_sees_its_time() -> None:
    config = small(**{"objective.kind": "flow_matching"}, **sampler_overrides("euler"))
    model = build_model(config)
    assert torch.equal(build_field(config, model, 10)(X, LABELS, TIME), model(X, LABELS, TIME))


def test_guidance_of_the_config_ends_with_its_interval() -> None:
    guidance = {"sampler.cfg_scale": 2.0, "sampler.guidance_interval": [0.2, 0.7]}
    config = small(**guidance)
    model = build_model(config)
    field, strong = build_field(config, model, 10)(X, LABELS, TIME), guided(model, cfg_scale=2.0, null_label=10)
    torch.testing.assert_close(field[1:3], strong(X, LABELS)[1:3])
    torch.testing.assert_close(field[[0, 3]], model(X, LABELS)[[0, 3]])


def test_a_run_that_never_evaluates_is_told_of_a_wrong_sampler_when_it_is_used() -> None:
    config = small(**{"objective.kind": "flow_matching", "evaluation.every": 0})
    with pytest.raises(ConfigError, match=r"use .*name=euler, heun or dopri5"):
        build_field(config, build_model(config), 10)


def run(root: Path, **others: Any) -> tuple[tiny.Outcome, dict[str, float]]:
    from eqm_dist.track.jsonl import read_metrics

    flags = {"track.mlflow": False, "run.name": "tiny", "train.steps": 2, **others}
    ended = tiny.train(*recorded_flags(root, **flags))
    assert ended.code == 0, ended.err
    *_, last = read_metrics(root / "tiny" / "metrics.jsonl")
    return ended, last


def test_a_flow_matching_run_is_evaluated(tmp_path: Path) -> None:
    options = sampler_overrides("heun", nfe=4)
    _, metrics = run(tmp_path, **{"objective.kind": "flow_matching", **options})
    assert metrics["eval/nfe"] == 4
    assert math.isfinite(metrics["eval/fid"])


def test_samples_that_stop_by_themselves_are_counted_and_drawn(tmp_path: Path) -> None:
    options = sampler_overrides("gd", step_size=0.05, stop_ratio=0.9, nfe=40)
    _, metrics = run(tmp_path, **{"model.zero_init": False, **options})
    assert 1 < metrics["eval/nfe"] < 40
    histogram = np.asarray(Image.open(tmp_path / "tiny" / "samples" / "nfe_step00000002.png"))
    assert histogram.std() > 1


def test_samples_that_break_are_reported(tmp_path: Path) -> None:
    options = sampler_overrides("gd", step_size=1e30, nfe=40)
    ended, _ = run(tmp_path, **{"model.zero_init": False, **options})
    assert "20 of 20 samples are not finite" in ended.err + ended.out


def test_a_trained_model_stops_as_its_sampler_says() -> None:
    config = small(**sampler_overrides("gd", stop_ratio=0.999, step_size=0.05, nfe=90))
    model = Pretrained(config, build_model(config).state_dict(), "weights", autoencoder_id=IdentityAutoencoder.id)
    generated = model.generate(torch.arange(4), LABELS, seed=0, batch=2, device=torch.device("cpu"))
    assert generated.complete.all()
    assert generated.nfe.max() < 90


def test_a_trained_model_tells_of_samples_that_break(caplog: pytest.LogCaptureFixture) -> None:
    config = small(**sampler_overrides("gd", step_size=1e30, stop_norm=1e-3, nfe=40))
    model = Pretrained(config, build_model(config).state_dict(), "weights", autoencoder_id=IdentityAutoencoder.id)
    model.generate(torch.arange(4), LABELS, seed=0, batch=2, device=torch.device("cpu"))
    assert "4 of 4 samples were cut off by nfe=40" in caplog.text
    assert "4 of 4 samples are not finite" in caplog.text


def test_the_histogram_counts_every_sample_once() -> None:
    nfe = torch.tensor([3, 3, 4, 7, 150])
    (axes,) = nfe_histogram(nfe).axes
    heights = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]  # type: ignore[attr-defined]
    assert sum(height for *_, height in heights) == 5
    for left, width, height in heights:
        assert height == ((nfe > left) & (nfe < left + width)).sum()
