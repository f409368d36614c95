"""Training, sampling and evaluation on a GPU that is not there (``tests.fake_gpu``).

Nothing of the CPU meets it, and the host waits for it only where this file gives the reason.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eqm_dist.build import (
    OpenRun,
    build_autoencoder,
    build_evaluator,
    build_field,
    build_model,
    build_run,
    build_sampling_method,
)
from eqm_dist.core import sampling
from eqm_dist.core.sampling import SamplingMethod, in_order, sample_queue
from eqm_dist.data.loader import Loader, ShardReader
from eqm_dist.data.order import SampleOrder
from eqm_dist.evaluate.generate import Generated, generate
from eqm_dist.open_run import open_run
from eqm_dist.train.loop import _update, train
from tests import fake_gpu, tiny
from tests.fake_gpu import DEVICE, rehearsed

pytestmark = pytest.mark.multiprocess

START = {
    "build.py build_run": "weights are made on the CPU, once",
    "train/step.py ModelWithLoss.frozen_parameters.<locals>.<dictcomp>": "for checkpoints, once",
}
STEP = {"train/engine.py TorchEngine.step": "the guard judges by the norm before anything changes"}
REPORT = {
    "train/meters.py Meters.report": "a line of progress holds numbers",
    "train/grad_norms.py GradientNorms.report": "a line of progress holds numbers",
}
EMA = {"train/checkpoint.py whole_state": "EMA weights are measured, exported or compared"}
ONLY = "core/sampling.py _Batch.only"
LEAVE = {
    "core/sampling.py sample_queue": "which samples have ended decides which begin; looked at every fourth evaluation",
    ONLY: "samples leave: the host says which are left",
}
ONCE = {"core/ode.py _on_device": "coefficients, kept for the next evaluation"}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "eqm": {},
    "piecewise, relative": {"objective.decay.family": "piecewise", "objective.weighting.kind": "relative"},
    "linear, min_snr": {"objective.decay.family": "linear", "objective.weighting.kind": "min_snr"},
    "self_stopping": {"objective.kind": "self_stopping", "objective.weighting.kind": "relative"},
    "flow_matching": {"objective.kind": "flow_matching"},
    "time_free": {"objective.kind": "time_free_flow_matching", "objective.weighting.kind": "min_snr"},
    "dot": {"objective.energy": "dot"},
    "l2": {"objective.energy": "l2", "model.zero_init": False},
    "dispersive": {"objective.dispersive.weight": 0.5, "objective.dispersive.group": 2},
    "qk_norm, learn_sigma": {"model.qk_norm": True, "model.learn_sigma": True},
    "checkpointed": {"train.activation_checkpointing": True},
    "bf16": {"train.precision": "bf16"},
}
# A norm is summed over all tensors at once there and one by one on a CPU, which moves clipped gradients by 1e-7.
CLOSE = 1e-6
# Autocast leaves other operations in fp32 on a GPU than on a CPU: two digits of updates of 1e-4.
CLOSE_IN_BF16 = 5e-6


def updated(runs: list[OpenRun], device: torch.device) -> list[Tensor]:
    """The weights of each run after two updates, one of two micro-batches and accumulated."""
    found = []
    for opened in runs:
        run = build_run(opened, device)
        for batch in run.loader.batches(0, 2):
            _update(run, batch)
            run.state.count_step()
        with fake_gpu.aside():
            weights = [piece.values.clone() for piece in run.engine.fragments() if piece.state == "weight"]
            found.append(torch.cat(weights))
    return found


def test_every_objective_is_updated_without_a_wait_but_the_guards(shards: Path, tmp_path: Path) -> None:
    common = {"train.global_batch": 8, "train.micro_batch": 4, "optimizer.gradient_clip": 1.0,
              "train.log_grad_norms": True, "optimizer.warmup_steps": 0,
              "optimizer.eps": 1e-2}  # fmt: skip  # so that an update is as exact as its gradient
    objectives = {**OBJECTIVES, "flip": {"data.flip": True, "data.shards": str(tiny.write_blots(tmp_path / "m", True))}}
    runs = [
        open_run(tiny.config(tmp_path, shards, **{**common, "run.name": f"{at}", **objective}))
        for at, objective in enumerate(objectives.values())
    ]
    found = rehearsed(updated, runs, DEVICE, waits=START | STEP)
    for name, there, here in zip(objectives, found, updated(runs, torch.device("cpu")), strict=True):
        assert (there - here).abs().max() < (CLOSE_IN_BF16 if name == "bf16" else CLOSE), name


def test_without_a_guard_an_update_never_waits(shards: Path, tmp_path: Path) -> None:
    opened = open_run(tiny.config(tmp_path, shards, **{"train.guard.skip": "none"}))
    rehearsed(updated, [opened], DEVICE, waits=START)


def trained(opened: OpenRun, device: torch.device) -> dict[str, Tensor]:
    run = build_run(opened, device)
    train(run)
    return run.ema_weights()


def test_a_whole_run_is_that_of_the_cpu(shards: Path, tmp_path: Path) -> None:
    settings = {
        "train.log_grad_norms": True, "train.guard.skip": "spikes", "optimizer.gradient_clip": 1.0, "data.workers": 1,
    }  # fmt: skip
    there, here = (open_run(tiny.config(tmp_path / name, shards, **settings)) for name in ("there", "here"))
    found = rehearsed(trained, there, DEVICE, waits=START | STEP | REPORT | EMA)
    for name, expected in trained(here, torch.device("cpu")).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=CLOSE, msg=name)


SAMPLERS: dict[str, dict[str, Any]] = {
    "gd": {},
    "gd, decay": {"sampler.step_policy": "decay"},
    "gd, backtracking": {"sampler.step_policy": "backtracking", "sampler.step_size": 0.3},
    "nag": {"sampler.name": "nag"},
    "nag, backtracking": {"sampler.name": "nag", "sampler.step_policy": "backtracking"},
    "adam": {"sampler.name": "adam"},
    "euler": {"sampler.name": "euler", "sampler.horizon": 0.5},
    "heun": {"sampler.name": "heun", "sampler.horizon": 0.5},
    "flow matching": {"objective.kind": "flow_matching", "sampler.name": "euler"},
    "energy": {"objective.energy": "dot"},
    "guided": {"sampler.cfg_scale": 2.0},
    "guided channels": {"sampler.cfg_scale": 2.0, "sampler.guided_channels": 1},
    "bf16": {"sampler.precision": "bf16", "sampler.cfg_scale": 2.0},
}


def drawn(configs: list[Any], device: torch.device) -> list[Tensor]:
    """Images of each config's model, seven with three under way at once."""
    return [_drawn(config, device).images for config in configs]


def _drawn(config: Any, device: torch.device) -> Generated:
    model = build_model(config)
    with fake_gpu.aside():
        model.to(device)
    return generate(
        build_field(config, model, config.data.num_classes),
        indices=torch.arange(7, device=device),
        labels=torch.arange(7, device=device) % 3,
        latent_shape=config.data.latent_shape,
        method=build_sampling_method(config.sampler),
        seed=0,
        decode=build_autoencoder(ShardReader(config.data.shards).manifest).decode,
        batch=3,
    )


def sampled(shards: Path, tmp_path: Path, **settings: Any) -> Any:
    return tiny.config(tmp_path, shards, **{"sampler.nfe": 6, "model.zero_init": False, **settings})


def test_samplers_wait_only_where_samples_leave(shards: Path, tmp_path: Path) -> None:
    configs = [sampled(shards, tmp_path, **settings) for settings in SAMPLERS.values()]
    found = rehearsed(drawn, configs, DEVICE, waits=ONCE | {ONLY: LEAVE[ONLY]})
    for name, there, here in zip(SAMPLERS, found, drawn(configs, torch.device("cpu")), strict=True):
        # Of 256 levels: rounding may turn one, in bf16 two.
        assert (there.int() - here.int()).abs().max() <= (2 if name == "bf16" else 1), name


def test_an_interval_of_guidance_waits_for_who_is_inside(shards: Path, tmp_path: Path) -> None:
    config = sampled(shards, tmp_path, **{"sampler.cfg_scale": 2.0, "sampler.guidance_interval": [0.2, 0.7]})
    # To guide all would double the work of those outside, which costs more than a look.
    inside = {"core/guidance.py _within": "who is guided decides the size of the batch"}
    (found,) = rehearsed(drawn, [config], DEVICE, waits={ONLY: LEAVE[ONLY]} | inside)
    (expected,) = drawn([config], torch.device("cpu"))
    assert (found.int() - expected.int()).abs().max() <= 1


STOPS: dict[str, dict[str, Any]] = {
    "norm": {"sampler.stop_norm": 0.25, "sampler.step_size": 0.1},
    "ratio": {"sampler.stop_ratio": 0.4, "sampler.step_size": 0.1, "sampler.name": "nag"},
    "dopri5": {"sampler.name": "dopri5", "sampler.horizon": 2.0, "sampler.rtol": 1e-2},
}


def stopped(methods: list[SamplingMethod], device: torch.device) -> list[tuple[dict[str, Tensor], int]]:
    """Eleven samples of a field that is a function of each value alone, four at once; and how often it was asked."""
    starts = torch.linspace(-2, 2, 11 * 5).view(11, 5)
    with fake_gpu.aside():
        starts = starts.to(device)
    return [_stopped(method, starts) for method in methods]


def _stopped(method: SamplingMethod, starts: Tensor) -> tuple[dict[str, Tensor], int]:
    calls = 0

    def field(x: Tensor, rows: Tensor, time: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -x * (1 + rows[:, None] / 5)

    rows = torch.arange(len(starts), device=starts.device)
    return vars(in_order(list(sample_queue(field, starts.__getitem__, rows, method, slots=4)))), calls


def test_looking_for_stops_at_every_fourth_evaluation_changes_no_sample(shards: Path, tmp_path: Path) -> None:
    methods = [build_sampling_method(sampled(shards, tmp_path, **{"sampler.nfe": 40, **stop}).sampler)
               for stop in STOPS.values()]  # fmt: skip
    found = rehearsed(stopped, methods, DEVICE, waits=LEAVE | ONCE)
    for name, (there, asked), (here, needed) in zip(STOPS, found, stopped(methods, torch.device("cpu")), strict=True):
        for part in ("samples", "nfe", "complete"):  # to the last bit, for the field sums nothing
            assert torch.equal(there[part], here[part]), f"{name}: {part}"
        assert len(set(here["nfe"].tolist())) > 2, name
        assert needed < asked < needed + sampling.LOOK_EVERY * len(here["nfe"]), name


def test_the_host_looks_no_more_often_than_every_fourth_evaluation(shards: Path, tmp_path: Path) -> None:
    method = build_sampling_method(sampled(shards, tmp_path, **{"sampler.nfe": 40, **STOPS["norm"]}).sampler)
    looks, calls = rehearsed(looks_of, method, waits=LEAVE)
    assert looks == calls // sampling.LOOK_EVERY


def looks_of(method: SamplingMethod) -> tuple[int, int]:
    (_, calls), *_ = stopped([method], DEVICE)
    return sum(n for wait, n in fake_gpu.waits().items() if wait.place == "core/sampling.py sample_queue"), calls


def evaluated(opened: OpenRun, directory: Path, device: torch.device) -> dict[str, float]:
    config = opened.config
    reader = ShardReader(config.data.shards or "")
    evaluator = build_evaluator(config, directory, reader, device)
    return evaluator(build_model(config).state_dict(), step=1)[0]


MEASURE = {
    "build.py build_evaluator": "weights are made on the CPU, once",
    "evaluate/evaluator.py Evaluator.__call__": "the weights to be measured",
    "evaluate/evaluator.py Evaluator._of_all_ranks": "the NFE is a number of the record",
    "evaluate/evaluator.py Evaluator._first_images": "a picture is drawn",
    "evaluate/evaluator.py Evaluator._yardstick": "features of real images come back from host memory, once",
    "evaluate/images.py TrainingImages.read": "real images come from the disk",
    "evaluate/metrics.py half_split_fid.<locals>.<genexpr>": "which features are of which half",
    "evaluate/metrics.py frechet_distance": "a figure is a number",
    "evaluate/metrics.py _metric": "torchmetrics makes its sums on the CPU",
    "evaluate/metrics.py FeatureMoments.to": "statistics travel",
    "evaluate/statistics.py extract": "features that are no numbers are refused",
    "evaluate/statistics.py image_statistics": "rows of features are kept in host memory",
}


def test_an_evaluation_gives_the_figures_of_the_cpu(shards: Path, tmp_path: Path) -> None:
    from eqm_dist.evaluate.features import ImageClassifier, save_classifier

    torch.manual_seed(0)
    extractor = tmp_path / "classifier.safetensors"
    extractor.write_bytes(save_classifier(ImageClassifier((4, 4, 1), 3)))
    settings = {
        "sampler.nfe": 6, "model.zero_init": False, "evaluation.every": 2, "evaluation.samples": 100,
        "evaluation.batch": 32, "evaluation.extractor": str(extractor),
        "evaluation.metrics": ["fid", "is", "precision"],
    }  # fmt: skip
    opened = open_run(tiny.config(tmp_path, shards, **settings))
    found = rehearsed(evaluated, opened, tmp_path / "there", DEVICE, waits=MEASURE | {ONLY: LEAVE[ONLY]})
    expected = evaluated(opened, tmp_path / "here", torch.device("cpu"))
    # A pixel may be a level off; so few samples have a FID that this moves in the fourth digit.
    assert found == pytest.approx(expected, rel=1e-3)


def batches_of(shards: Path, device: torch.device) -> list[Tensor]:
    reader = ShardReader(shards)
    loader = Loader(reader, SampleOrder(reader.shard_sizes, 0, 2), global_batch=5, rank=0, world=1, workers=1)
    return [batch.to(device).moments for batch in loader.batches(0, 3)]


def test_a_batch_is_copied_without_a_wait(shards: Path) -> None:
    for there, here in zip(
        rehearsed(batches_of, shards, DEVICE, waits={}), batches_of(shards, torch.device("cpu")), strict=True
    ):
        assert torch.equal(there, here)


def test_the_rehearsal_notices_what_a_gpu_would(shards: Path) -> None:
    """So that none of the others passes because nothing is looked at."""
    for function, complaint in (
        (reads_in_a_field, r"eqm_dist/core/guidance.py:\d+ in _within: .*nonzero"),
        (mixes_in_a_field, r"a tensor of the CPU meets one of the device: eqm_dist/core/corruption.py:\d+ in corrupt"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            rehearsed(function, waits={})


def reads_in_a_field() -> None:
    from eqm_dist.core.guidance import guided

    field = guided(lambda x, labels, time: x, cfg_scale=2.0, null_label=0, interval=(0.0, 0.5))
    x = torch.zeros(2, 1, device=DEVICE)
    field(x, torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.zeros(2, device=DEVICE))


def mixes_in_a_field() -> None:
    from eqm_dist.core.corruption import corrupt

    x = torch.zeros(2, 1, device=DEVICE)
    corrupt(x, x, torch.zeros(2))
