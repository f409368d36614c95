"""Options: their defaults, when they take effect, what a change of a variant drops, and that the record says it all."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given as generate
from hypothesis import strategies as st
from pydantic import TypeAdapter

from eqm_dist.config import Config, OptimizerConfig
from eqm_dist.data.shards import write_shards
from eqm_dist.data.sources import LabelledImage
from eqm_dist.errors import ConfigError
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.open_run import open_run
from eqm_dist.options import REQUIRED, Only, Option, dump, flatten, given, options, parse, to_yaml, with_overrides
from eqm_dist.presets import PRESETS, digits, eqm_b2
from eqm_dist.track.jsonl import read_metrics
from tests import tiny

OPTIONS = {option.key: option for option in options(Config)}


# --- defaults ---


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.key)
def test_every_default_is_a_value_of_its_option(option: Option) -> None:
    default = option.field.default if option.only is None else option.only.default
    if default is REQUIRED or callable(default) or option.field.is_required():
        return
    if default is not None or option.only is None:
        kind: Any = option.field.annotation
        TypeAdapter(kind).validate_python(default)


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.key)
def test_null_has_a_meaning_wherever_it_may_be_in_effect(option: Option) -> None:
    """An option that can be null although it takes effect says what null is, or what it becomes instead."""
    default = option.field.default if option.only is None else option.only.default
    if default is None:
        text = f" {option.field.description} "
        assert re.search(r"\bnull\b|Default: |otherwise to be given", text), option.help


def nulls(config: Config) -> list[str]:
    """The options that are null where they take effect."""
    found = []
    for key, value in flatten(dump(config), Config).items():
        only = OPTIONS[key].only if key in OPTIONS else None
        if value is not None or key == "objective.decay":
            continue
        place, _, _ = key.rpartition(".")
        section: Any = config
        for part in place.split("."):
            section = getattr(section, part)
        if (
            only is None
            or getattr(config if "." in only.option else section, only.option.rpartition(".")[2]) in only.values
        ):
            found.append(key)
    return found


MEANT = {"optimizer.gradient_clip", "train.micro_batch", "checkpoint.keep_every", "checkpoint.mirror",
         "sampler.stop_norm", "sampler.stop_ratio", "evaluation.extractor_weights", "engine.zero_stage"}  # fmt: skip
"""Options whose null is what is in effect: no limit, none, never, fetched when it is needed, by how many workers."""


class Grey:
    """Four grey images of 32x32 with four channels, of a thousand classes."""

    id = "grey"
    num_classes = 1000

    def __len__(self) -> int:
        return 4

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        for index in range(start, stop):
            yield LabelledImage(f"{index}", np.full((32, 32, 4), 100, np.uint8), index)


@pytest.mark.parametrize("preset", ["digits", "eqm-b2"])
def test_the_record_of_a_run_has_no_null_whose_effective_value_is_another(preset: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"run.root": str(tmp_path), "track.mlflow": preset == "digits"}
    if preset == "eqm-b2":
        write_shards(
            tmp_path / "grey", "grey", Grey(), IdentityAutoencoder(), samples_per_shard=4, dtype="float32", mirror=True
        )
        overrides["data.shards"] = str(tmp_path / "grey")
    config = open_run(with_overrides(PRESETS[preset](), overrides)).config
    recorded = parse(Config, yaml.safe_load((tmp_path / preset / "config.yaml").read_text()))
    assert recorded == config
    assert set(nulls(recorded)) <= MEANT


def test_what_follows_from_another_option_follows_it_until_it_is_given() -> None:
    config = with_overrides(digits(), {"sampler.step_policy": "decay", "sampler.step_size": 0.1})
    assert config.sampler.final_step_size == pytest.approx(0.01)
    assert with_overrides(config, {"sampler.step_size": 0.2}).sampler.final_step_size == pytest.approx(0.02)
    recorded = parse(Config, yaml.safe_load(to_yaml(config)))
    assert with_overrides(recorded, {"sampler.step_size": 0.2}).sampler.final_step_size == pytest.approx(0.01)


# --- variants ---


def test_another_sampler_is_one_flag() -> None:
    config = with_overrides(digits(), {"sampler.name": "gd"})
    assert (config.sampler.name, config.sampler.momentum, config.sampler.step_size) == ("gd", None, 0.02)


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ({}, {"launch.launcher": "local"}, {"engine.kind": "torch", "engine.zero_stage": None, "launch.workers": 1}),
        (
            {"engine.zero_stage": 3, "launch.workers": [1, 4], "launch.resize_check_s": 5},
            {"launch.launcher": "local"},
            {"engine.kind": "torch", "engine.zero_stage": None, "launch.workers": 1, "launch.resize_check_s": None},
        ),
        ({}, {"model.size": "B"}, {"model.hidden_size": 768, "model.depth": 12, "model.num_heads": 12}),
        ({"model.size": "B"}, {"model.size": "S"}, {"model.hidden_size": 384, "model.depth": 12}),
        (
            {
                "objective.decay.family": "piecewise",
                "objective.decay.decay_value": 2,
                "objective.decay.decay_start": 0.5,
            },
            {"objective.decay.family": "truncated"},
            {"objective.decay.decay_value": None, "objective.decay.decay_start": 0.5},
        ),
        (
            {"objective.decay.gradient_scale": 2, "objective.energy": "dot"},
            {"objective.kind": "time_free_flow_matching"},
            {"objective.decay": None, "objective.energy": "none"},
        ),
        (
            {"sampler.cfg_scale": 2, "sampler.guided_channels": 1},
            {"sampler.cfg_scale": 1},
            {"sampler.guided_channels": None},
        ),
        (
            {"train.guard.skip": "spikes", "train.guard.spike_factor": 5, "train.guard.max_skips": 4},
            {"train.guard.skip": "non_finite"},
            {"train.guard.spike_factor": None, "train.guard.max_skips": 4},
        ),
        (
            {"sampler.step_policy": "backtracking", "sampler.stop_norm": 0.1},
            {"sampler.name": "adam"},
            {"sampler.step_policy": "constant", "sampler.momentum": None, "sampler.stop_norm": 0.1},
        ),
        ({"track.experiment": "mine"}, {"track.mlflow": False}, {"track.experiment": None, "track.timeout_s": None}),
    ],
)
def test_another_variant_drops_what_it_has_no_use_for_and_keeps_the_rest(
    before: dict[str, Any], change: dict[str, Any], after: dict[str, Any]
) -> None:
    config = with_overrides(digits(), before)
    for start in (config, parse(Config, dump(config))):  # as it was given, and as it was recorded
        changed = {**dict.fromkeys(after), **flatten(dump(with_overrides(start, change)), Config)}
        assert {key: changed[key] for key in after} == after


@generate(st.sampled_from(["gd", "nag", "adam", "euler", "heun", "dopri5"]), st.data())
def test_any_way_from_variant_to_variant_ends_where_the_last_one_is(name: str, data: st.DataObject) -> None:
    config = with_overrides(digits(), {"evaluation.every": 0})
    for step in data.draw(st.lists(st.sampled_from(["gd", "nag", "adam", "euler", "heun", "dopri5"]), max_size=4)):
        config = with_overrides(config, {"sampler.name": step})
    config = with_overrides(config, {"sampler.name": name})
    direct = with_overrides(digits(), {"evaluation.every": 0, "sampler.name": name})
    same = {key: value for key, value in dump(config)["sampler"].items() if key not in ("step_size", "momentum")}
    assert same == {key: dump(direct)["sampler"][key] for key in same}


def test_a_value_given_with_a_variant_that_has_no_use_for_it_is_refused() -> None:
    for change in ({"sampler.name": "gd", "sampler.momentum": 0.3}, {"model.size": "B", "model.depth": 4}):
        with pytest.raises(ConfigError, match="leave it out"):
            with_overrides(digits(), change)
    # null says nothing, so it contradicts nothing.
    assert with_overrides(digits(), {"sampler.name": "gd", "sampler.momentum": None}).sampler.momentum is None


def test_only_what_somebody_gave_is_given() -> None:
    assert flatten(given(with_overrides(digits(), {"sampler.name": "gd", "train.steps": 5})), Config) == {
        key: value
        for key, value in {**flatten(given(digits()), Config), "sampler.name": "gd", "train.steps": 5}.items()
        if key != "sampler.momentum"
    }
    assert not any("Only" in key for key in given(eqm_b2()))


# --- going on with a run ---

CONSTANT = {"optimizer.schedule": "constant"}
"""So that more steps may be added."""


@contextmanager
def other_defaults() -> Iterator[None]:
    """As a later release might have them: of a plain option, of one that only a variant has, and of a cadence."""
    only = next(part for part in OPTIONS["train.guard.max_skips"].field.metadata if isinstance(part, Only))
    plain = OptimizerConfig.model_fields["weight_decay"]
    before = only.default, plain.default

    def put(max_skips: int, weight_decay: float) -> None:
        object.__setattr__(only, "default", max_skips)
        plain.default = weight_decay
        for section in (OptimizerConfig, Config):
            section.model_rebuild(force=True)

    put(7, 0.5)
    try:
        yield
    finally:
        put(*before)


def test_a_run_goes_on_with_the_defaults_that_it_began_with(tmp_path: Path, shards: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert tiny.train(*tiny.flags(tiny.overrides(whole, shards, **CONSTANT))).code == 0
    assert tiny.train(*tiny.flags(tiny.overrides(halves, shards, **CONSTANT, **{"train.steps": 4}))).code == 0
    with other_defaults():
        fresh = with_overrides(digits(), {})
        assert (fresh.optimizer.weight_decay, fresh.train.guard.max_skips) == (0.5, 7)  # the defaults are others now
        ended = tiny.train(*tiny.flags(tiny.overrides(halves, shards, **CONSTANT)))
        assert ended.code == 0, ended.err
        sentence = "run tiny goes on with the values of its start: optimizer.weight_decay=0, train.guard.max_skips=10"
        assert sentence in ended.out
    recorded = yaml.safe_load((halves / "tiny" / "config.yaml").read_text())
    assert recorded["optimizer"]["weight_decay"] == 0.0
    assert recorded["train"]["guard"]["max_skips"] == 10
    assert json.loads((halves / "tiny" / "result.json").read_text())["config"] == recorded
    losses = [
        [line["train/loss"] for line in read_metrics(root / "tiny" / "metrics.jsonl")] for root in (whole, halves)
    ]
    assert losses[0] == losses[1]


def test_a_run_needs_only_its_name_to_go_on(tmp_path: Path, shards: Path) -> None:
    overrides = tiny.overrides(tmp_path, shards, **CONSTANT, **{"train.steps": 4, "optimizer.weight_decay": 0.25})
    assert tiny.train(*tiny.flags(overrides)).code == 0
    kept = {key: value for key, value in overrides.items() if key != "optimizer.weight_decay"}
    ended = tiny.train(*tiny.flags({**kept, "train.steps": 6}))
    assert ended.code == 0, ended.err
    assert "goes on with the values of its start: optimizer.weight_decay=0.25" in ended.out
    refused = tiny.train(*tiny.flags({**kept, "optimizer.weight_decay": 0.5}))
    assert refused.code == 2
    assert "optimizer.weight_decay was 0.25 when the run tiny started and is now 0.5" in refused.err


def test_places_are_said_by_every_start(tmp_path: Path, shards: Path) -> None:
    first, moved = tmp_path / "first", tmp_path / "moved"
    assert tiny.train(*tiny.flags(tiny.overrides(first, shards, **CONSTANT, **{"train.steps": 4}))).code == 0
    first.rename(moved)
    shutil.copytree(shards, tmp_path / "shards")
    ended = tiny.train(*tiny.flags(tiny.overrides(moved, tmp_path / "shards", **CONSTANT)))
    assert ended.code == 0, ended.err
    assert "goes on with the values of its start" not in ended.out
    assert str(first) not in (moved / "tiny" / "config.yaml").read_text()
