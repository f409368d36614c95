"""pipelines/checkpoint.py: what it says of a run, and what it takes out of it."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import eqm_dist
from eqm_dist.build import build_run
from eqm_dist.commands.checkpoint import main
from eqm_dist.errors import CheckpointError, ConfigError
from eqm_dist.open_run import open_run
from eqm_dist.train.checkpoint import EMA_FILE, MARKER
from tests import tiny
from tests.test_checkpoint import STATE_FILE, flip_a_bit, replace_states

OVERRIDES = {"optimizer.ema_decays": [0.9, 0.99], "checkpoint.keep": 1, "checkpoint.keep_every": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The root of a run with checkpoints of steps 2, 4 and 6."""
    return tiny.trained(tmp_path_factory.mktemp("runs"), shards, **OVERRIDES).parent


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run to do damage to."""
    return Path(shutil.copytree(trained / "tiny", tmp_path / "tiny"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def verify(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["verify", *map(str, arguments)])
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_list_says_what_there_is_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluations").mkdir()
    record = {"step": 4, "metrics": {"eval/fid": 1.5}, "pictures": [], "seconds": 1}
    (run / "evaluations" / "step_00000004.json").write_text(json.dumps(record))
    (checkpoint(run, 6) / MARKER).unlink()
    (checkpoint(run, 2) / STATE_FILE).write_bytes(b"")
    shutil.copytree(checkpoint(run, 4), checkpoint(run, 4).with_name("damaged-step_00000003.2"))
    main(["ls", str(run)])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    found = [[cell.strip() for cell in line if cell] for line in lines]
    assert found[0] == ["step", "condition", "MiB", "writers", "FID", "kept as"]
    assert found[1:] == [
        ["2", "damaged", "0.0", "1", "every 2"],
        ["3", "set aside", "0.2"],
        ["4", "whole", "0.2", "1", "1.500", "newest, best, every 2"],
        ["6", "unfinished", "0.2"],
    ]


def test_an_undamaged_run_verifies(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = verify(capsys, run)
    assert code == 0
    (line,) = out.splitlines()
    assert line.startswith(f"{checkpoint(run, 6)} is whole: 3 files, 0.2 MiB, ema_0.9, ema_0.99, exp_avg, exp_avg_sq,")
    code, out = verify(capsys, "--all", run)
    assert (code, out.count(" is whole: ")) == (0, 3)


def test_damage_is_named_and_the_exit_code_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_a_bit(checkpoint(run, 4) / EMA_FILE)
    assert verify(capsys, run)[0] == 0  # the newest one is not the damaged one
    code, out = verify(capsys, run, "--all")
    assert code == 1
    assert f"{checkpoint(run, 4) / EMA_FILE} is damaged: its sha256 is " in out
    assert out.count(" is whole: ") == 2
    (checkpoint(run, 6) / MARKER).unlink()
    code, out = verify(capsys, checkpoint(run, 6))
    assert code == 1
    assert "it was not finished" in out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("missing", "has none of element 0"),
        ("short", "elements of exp_avg of blocks.0.attn.qkv.bias, and ema.safetensors has"),
        ("hole", "has none of element 3"),
        ("twice", "has two of element 3"),
    ],
)
def test_a_hole_that_checksums_do_not_see_is_found(
    change: str, sentence: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the ranks had not written all of the state, or some of it twice."""
    tensors = safetensors.torch.load_file(checkpoint(run, 6) / STATE_FILE)
    name = "exp_avg/blocks.0.attn.qkv.bias"
    values = tensors.pop(f"{name}/0")
    if change == "short":
        tensors[f"{name}/0"] = values[:-1].clone()
    elif change == "missing":
        tensors[f"{name}/1"] = values[1:].clone()
    else:
        tensors[f"{name}/0"] = values[: 3 if change == "hole" else 4].clone()
        tensors[f"{name}/{4 if change == 'hole' else 3}"] = values[4 if change == "hole" else 3 :].clone()
    replace_states(checkpoint(run, 6), safetensors.torch.save(tensors))
    code, out = verify(capsys, run)
    assert code == 1
    assert sentence in out


@pytest.mark.parametrize("ema", [None, "0.9", "0.99", "none"])
def test_any_ema_can_be_exported(
    ema: str | None, trained: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [] if ema is None else ["--ema", ema]
    main(["export", str(trained / "tiny"), *flags, "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'} is complete.\n"
    exported = eqm_dist.load(tmp_path / "out").weights
    state = {None: "ema_0.9", "none": "weight"}.get(ema, f"ema_{ema}")
    run = build_run(open_run(tiny.config(trained, shards, **OVERRIDES)), torch.device("cpu"))
    pieces = {piece.name: piece.values for piece in run.engine.fragments() if piece.state == state}
    assert exported.keys() == run.engine.frozen.keys() | pieces.keys()
    assert all(torch.equal(exported[name].flatten(), values) for name, values in pieces.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("| weights | no EMA |" if ema == "none" else f"| weights | EMA, decay {state[4:]} |") in card


def test_an_ema_that_is_not_there_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds ema_0.9, ema_0.99, .*, and not ema_0.5; choose one"):
        main(["export", str(trained / "tiny"), "--ema", "0.5", "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"must be a decay like 0\.9999, or none, got most"):
        main(["export", str(trained / "tiny"), "--ema", "most"])
    main(["export", str(trained / "tiny"), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="Only runs and checkpoints hold several EMAs"):
        eqm_dist.load(tmp_path / "out", ema=0.9)


def test_a_converted_checkpoint_is_an_official_one(trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "tiny.pt"
    main(["convert", str(trained / "tiny"), "--out", str(file)])
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"model", "ema"}
    run = eqm_dist.load(trained / "tiny")
    assert content["ema"].keys() == content["model"].keys() == run.weights.keys()
    assert all(torch.equal(content["ema"][name], run.weights[name]) for name in run.weights)
    assert not all(torch.equal(content["model"][name], run.weights[name]) for name in run.weights)
    again = eqm_dist.load(file, autoencoder="identity", overrides={"model.num_heads": 2})
    assert torch.equal(again.sample([0, 1]), run.with_sampler(**again.config.sampler.model_dump()).sample([0, 1]))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a directory with config.yaml, and .* has none"):
        main(["ls", str(tmp_path)])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="must have a finished checkpoint, and has none"):
        main(["verify", str(tmp_path)])
