"""The config: it survives YAML, refuses what it does not know, and says in one sentence what is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.build import build_model
from eqm_dist.config import Config
from eqm_dist.derived import derive
from eqm_dist.errors import ConfigError
from eqm_dist.options import dump, flatten, options, parse, read_yaml, suggestion, to_yaml, with_overrides
from eqm_dist.presets import PRESETS, digits

KEYS = [option.key for option in options(Config)]

VALUES: dict[str, st.SearchStrategy[Any]] = {
    # Text that YAML would take for something else if it were not quoted.
    "run.root": st.none() | st.sampled_from(["null", "yes", "1e3", "~/runs", "a: b", "# runs", "ru\u0308ns"]),
    "run.seed": st.integers(0, 2**64 - 1),
    "optimizer.learning_rate": st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    "optimizer.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2).map(list),
    "optimizer.ema_decays": st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4, unique=True),
    "optimizer.gradient_clip": st.none() | st.floats(1e-6, 1e6),
    "data.flip": st.booleans(),
    "data.latent_shape": st.builds(lambda channels, half: [channels, 2 * half, 2 * half], *[st.integers(1, 99)] * 2),
    "objective.decay.family": st.sampled_from(["constant", "linear", "truncated", "piecewise"]),
    "engine.zero_stage": st.none() | st.integers(0, 3),
    "engine.deepspeed": st.just({}) | st.just({"zero_optimization": {"overlap_comm": True}, "dump_state": False}),
    "sampler.step_size": st.floats(1e-9, 1e3),
}  # no two of them contradict each other, whatever the values

some_overrides = st.fixed_dictionaries({}, optional=VALUES)


def sampler(name: str, **options: Any) -> dict[str, Any]:
    """Overrides for another sampler than the preset's."""
    return {f"sampler.{key}": value for key, value in {"name": name, **options}.items()}


# --- there and back ---


@given(some_overrides)
def test_a_config_survives_yaml(overrides: dict[str, Any]) -> None:
    config = with_overrides(digits(), overrides)
    flat, given = flatten(dump(config), Config), {key: value for key, value in overrides.items() if value is not None}
    assert {key: flat[key] for key in given} == given
    assert parse(Config, yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_file_overrides_a_preset_with_every_key(preset: str, tmp_path: Path) -> None:
    config = PRESETS[preset]()
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    values = read_yaml(str(file), Config)
    assert sorted(values) == sorted(KEYS)
    assert [with_overrides(start(), values) for start in PRESETS.values()] == [config] * len(PRESETS)


@given(st.lists(st.sampled_from(list(VALUES)), unique=True), st.data())
def test_overrides_of_different_keys_commute(keys: list[str], data: st.DataObject) -> None:
    overrides = {key: data.draw(VALUES[key]) for key in keys}
    at = data.draw(st.integers(0, len(keys)))
    first, second = ({key: overrides[key] for key in part} for part in (keys[:at], keys[at:]))
    together = with_overrides(digits(), overrides)
    assert with_overrides(digits(), dict(reversed(overrides.items()))) == together
    assert with_overrides(with_overrides(digits(), first), second) == together
    assert with_overrides(with_overrides(digits(), second), first) == together


def test_overrides_leave_the_config_they_start_from() -> None:
    config = digits()
    assert with_overrides(config, {"train.steps": 7}).train.steps == 7
    assert config == digits()


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        digits().train.steps = 7  # pyright: ignore[reportAttributeAccessIssue]


# --- unknown keys ---


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.step", "train.steps"),
        ("data.shard", "data.shards"),
        ("sampler.stepsize", "sampler.step_size"),
        ("checkpoint.evry", "checkpoint.every"),  # and not evaluation.every
        ("evaluation.evry", "evaluation.every"),
        ("optimzer.learning_rate", "optimizer.learning_rate"),
        ("train.learning_rate", "optimizer.learning_rate"),  # right name, wrong section
        ("learning_rate", "optimizer.learning_rate"),
        ("evaluation.sampler.momentum", "sampler.momentum"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(key: str, meant: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_overrides(digits(), {key: 1}, "run.yaml")
    assert str(raised.value) == f"{key} is not an option (run.yaml); did you mean {meant}?"


def test_an_unknown_key_like_no_other_points_to_help() -> None:
    with pytest.raises(ConfigError) as raised:
        with_overrides(digits(), {"zebra.quagga": 1}, "run.yaml")
    assert str(raised.value) == "zebra.quagga is not an option (run.yaml); see --help for all keys."


@pytest.mark.parametrize("key", ["run.name.first", "train.", ".train", "", "sampler.name.x"])
def test_a_key_with_an_unknown_parent_is_unknown(key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key} is not an option (the overrides); ")):
        with_overrides(digits(), {key: 1})


def test_a_letter_left_out_is_always_found() -> None:
    meant: dict[str, list[str]] = {}  # rtol and atol are two: either is found
    for key in KEYS:
        for at in range(key.rindex(".") + 1, len(key)):
            meant.setdefault(key[:at] + key[at + 1 :], []).append(f"did you mean {key}?")
    assert [typo for typo, keys in meant.items() if suggestion(typo, KEYS) not in keys] == []


# --- wrong values ---


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"train.steps": "many"}, "train.steps: should be a valid integer"),
        ({"train.steps": 2.5}, "train.steps: should be a valid integer, got a number with a fractional part, got 2.5"),
        ({"train.steps": 0}, "train.steps: should be greater than 0, got 0"),
        ({"train.steps": True}, "train.steps: should not be true or false, got True"),
        ({"train.steps": None}, "train.steps: should be a valid integer, got None"),
        ({"train": 5}, "train: should be a valid dictionary"),
        ({"run.name": 2024}, "run.name: should be a valid string, got 2024"),
        ({"run.name": "../up"}, "run.name: String should match pattern"),
        ({"run.name": "x" * 101}, "run.name: String should have at most 100 characters"),
        ({"run.seed": 2**64}, "run.seed: should be less than 18446744073709551616, got 18446744073709551616"),
        ({"data.flip": "perhaps"}, "data.flip: should be a valid boolean"),
        ({"data.latent_shape": [1, 8]}, "data.latent_shape.2 must be given"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate: should be a finite number, got nan"),
        ({"optimizer.learning_rate": False}, "optimizer.learning_rate: should not be true or false, got False"),
        ({"optimizer.ema_decays": []}, "optimizer.ema_decays: Tuple should have at least 1 item"),
        ({"optimizer.ema_decays": [0.9, 1.0]}, "optimizer.ema_decays.1: should be less than 1, got 1.0"),
        (
            {"launch.workers": 0},
            "launch.workers: should be a number of workers, auto, or the fewest and the most as [1,4], got 0",
        ),
        ({"launch.workers": [0, 2]}, "launch.workers: should be a number of workers, auto, or the fewest and the most"),
        ({"launch.workers": [4, 1]}, "launch.workers: should be a number of workers, auto, or the fewest and the most"),
        ({"launch.workers": [2, 2]}, "launch.workers: should be a number of workers, auto, or the fewest and the most"),
        (
            {"launch.workers": [1, 2, 3]},
            "launch.workers: should be a number of workers, auto, or the fewest and the most",
        ),
        ({"launch.workers": "many"}, "launch.workers: should be a number of workers, auto, or the fewest and the most"),
        ({"launch.max_failures": -2}, "launch.max_failures: should be greater than or equal to -1, got -2"),
        ({"objective.energy": "cross"}, "objective.energy: should be 'none', 'dot' or 'l2', got 'cross'"),
    ],
)
def test_a_wrong_value_is_named(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        with_overrides(digits(), overrides, "run.yaml")
    assert str(raised.value).startswith(sentence)
    assert str(raised.value).endswith(" (run.yaml).")


def test_one_sentence_for_several_wrong_values() -> None:
    with pytest.raises(ConfigError) as raised:
        with_overrides(digits(), {"train.steps": 0, "train.global_batch": 0, "run.seed": -1})
    first = "run.seed: should be greater than or equal to 0, got -1 (the overrides)."
    assert str(raised.value) == f"{first} (2 more of the kind.)"


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        ({"run.name": "data"}, "name data is taken by what all runs share"),
        ({"run.name": "mlflow-artifacts"}, "name mlflow-artifacts is taken"),
        ({"run.name": "mlflow.db"}, "name mlflow.db is taken"),
        ({"model.size": "B", "model.depth": 4}, "depth=4 contradicts size=B, which fixes it to 12; leave it out"),
        ({"model.hidden_size": None}, "model: hidden_size must be given with size=custom"),
        ({"objective.decay.family": "linear", "objective.decay.decay_start": 0.5}, "decay_start has no effect with"),
        (
            {"objective.decay.decay_value": 1.0},
            "decay_value has no effect with family=truncated; leave it out or use family=piecewise",
        ),
        (
            {"objective.kind": "time_free_flow_matching", "objective.decay.gradient_scale": 1.0},
            "decay has no effect with kind=time_free_flow_matching",
        ),
        (
            {"objective.kind": "flow_matching", "objective.energy": "dot", "evaluation.every": 0},
            "energy=dot contradicts kind=flow_matching, which fixes it to none; leave it out or use kind=eqm or",
        ),
        (
            {"objective.kind": "self_stopping", "objective.decay.gradient_scale": 1.0},
            "decay has no effect with kind=self_stopping",
        ),
        ({"objective.braking_start": 0.5}, "braking_start has no effect with kind=eqm; leave it out or use kind=self"),
        ({"objective.weighting.floor": 0.5}, "floor has no effect with kind=none; leave it out or use kind=relative"),
        (
            {"objective.weighting.kind": "relative", "objective.weighting.snr_limit": 5},
            "snr_limit has no effect with kind=relative; leave it out or use kind=min_snr",
        ),
        (
            {"objective.weighting.kind": "relative", "objective.decay.family": "constant"},
            "weighting.kind=relative has no effect on a target of constant length",
        ),
        (
            {"objective.weighting.kind": "relative", "objective.kind": "time_free_flow_matching"},
            "weighting.kind=relative has no effect on a target of constant length",
        ),
        ({"objective.dispersive.group": 16}, "group has no effect without a weight above 0; leave it out"),
        (
            {"objective.dispersive.weight": 0.5, "objective.energy": "dot"},
            "dispersive.weight needs a model that is called once and plainly, which energy=dot does not do",
        ),
        ({"optimizer.ema_decays": [0.9, 0.99, 0.9]}, "ema_decays must differ from each other, got [0.9, 0.99, 0.9]"),
        ({"train.micro_batch": 129}, "micro_batch=129 must be at most global_batch=128"),
        ({"engine.kind": "torch", "engine.zero_stage": 1}, "zero_stage has no effect with kind=torch"),
        (
            {"launch.launcher": "local", "launch.workers": 2},
            "workers=2 contradicts launcher=local, which fixes it to 1",
        ),
        (
            {"launch.launcher": "local", "launch.cpus_per_worker": 1},
            "cpus_per_worker has no effect with launcher=",
        ),
        (
            {"launch.launcher": "local", "launch.resize_check_s": 30},
            "resize_check_s has no effect without workers as [fewest,most]",
        ),
        (
            {"launch.launcher": "local", "launch.hang_deadline_s": 9},
            "hang_deadline_s has no effect with launcher=local",
        ),
        ({"launch.workers": 2, "launch.resize_check_s": 30}, "resize_check_s has no effect without workers as"),
        ({"launch.launcher": "local", "engine.kind": "deepspeed"}, "engine.kind=deepspeed has no effect with launch"),
        (
            {"track.mlflow_uri": "http://me:secret@host"},
            "track.mlflow_uri: must not hold a user, a password or a query",
        ),
        ({"objective.energy": "dot", "engine.zero_stage": 3}, "use engine.zero_stage 0, 1 or 2"),
        (
            {"objective.energy": "dot", "train.activation_checkpointing": True},
            "needs all activations for both passes; use train.activation_checkpointing=false",
        ),
        (
            {"engine.kind": "torch", "engine.offload": "cpu"},
            "offload=cpu contradicts kind=torch, which fixes it to none",
        ),
        ({"launch.launcher": "local", "engine.offload": "cpu"}, "engine.offload=cpu has no effect with launch"),
        ({"engine.zero_stage": 0, "engine.offload": "cpu"}, "offload=cpu needs a state that is partitioned"),
        ({"engine.offload": "nvme"}, "would keep the state in files of DeepSpeed's that our checkpoints cannot see"),
        (
            {"engine.kind": "torch", "engine.deepspeed": {"dump_state": True}},
            "contradicts kind=torch, which fixes it to {}",
        ),
        (
            {"engine.deepspeed": {"zero_optimization": {"stage": 1}}},
            "deepspeed.zero_optimization.stage is what engine.zero_stage is for; use that and leave this out",
        ),
        (
            {"engine.deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            "deepspeed.zero_optimization.offload_optimizer.device is what engine.offload is for",
        ),
        ({"engine.deepspeed": {"train_batch_size": 8}}, "deepspeed.train_batch_size is what train.global_batch is for"),
        ({"engine.deepspeed": {"bf16": {"enabled": True}}}, "deepspeed.bf16 is what train.precision is for"),
        ({"engine.deepspeed": {"elasticity": {"enabled": True}}}, "is none of what can be passed on (zero_optim"),
        (
            {"engine.deepspeed": {"zero_optimisation": {}}},
            "deepspeed.zero_optimisation is none of what can be passed on",
        ),
        ({"engine.deepspeed": 3}, "engine.deepspeed: should be a valid dictionary, got 3"),
        (
            {"engine.deepspeed": {"communication_data_type": "bf16"}, "train.precision": "bf16"},
            "communication_data_type has no effect with train.precision=bf16 and ZeRO 1 to 3, where DeepSpeed sums",
        ),
        ({"train.guard.spike_factor": 5}, "spike_factor has no effect with skip=non_finite; leave it out or use skip="),
        ({"train.guard.skip": "none", "train.guard.max_skips": 5}, "max_skips has no effect with skip=none"),
        ({"launch.launcher": "local", "engine.zero_stage": 0}, "engine.zero_stage=0 has no effect with launch"),
        (
            {"sampler.name": "gd", "sampler.momentum": 0.3},
            "momentum has no effect with name=gd; leave it out or use name=nag",
        ),
        ({"sampler.guided_channels": 1}, "guided_channels has no effect without a cfg_scale other than 1"),
        ({"track.mlflow": False, "track.mlflow_uri": "x"}, "mlflow_uri has no effect with mlflow=false"),
        ({"track.mlflow": False, "track.experiment": "x"}, "experiment has no effect with mlflow=false"),
        ({"track.mlflow": False, "track.timeout_s": 1}, "timeout_s has no effect with mlflow=false"),
        (
            {"data.latent_shape": [1, 8, 6]},
            "latents must be square, got data.latent_shape=[1, 8, 6]; prepare the shards anew",
        ),
        ({"data.latent_shape": [1, 9, 9]}, "multiple of model.patch_size=2, got data.latent_shape=[1, 9, 9]"),
        ({"objective.energy": "l2"}, "objective.energy=l2 cannot start from a zero output layer"),
        ({"objective.kind": "flow_matching"}, "name=nag descends a field that is blind to time"),
        (
            {"objective.kind": "flow_matching", **sampler("euler", horizon=2.0)},
            "horizon=2 has no effect on objective.kind=flow_matching",
        ),
        (sampler("dopri5"), "horizon must be given for sampler.name=dopri5 with objective.kind=eqm"),
        (
            sampler("euler", step_size=0.1),
            "step_size has no effect with name=euler; leave it out or use name=gd, nag or adam",
        ),
        (sampler("heun", stop_norm=0.1), "stop_norm has no effect with name=heun"),
        (sampler("heun", horizon=1.0, nfe=25), "nfe=25 must be even for heun"),
        (
            sampler("euler", horizon=1.0, rtol=1e-3),
            "rtol has no effect with name=euler; leave it out or use name=dopri5",
        ),
        (sampler("gd", horizon=1.0), "horizon has no effect with name=gd"),
        (sampler("gd", atol=1.0), "atol has no effect with name=gd"),
        (sampler("gd", final_step_size=0.1), "final_step_size has no effect with step_policy=constant"),
        (sampler("adam", step_policy="backtracking"), "step_policy=backtracking judges steps along the field"),
        (
            sampler("gd", guidance_interval=[0.0, 0.5]),
            "guidance_interval has no effect without a cfg_scale other than 1",
        ),
        (sampler("gd", guidance_interval=[0.5, 0.5], cfg_scale=2.0), "guidance_interval must rise, got [0.5, 0.5]"),
    ],
)
def test_options_that_contradict_each_other_are_refused(overrides: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fragment)) as raised:
        with_overrides(digits(), overrides, "run.yaml")
    assert str(raised.value).endswith(" (run.yaml).")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["euler", "heun", "dopri5"])
def test_flow_matching_is_evaluated_by_integration(name: str) -> None:
    config = with_overrides(digits(), {"objective.kind": "flow_matching", **sampler(name)})
    assert config.evaluation.every


# --- files ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: [1, 2", "is not valid YAML: "),
        ("- train", "holds list."),
        ("", "holds NoneType."),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_a_file_that_is_not_a_config_is_named(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(sentence)) as raised:
        read_yaml(str(file), Config)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        read_yaml("nowhere.yaml", Config)
    expected = "--config must name a readable YAML file, got nowhere.yaml (No such file or directory)."
    assert str(raised.value) == expected


def test_a_file_may_nest_keys_or_dot_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: 7}\nsampler.step_size: 1e-3\nsampler: {name: nag}\n")
    values = read_yaml(str(file), Config)
    assert values == {
        "train.steps": 7,
        "sampler.step_size": "1e-3",  # YAML 1.1 takes it for text; the config makes a number of it
        "sampler.name": "nag",
    }
    assert with_overrides(digits(), values).sampler.step_size == 1e-3


def test_a_mapping_is_one_value(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("engine: {zero_stage: 3, deepspeed: {zero_optimization: {sub_group_size: 1000}}}\n")
    values = read_yaml(str(file), Config)
    assert values == {"engine.zero_stage": 3, "engine.deepspeed": {"zero_optimization": {"sub_group_size": 1000}}}
    assert with_overrides(digits(), values).engine.deepspeed == values["engine.deepspeed"]


# --- keys and presets ---


def test_every_key_is_described() -> None:
    assert [option.key for option in options(Config) if not option.field.description] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_can_be_built_and_says_what_it_is(preset: str) -> None:
    config = PRESETS[preset]()
    assert config.run.name == preset
    with torch.device("meta"):
        model = build_model(config)
        latents, labels = torch.zeros(2, *config.data.latent_shape), torch.zeros(2, dtype=torch.int64)
        assert model(latents, labels).shape == latents.shape
    parameters = sum(param.numel() for param in model.parameters())
    assert derive(config).parameters == parameters
    text = " ".join((PRESETS[preset].__doc__ or "").split())
    for part in ("Source: ", "Cost: ", "Expected: ", "Command: ``python pipelines/train.py"):
        assert part in text
    flag = f"--preset {preset}"
    assert (flag in text) == (preset != "digits")
