"""The command line: what overrides what, what is refused, what --dry-run tells, and how a command ends."""

import importlib
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from eqm_dist import cli
from eqm_dist.commands import train_classifier
from eqm_dist.config import Config
from eqm_dist.derived import step_size_warning
from eqm_dist.errors import ConfigError, EqmDistError, LaunchError, Terminated, UserError
from eqm_dist.options import options, parse, to_yaml, with_overrides
from eqm_dist.presets import PRESETS, digits, eqm_b2, eqm_xl2
from tests import tiny


def config_from(*arguments: str) -> Config:
    """The config that these flags describe."""
    return cli.config_from(cli.parser("").parse_args(arguments))


def yaml_file(directory: Path, text: str) -> str:
    file = directory / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


# --- precedence ---


def test_defaults_then_preset_then_file_then_flags(tmp_path: Path) -> None:
    # Each layer sets one key that the layers above leave alone.
    file = yaml_file(tmp_path, "train: {steps: 30, log_every: 30}\nmodel: {patch_size: 4}\n")
    flags = ["--preset", "eqm-b2", "--config", file, "--train.log_every", "40"]
    assert config_from().optimizer.eps == 1e-8
    assert config_from(*flags).optimizer.eps == 1e-8  # the default, which nobody sets
    assert config_from(*flags).run.name == "eqm-b2"  # the preset, over the default digits
    assert config_from(*flags).train.steps == 30  # the file, over the preset's 400,320
    assert config_from(*flags).model.patch_size == 4
    assert config_from(*flags).train.log_every == 40  # the flag, over the file's 30 and the preset's 100
    expected = {"train.steps": 30, "train.log_every": 40, "model.patch_size": 4}
    assert config_from(*flags) == with_overrides(eqm_b2(), expected)


def test_a_file_and_flags_need_only_be_valid_together(tmp_path: Path) -> None:
    mix = "data: {mix: [{shards: a}, {shards: b}]}\n"  # which cannot be evaluated, and the default is to evaluate
    assert config_from("--config", yaml_file(tmp_path, mix), "--evaluation.every", "0").data.locations() == ["a", "b"]
    with pytest.raises(ConfigError, match=r"data.mix has several; set evaluation.every=0 \(command line\)"):
        config_from("--config", yaml_file(tmp_path, mix))
    # What contradicts itself in one source stays an error, whatever the flags say besides.
    gd = yaml_file(tmp_path, "sampler: {name: gd, momentum: 0.5}\n")
    with pytest.raises(ConfigError, match=r"momentum has no effect with name=gd"):
        config_from("--config", gd, "--train.steps", "5")
    assert config_from("--config", gd, "--sampler.name", "adam").sampler.momentum is None
    with pytest.raises(ConfigError, match=r"momentum has no effect with name=gd"):
        config_from("--config", yaml_file(tmp_path, "sampler: {name: gd}\n"), "--sampler.momentum", "0.5")


def test_digits_are_the_default_preset() -> None:
    assert config_from() == digits()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_file_starts_the_same_run_again(preset: str, tmp_path: Path) -> None:
    file = yaml_file(tmp_path, to_yaml(PRESETS[preset]()))
    assert config_from("--config", file) == PRESETS[preset]()


def test_launcher_is_short_for_its_key() -> None:
    assert config_from("--launcher", "local") == config_from("--launch.launcher", "local")
    assert config_from("--launcher", "local").launch.launcher == "local"


# --- values ---


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.root", "null", None),
        ("run.root", "~/runs", "~/runs"),
        ("run.name", "2024", "2024"),  # a name stays text
        ("run.seed", "18446744073709551615", 2**64 - 1),
        ("data.flip", "true", True),
        ("data.latent_shape", "[4, 32, 32]", (4, 32, 32)),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.betas", "[0.9,0.95]", (0.9, 0.95)),
        ("optimizer.ema_decays", "[0.9, 99e-2]", (0.9, 0.99)),
        ("optimizer.gradient_clip", "null", None),
        ("launch.max_failures", "-1", -1),
        ("engine.deepspeed", "{dump_state: true}", {"dump_state": True}),
        ("launch.workers", "4", 4),
        ("launch.workers", "[1, 4]", (1, 4)),
    ],
)
def test_a_flag_becomes_the_value_of_its_key(key: str, text: str, value: object) -> None:
    for config in (config_from(f"--{key}", text), config_from(f"--{key}={text}")):
        found: Any = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value
        assert type(found) is type(value)


def test_null_gives_an_option_back_its_default() -> None:
    free = ["--model.hidden_size", "null", "--model.depth", "null", "--model.num_heads", "null"]
    assert config_from("--model.size", "S", *free).model.size == "S"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--train.step", "5"], "--train.step is not an option (command line); did you mean --train.steps?"),
        (["--train.step=5"], "--train.step is not an option (command line); did you mean --train.steps?"),
        (["--dryrun"], "--dryrun is not an option (command line); see --help for all keys."),
        (["--zebra"], "--zebra is not an option (command line); see --help for all keys."),
        (["50"], "50 is not an option (command line); see --help for all keys."),
        (["--train.steps"], "Argument --train.steps: expected one argument; see --help."),
        (["--preset", "digit"], "Argument --preset: invalid choice: 'digit'"),
        (["--optimizer.betas", "[0.9"], "optimizer.betas must be a list like [1,2], got [0.9 (command line)."),
        (["--engine.deepspeed", "{a: ["], "engine.deepspeed must be a mapping like {a: 1}, got {a: [ (command line)."),
        (["--optimizer.betas", "0.9"], "optimizer.betas: should be a valid tuple, got '0.9' (command line)."),
        (["--launcher", "slurm"], "launch.launcher: should be 'ray' or 'local', got 'slurm' (command line)."),
        (["--train.steps", ""], "train.steps: should be a valid integer"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config_from(*arguments)
    assert str(raised.value).startswith(sentence)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "x", "--step", "5"], "--step is not an option (command line); did you mean --steps?"),
        (
            ["--out", "x", "--steps", "few"],
            "Argument --steps: must be a whole number of at least 1, got few; see --help.",
        ),
        ([], "The following arguments are required: --out; see --help."),
    ],
)
def test_a_command_with_flags_of_its_own_refuses_alike(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        train_classifier.main(arguments)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("key", [option.key for option in options(Config)])
def test_abbreviations_are_refused(key: str) -> None:
    # Today's unique prefix is ambiguous with tomorrow's option.
    with pytest.raises(ConfigError, match=f"--{key[:-1]} is not an option"):
        config_from(f"--{key[:-1]}", "1")


@pytest.mark.parametrize("name", ["sample", "evaluate", "export", "denoise", "ood", "compose", "sweep_stepsize"])
@pytest.mark.parametrize("content", [None, "train: {steps: 5}\n"])
def test_every_command_with_a_model_reads_its_config(name: str, content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "sampler.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="--config must name a "):
        importlib.import_module(f"eqm_dist.commands.{name}").main(["--config", str(file)])


# --- help ---


def test_help_describes_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.parser("What it does.").parse_args(["--help"])
    assert left.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # lines break anywhere, at hyphens too
    for option in options(Config):
        entry = f"--{option.key} {option.type_name} {option.help}"
        assert "".join(entry.split()) in text
    for sentence in ("What it does.", "Precedence: defaults < --preset < --config < flags."):
        assert "".join(sentence.split()) in text


# --- dry run ---


def dry_run(*arguments: str) -> tuple[Config, dict[str, str]]:
    """The config and the numbers that ``--dry-run`` prints."""
    ended = tiny.train("--dry-run", *arguments)
    assert (ended.code, ended.err) == (0, "")
    config, numbers = ended.out.rstrip().split("\n\n")
    figures = dict(line.split("  ", maxsplit=1) for line in numbers.splitlines())
    return parse(Config, yaml.safe_load(config)), {label: figure.strip() for label, figure in figures.items()}


def test_dry_run_of_the_largest_preset_prints_its_numbers(tmp_path: Path) -> None:
    config, numbers = dry_run("--preset", "eqm-xl2", "--run.root", str(tmp_path / "runs"))
    assert config == with_overrides(eqm_xl2(), {"run.root": str(tmp_path / "runs")})
    # 28 blocks of width 1152 on 256 tokens, as published: 675M parameters, 118.6 GMAC forward. The position table
    # (256 x 1152) is not trained. A step costs three forward passes; a checkpoint holds the fp32 weight, two moments
    # and one EMA of what is trained, and the whole EMA once more. One worker of ZeRO 1 holds the computing
    # weights and the gradient besides.
    trained = 675_129_632 - 256 * 1152
    saved = 4 * (4 * trained + 675_129_632)
    assert numbers == {
        "parameters": f"675,129,632 ({trained:,} trained)",
        "global batch": "256 images",
        "steps": "7,005,600",  # 1,400 epochs of floor(1,281,167 / 256) steps
        "images": f"{7_005_600 * 256:,}",
        "checkpoint": f"{saved:,} bytes ({saved / 2**30:.2f} GiB), 3 kept",
        "model state": f"{20 * trained:,} bytes ({20 * trained / 2**30:.2f} GiB) on each of 1 worker, plain",
        "training cost": "711.729 GFLOP per image (118.621 GMAC forward)",
        "run directory": str(tmp_path / "runs" / "eqm-xl2"),
        "largest stable step": "0.1 (plain descent near data; sampler.step_size)",
    }
    assert list(tmp_path.iterdir()) == []


def test_dry_run_without_a_stability_bound_names_none(tmp_path: Path) -> None:
    _, numbers = dry_run("--objective.decay.family", "constant", "--run.root", str(tmp_path))
    assert "largest stable step" not in numbers


def test_a_self_stopping_path_has_a_bound_of_its_own_and_warns_above_it(tmp_path: Path) -> None:
    objective = ["--objective.kind", "self_stopping", "--objective.braking_start", "0.75", "--run.root", str(tmp_path)]
    config, numbers = dry_run(*objective)
    assert numbers["largest stable step"] == "0.25 (plain descent near data; sampler.step_size)"
    assert step_size_warning(with_overrides(config, {"sampler.step_size": 0.25})) is None
    warning = step_size_warning(with_overrides(config, {"sampler.step_size": 0.251}))
    assert warning is not None
    assert warning.startswith("sampler.step_size=0.251 is above 0.25, where descent jumps over the part of")


@pytest.mark.parametrize("ema_decays", ["[0.9]", "[0.9, 0.99, 0.999]"])
def test_dry_run_knows_the_size_of_a_checkpoint(ema_decays: str, shards: Path, tmp_path: Path) -> None:
    flags = tiny.flags({**tiny.overrides(tmp_path, shards), "optimizer.ema_decays": ema_decays, "checkpoint.every": 6})
    _, numbers = dry_run(*flags)
    assert tiny.train(*flags).code == 0
    files = list((tmp_path / "tiny" / "checkpoints").glob("*/*.safetensors"))
    assert len(files) == 2
    # Tensors only: the headers of the two files (an 8-byte length, then JSON) and the two small text files come on top.
    headers = [struct.unpack("<Q", file.read_bytes()[:8])[0] for file in files]
    tensors = sum(file.stat().st_size - 8 - header for file, header in zip(files, headers, strict=True))
    assert numbers["checkpoint"].startswith(f"{tensors:,} bytes ")


# --- how a command ends ---


def raising(error: BaseException) -> Callable[[Sequence[str]], None]:
    def main(arguments: Sequence[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("Wrong input."), 2, "error: Wrong input.\n"),
        (UserError("Wrong input."), 2, "error: Wrong input.\n"),
        (LaunchError("No cluster."), 1, "error: No cluster.\n"),
        (EqmDistError("Something."), 1, "error: Something.\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume.\n"),
        (Terminated(), 143, "terminated; run the same command again to resume.\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_expected_end_is_one_sentence(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.run(raising(error))
    assert left.value.code == code
    assert capsys.readouterr() == ("", message)


def test_a_command_that_the_system_ends_is_terminated(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.run(lambda _: signal.raise_signal(signal.SIGTERM))
    assert left.value.code == 143
    assert capsys.readouterr().err == "terminated; run the same command again to resume.\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_unexpected_end_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.run(raising(ZeroDivisionError("by zero")))
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("ZeroDivisionError: by zero\n")


def test_a_command_that_did_its_work_ends_with_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Sequence[str]] = []
    monkeypatch.setattr("sys.argv", ["command", "--flag", "value"])
    with pytest.raises(SystemExit) as left:
        cli.run(received.append)
    assert left.value.code == 0
    assert received == [["--flag", "value"]]
