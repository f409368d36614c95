"""For every command: each flag takes effect or is refused, and nothing that a user gives ends in a traceback.

A table of bad arguments, files, directories and surroundings, each against every command that can meet it; each ends
with exit code 2 (the user's input) or 1 (the machine) and one sentence.
"""

import argparse
import getpass
import json
import os
import pwd
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eqm_dist import cli
from eqm_dist.errors import ConfigError
from eqm_dist.machine import settle_user
from eqm_dist.track.mlflow import default_uri
from tests import commands, tiny

EVALUATED = {"evaluation.extractor": "tests.test_every_command:make", "sampler.nfe": 2, "sampler.name": "gd"}


class Pixels(torch.nn.Module):
    """Two numbers of an image as its features."""

    num_features, id = 2, "pixels"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat = images.flatten(1).double()
        return torch.stack([flat.mean(1), flat.std(1)], dim=1)


def make() -> torch.nn.Module:
    return Pixels()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs, with one tiny run in it."""
    root = tmp_path_factory.mktemp("home") / "runs"
    shards = tiny.write_blots(root / "data" / "blots")
    assert tiny.train(*tiny.flags(tiny.overrides(root, shards, **EVALUATED, **{"train.steps": 2}))).code == 0
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(root)
    return tmp_path


LOCAL = ["--launcher", "local"]
CHEAP: dict[str, list[list[str]]] = {
    "plan": [["--spot", "--json"]],
    "train": [["--dry-run"]],
    "sample": [[*LOCAL, "--samples", "2", "--out", "o1"]],
    "evaluate": [[*LOCAL, "--samples", "4", "--cache", "none", "--metrics", "fid,kid", "--kid-subset-size", "3"]],
    "export": [["--out", "o2"]],
    "compose": [["--labels", "0,1", "--samples", "2"]],
    "denoise": [["--samples", "4"]],
    "ood": [["--samples", "4"]],
    "checkpoint": [["ls"], ["verify"], ["export", "--out", "o3"], ["convert", "--out", "o4.pt"]],
    "sweep-stepsize": [[*LOCAL, "--dry-run", "--cache", "none"]],
    "sweep-decay": [["--dry-run"]],
    "landscape": [["--steps", "1"]],
    "train-classifier": [["--out", "o5", "--steps", "1"]],
    "prepare-shards": [["--source", "digits", "--out", "o6", *LOCAL], ["verify", "runs/data/blots"],
                       ["index", "o7"], ["merge", "o8", "runs/data/blots"]],
}  # fmt: skip


@pytest.mark.parametrize("name", CHEAP)
def test_every_flag_is_read(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that is parsed and never looked at changes nothing, and says nothing."""
    shutil.copytree(here / "runs" / "data" / "blots", here / "o7")
    for file in ("manifest.json", "index.npy"):
        (here / "o7" / file).unlink()
    parse = cli._Parser.parse_args
    unread: list[set[str]] = []

    def watched(self: Any, args: Any = None, namespace: Any = None) -> Any:
        parsed = parse(self, args, namespace)
        names = set(vars(parsed)) - {"hours"}  # a dry run takes no time

        class Watched(argparse.Namespace):
            def __getattribute__(self, name: str) -> Any:
                names.discard(name)
                return super().__getattribute__(name)

        unread.append(names)
        return Watched(**vars(parsed))

    monkeypatch.setattr(cli._Parser, "parse_args", watched)
    monkeypatch.setattr("eqm_dist.tasks.landscape_figure.animation", lambda descents: b"")  # which takes seconds
    for arguments in CHEAP[name]:
        ended = commands.run(name, *arguments)
        assert ended.code == 0, ended.err
        assert unread.pop() == set(), arguments


NUMBERS = [
    "-1",
    "x",
    "",
    " ",
    "nan",
    "inf",
    "1e400",
    "9" * 5000,
    "\u00b2",
    "\u0661",
    "1_0",
    "0x1",
    "1.5",
    "true",
    "null",
]


@pytest.mark.parametrize(("name", "parser"), commands.parsers())
def test_a_number_is_taken_or_refused_in_one_sentence(name: str, parser: argparse.ArgumentParser) -> None:
    for before, action in commands.actions(parser):
        if action.type is None or not action.option_strings:
            continue
        for text in NUMBERS:
            line = [*before, *commands.needed(parser), action.option_strings[0], text]
            sentence = refusal(lambda line=line: parser.parse_args(line))
            assert sentence is None or ("\n" not in sentence and len(sentence) < 6000)
            assert sentence is not None or action.type not in (cli.count, cli.seed), (action.dest, text)


def refusal(work: Callable[[], object]) -> str | None:
    """The sentence of the error that it ends with; None if it does not."""
    try:
        work()
    except ConfigError as error:
        return str(error)
    return None


def assert_sentence(ended: tiny.Outcome, about: object) -> None:
    """One sentence, and the exit code of an error."""
    assert ended.code in (1, 2), (about, ended)
    assert "Traceback" not in ended.err, (about, ended.err)
    *notes, error = ended.err.splitlines() or [f"error: {ended.out}"]  # verify prints what it finds
    assert error.startswith("error: "), (about, ended.err)
    assert [line for line in notes if "warning" not in line.lower()] == [], (about, ended.err)


# --- places ---

ODD = ["nowhere", "/dev/null", "/proc/self/mem", "~nobody-of-that-name/x", "x" * 5000, "a\0b", "gs://b/x", "pipe:ls",
       "http://h/x", "junk/below", "[", "*", "s3:/one-slash"]  # fmt: skip


@pytest.fixture
def bad(here: Path) -> list[str]:
    """Names of what is not what any command looks for."""
    (here / "empty").mkdir()
    files = {"junk": b"\x00\xff junk", "text.yaml": b"hello", "list.yaml": b"[1, 2]", "deep.yaml": b"[" * 50_000,
             "latin.yaml": b"train: caf\xe9", "big.yaml": b"a" * 2_000_000, "junk.pt": b"PK\x03\x04 junk",
             "junk.npz": b"PK\x03\x04 junk", "junk.safetensors": b"\xff" * 64, "junk.py": b"1 +"}  # fmt: skip
    for name, content in files.items():
        (here / name).write_bytes(content)
    (here / "loop").symlink_to("loop")
    (here / "gone").symlink_to("nowhere")
    os.mkfifo(here / "pipe")
    save_file({"a": torch.zeros(1)}, here / "other.safetensors")
    return ["empty", *files, "loop", "gone", "pipe", "other.safetensors", *ODD]


SMALL = ["--samples", "4"]
TRAIN = ["--launcher", "local", "--evaluation.every", "0", "--track.mlflow", "false", "--train.steps", "1"]
EVALUATE = ("evaluate", [*LOCAL, *SMALL, "--cache", "none"])
PLACES: dict[str, list[tuple[str, list[str]]]] = {
    "--model": [("sample", LOCAL), ("ood", []), ("sweep-stepsize", [*LOCAL, "--dry-run"])],
    "": [("checkpoint", [action]) for action in ("ls", "verify", "export", "convert")],
    "--config": [("sample", LOCAL), EVALUATE, ("train", ["--dry-run"]), ("sweep-decay", ["--dry-run"])],
    "--space": [("sweep-stepsize", [*LOCAL, "--dry-run"]), ("sweep-decay", ["--dry-run"])],
    "--run.root": [("evaluate", LOCAL), ("checkpoint", ["ls"])],
    "--reference": [EVALUATE],
    "--mlflow": [EVALUATE],
    "--extractor": [EVALUATE],
    "--extractor-weights": [EVALUATE],
    "--autoencoder": [("sample", LOCAL), ("ood", SMALL), ("export", [])],
    "--shards": [("denoise", SMALL), ("train-classifier", ["--out", "o"])],
    "--data.shards": [("train", TRAIN)],
}


@pytest.mark.parametrize("flag", PLACES)
def test_a_place_that_is_not_what_it_should_be(flag: str, bad: list[str]) -> None:
    for name, flags in PLACES[flag]:
        for place in bad:
            given = [*flags, *([flag] if flag else []), place]
            assert_sentence(commands.run(name, *given), (name, given))


WRITERS = [("sample", [*LOCAL, *SMALL]), ("export", []), ("compose", SMALL), ("denoise", SMALL), ("ood", SMALL),
           ("landscape", ["--steps", "1"]), ("evaluate", [*LOCAL, *SMALL, "--cache", "none"]),
           ("train-classifier", ["--steps", "1"]), ("checkpoint export", []), ("checkpoint convert", [])]  # fmt: skip


@pytest.mark.parametrize(("name", "flags"), WRITERS)
def test_a_place_that_cannot_be_written(name: str, flags: list[str], bad: list[str]) -> None:
    command, *action = name.split()
    for place in ("junk/below", "loop/below", "/proc/nowhere/x", "/dev/null/x", "x" * 5000):
        ended = commands.run(command, *action, *flags, "--out", place)
        assert_sentence(ended, (name, place))
        assert ended.out.count("\n") < 3, (name, place, ended.out)  # the work had not begun


# --- what lies in a run ---


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(content)


LATEST = "checkpoints/step_00000002"
DAMAGE: dict[str, Callable[[Path], object]] = {
    **{f"{what} {name}": put(name, content) for name in
       ("result.json", f"{LATEST}/COMPLETE.json", f"{LATEST}/config.yaml", "manifest.json", "config.yaml")
       for what, content in (("an empty", b""), ("a list for", b"[]"), ("half of", b'{"step": '),
                             ("no text in", b"\xff"), ("null for", b"null"), ("deep", b"[" * 50_000))},
    "rubbish in the metrics": put("metrics.jsonl", b"rubbish\n"),
    "a list in the metrics": put("metrics.jsonl", b"[1]\n"),
    "metrics without a step": put("metrics.jsonl", b'{"train/loss": 1}\n'),
    "rubbish in the attempts": put("attempts.jsonl", b'{"step": 1}\n'),
    "a result of nothing": put("result.json", b"{}"),
    "a marker of nothing": put(f"{LATEST}/COMPLETE.json", b"{}"),
    "a marker of text": put(f"{LATEST}/COMPLETE.json", b'{"format": 1, "step": "x", "files": {}}'),
    "no files in a marker": put(f"{LATEST}/COMPLETE.json", b'{"format": 1, "step": 2, "files": {}}'),
    "a config of another key": put("config.yaml", b"train: {step: 1}"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run(what: str, root: Path, tmp_path: Path) -> None:
    """It ends in one sentence, or the damage does not concern the command."""
    again = ["--train.steps", "2", *tiny.flags(tiny.overrides(tmp_path, root / "data" / "blots", **EVALUATED))]
    for name, flags in (
        ("train", [*again, "--train.steps", "3", "--optimizer.schedule", "constant"]),
        ("checkpoint", ["ls", str(tmp_path / "tiny")]),
        ("sample", [*LOCAL, "--model", str(tmp_path / "tiny"), "--samples", "2", "--out", str(tmp_path / "o")]),
        ("export", ["--model", str(tmp_path / "tiny"), "--run.root", str(tmp_path), "--out", str(tmp_path / "e")]),
    ):
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(root / "tiny", tmp_path / "tiny")
        DAMAGE[what](tmp_path / "tiny")
        ended = commands.run(name, *flags)
        if ended.code or "Traceback" in ended.err:
            assert_sentence(ended, (name, what))


def test_an_empty_line_in_the_metrics_is_none(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "tiny", tmp_path / "tiny")
    metrics = tmp_path / "tiny" / "metrics.jsonl"
    metrics.write_text("\n" + metrics.read_text().replace("\n", "\n\n"))
    overrides = tiny.overrides(tmp_path, root / "data" / "blots", **EVALUATED, **{"train.steps": 2})
    (tmp_path / "tiny" / "result.json").unlink()
    ended = tiny.train(*tiny.flags(overrides))
    assert (ended.code, ended.err) == (0, "")
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


# --- options ---

VALUES = ["x", "-1", "nan", "1e400", "9" * 400, "[", "{a", "null", "", "true", "[1,2,3,4]", "[null]", "{a: 1}", "s3://",
          "a\nb"]  # fmt: skip


def test_any_value_of_any_option_is_taken_or_refused(here: Path) -> None:
    parser = commands.parser("train")
    for _, action in commands.actions(parser):
        if "." in action.dest:
            for value in VALUES:
                flag = f"--{action.dest}={value}"
                sentence = refusal(lambda flag=flag: cli.config_from(parser.parse_args([flag])))
                assert sentence is None or "\n" not in sentence, flag


FILES = ["train:", "train: {}", "train:\nmodel:\n", "", "{}", "[]", "train: [1]", "train: 3", "train: {steps: }",
         "1: 2", "? [a]\n: 1", "train: {steps: 2001-01-01}", "train: &a {guard: *a}", "x: !!python/none",
         "model: {size: [S]}",
         "data: {mix: [1]}", "data: {mix: {a: 1}}", "data: {mix: [{shards: 1}]}", "engine: {deepspeed: {1: 2}}",
         "run: {name: 5}", "train: {steps: 1e3}", "a.b: 1", "train.steps: 5", "objective: {decay: }", "\t", "\x00",
         "train: {steps: 999999999999999999999999}", "- train"]  # fmt: skip


def test_any_file_of_options_is_taken_or_refused(here: Path) -> None:
    for text in FILES:
        (here / "file.yaml").write_text(text)
        ended = commands.run("train", "--config", "file.yaml", "--dry-run")
        if ended.code or text not in ("train:", "train: {}", "train:\nmodel:\n", "{}"):
            if ended.code:
                assert_sentence(ended, text)
        else:
            assert "steps: 2000" in ended.out, text


@pytest.mark.parametrize(
    "extractor", ["os:system", "nowhere:make", "nowhere", ":", "a:b:c", "x:", "..:x", "os:", "\u00b2:x"]
)
def test_an_extractor_that_is_none(extractor: str, here: Path) -> None:
    assert_sentence(commands.run("evaluate", *LOCAL, *SMALL, "--cache", "none", "--extractor", extractor), extractor)


# --- surroundings ---


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of a container, without an entry in /etc/passwd and without a home."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def getpwuid(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setenv("LOGNAME", "")  # so that what is set in its place goes when the test ends


@pytest.mark.usefixtures("nobody")
def test_a_user_without_a_name_has_one(here: Path) -> None:
    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    ended = commands.run("train", "--dry-run")
    assert ended.code == 0, ended.err
    assert getpass.getuser() == f"user-{os.getuid()}"
    settle_user()
    assert getpass.getuser() == f"user-{os.getuid()}"


@pytest.mark.usefixtures("nobody")
@pytest.mark.parametrize(("name", "flags"), [
    ("evaluate", [*LOCAL, *SMALL]),  # its cache is below the home
    ("evaluate", [*LOCAL, *SMALL, "--cache", "~/x"]),
    ("train", ["--run.root", "~/runs"]),
    ("sample", [*LOCAL, "--model", "~/x"]),
    ("checkpoint", ["ls", "~/x"]),
])  # fmt: skip
def test_a_home_that_is_not_there(name: str, flags: list[str], here: Path) -> None:
    ended = commands.run(name, *flags)
    assert_sentence(ended, (name, flags))
    assert "set HOME" in ended.err


def test_a_home_that_cannot_be_written_is_met_before_the_work(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setattr("eqm_dist.launch.evaluation.run_units", lambda *_: pytest.fail("the work had begun"))
    ended = commands.run("evaluate", *LOCAL, *SMALL)
    assert_sentence(ended, "HOME")
    assert "Cannot write to /proc/nowhere" in ended.err


def test_a_working_directory_that_is_gone_or_not_text(root: Path, tmp_path: Path) -> None:
    before = Path.cwd()
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)
    (tmp_path / "gone").mkdir()
    try:
        os.chdir(odd)
        for name, flags in (("train", TRAIN), ("sample", LOCAL), ("checkpoint", ["ls"])):
            ended = commands.run(name, *flags)
            assert_sentence(ended, name)
            assert "caf\\xe9" in ended.err
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        for name, flags in (("train", TRAIN), ("sample", LOCAL), ("checkpoint", ["ls"])):
            assert_sentence(commands.run(name, *flags), name)
    finally:
        os.chdir(before)


@pytest.mark.parametrize("name", ["[r] (x) {r} h#h ü", "a%20b what?x"])
def test_a_root_of_any_name(name: str, root: Path, tmp_path: Path) -> None:
    overrides = tiny.overrides(tmp_path / name, root / "data" / "blots", **EVALUATED)
    mlflow = "%" in name
    place = {"checkpoint.mirror": str(tmp_path / name / "mirror"), "train.steps": 2, "track.mlflow": mlflow}
    ended = tiny.train(*tiny.flags(overrides | place))
    assert (ended.code, ended.err) == (0, ""), ended.err
    if mlflow:
        assert (tmp_path / name / "mlflow.db").stat().st_size > 0
        assert default_uri(tmp_path / name).count("?") == 0
    shutil.rmtree(tmp_path / name / "tiny")
    ended = tiny.train(*tiny.flags(overrides | place))  # from the mirror
    assert (ended.code, ended.err) == (0, ""), ended.err
    listed = commands.run("checkpoint", "ls", "--run.root", str(tmp_path / name))
    assert "whole" in listed.out, listed.err
