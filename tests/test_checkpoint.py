"""Checkpoints: exact, whole or absent, and damage is named."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import eqm_dist
from eqm_dist.build import OpenRun, build_model, build_run
from eqm_dist.config import Config
from eqm_dist.errors import CheckpointError
from eqm_dist.inventory import entries, verify
from eqm_dist.open_run import open_run
from eqm_dist.options import with_overrides
from eqm_dist.pretrained import newest_run
from eqm_dist.run_directory import pictures
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.checkpoint import EMA_FILE, MARKER, Checkpoints, read_marker
from eqm_dist.train.loop import Run, train
from eqm_dist.train.mirror import Mirror
from tests import tiny
from tests.disk import no_file_larger_than
from tests.distributed import run_ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
STATE_FILE = "state-0000-of-0001.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The root of a run of six steps that was saved after 2, 4 and 6."""
    root = tmp_path_factory.mktemp("trained")
    train(start(tiny.config(root, shards)))
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run to do damage to."""
    shutil.copytree(trained / "tiny" / "checkpoints", tmp_path / "tiny" / "checkpoints")
    return tmp_path


def start(config: Config) -> Run:
    return build_run(open_run(config), CPU)


def state(run: Run) -> dict[tuple[str, str], Tensor]:
    """Everything an engine holds, by state and parameter."""
    return {(piece.state, piece.name): piece.values.clone() for piece in run.engine.fragments()}


def checkpoint(root: Path, step: int) -> Path:
    return root / "tiny" / "checkpoints" / f"step_{step:08d}"


def curve(root: Path) -> list[tuple[int, float, float]]:
    lines = read_metrics(root / "tiny" / "metrics.jsonl")
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines]


def assert_equal(found: dict[Any, Tensor], expected: dict[Any, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


# --- exactness ---


def test_a_loaded_state_is_the_saved_one_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    config = tiny.config(tmp_path, shards, **{"optimizer.ema_decays": [0.9, 0.99]})
    run = start(config)
    train(run)
    saved = state(run)
    fresh = start(tiny.config(tmp_path, shards, **{"optimizer.ema_decays": [0.9, 0.99], "run.name": "fresh"}))
    assert any(not torch.equal(value, saved[key]) for key, value in state(fresh).items())
    assert fresh.checkpoints.load(checkpoint(tmp_path, 6), fresh.engine) == run.state
    assert_equal(state(fresh), saved)
    assert {key for key, _ in saved} == {"weight", "exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.99"}


@pytest.mark.parametrize("stop_at", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    stop_at: int, trained: Path, shards: Path, tmp_path: Path
) -> None:
    config = tiny.config(tmp_path, shards)
    train(replace(start(config), steps=stop_at))
    resumed = start(config)
    assert resumed.state.step == stop_at
    train(resumed)
    for name in (STATE_FILE, EMA_FILE):
        assert (checkpoint(tmp_path, 6) / name).read_bytes() == (checkpoint(trained, 6) / name).read_bytes()
    assert [step for step, _, _ in curve(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert curve(tmp_path) == curve(trained)


def test_the_ema_is_exported_as_a_state_dict(root: Path, shards: Path) -> None:
    config = tiny.config(root, shards)
    run = start(config)
    weights = safetensors.torch.load_file(checkpoint(root, 6) / EMA_FILE)
    model = build_model(config)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)  # strict: every name and shape
    emas = {name: values for (kind, name), values in state(run).items() if kind == run.ema_state}
    for name, value in model.state_dict().items():
        assert torch.equal(value.flatten(), emas[name] if name in emas else initial[name].flatten()), name
    assert set(weights) - set(emas) == {"pos_embed"}
    assert any(not torch.equal(weights[name], initial[name]) for name in emas)


def test_the_newest_checkpoints_are_kept(shards: Path, tmp_path: Path) -> None:
    run = start(tiny.config(tmp_path, shards, **{"checkpoint.every": 1, "checkpoint.keep": 2, "train.steps": 5}))
    train(run)
    assert run.checkpoints.whole() == [checkpoint(tmp_path, 4), checkpoint(tmp_path, 5)]
    assert sorted((tmp_path / "tiny" / "checkpoints").iterdir()) == run.checkpoints.whole()


# --- whole or absent ---


def test_a_directory_without_a_marker_is_no_checkpoint(root: Path, shards: Path) -> None:
    (checkpoint(root, 6) / MARKER).unlink()
    damaged = checkpoint(root, 6) / STATE_FILE
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:1000])
    (checkpoint(root, 6) / ".left.tmp").write_bytes(b"by a writer that was killed")
    config = tiny.config(root, shards)
    run = start(config)
    assert run.checkpoints.latest() == checkpoint(root, 4)
    assert run.state.step == 4
    train(run)
    assert damaged.read_bytes() == whole
    assert sorted(path.name for path in checkpoint(root, 6).iterdir()) == sorted(
        [MARKER, "config.yaml", EMA_FILE, STATE_FILE]
    )


def test_what_a_killed_save_left_is_removed_by_the_next(root: Path, shards: Path) -> None:
    orphan = checkpoint(root, 5)  # of an attempt that saved at other steps
    orphan.mkdir()
    (orphan / STATE_FILE).write_bytes(b"half")
    (checkpoint(root, 6) / MARKER).unlink()
    run = start(tiny.config(root, shards))
    train(run)
    assert sorted((root / "tiny" / "checkpoints").iterdir()) == [checkpoint(root, step) for step in (2, 4, 6)]


# --- damage ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = [
    (cut, "is damaged: its sha256 is "),
    (flip_a_bit, "is damaged: its sha256 is "),
    (Path.unlink, "cannot be read (No such file or directory); "),
]


@pytest.mark.parametrize("file", [STATE_FILE, EMA_FILE, "config.yaml"])
@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_a_damaged_file_is_named_and_the_run_resumes_from_the_checkpoint_before(
    file: str, damage: Callable[[Path], None], sentence: str, root: Path, trained: Path, shards: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shutil.copyfile(trained / "tiny" / "metrics.jsonl", root / "tiny" / "metrics.jsonl")
    damage(checkpoint(root, 6) / file)
    run = start(tiny.config(root, shards))
    aside = checkpoint(root, 6).with_name("damaged-step_00000006")
    assert f"warning: {checkpoint(root, 6) / file} {sentence}" in caplog.text
    assert f"set aside as {aside}, and the run resumes from {checkpoint(root, 4)}" in caplog.text
    assert run.state.step == 4
    assert aside.exists()
    train(run)
    assert run.checkpoints.steps() == [2, 4, 6]
    assert aside.exists()  # nothing is deleted that somebody may repair
    for name in (STATE_FILE, EMA_FILE):
        assert (checkpoint(root, 6) / name).read_bytes() == (checkpoint(trained, 6) / name).read_bytes()
    assert curve(root) == curve(trained)  # no step twice, none missing


def test_of_several_damaged_checkpoints_all_are_set_aside(root: Path, shards: Path) -> None:
    flip_a_bit(checkpoint(root, 6) / STATE_FILE)
    flip_a_bit(checkpoint(root, 4) / EMA_FILE)
    run = start(tiny.config(root, shards))
    assert run.state.step == 2
    flip_a_bit(checkpoint(root, 2) / STATE_FILE)
    train(run)
    flip_a_bit(checkpoint(root, 6) / STATE_FILE)
    assert start(tiny.config(root, shards)).state.step == 4
    names = [path.name for path in sorted(checkpoint(root, 6).parent.glob("damaged-*"))]
    assert names == ["damaged-step_00000004", "damaged-step_00000006", "damaged-step_00000006.2"]


def test_where_all_are_damaged_nothing_starts_over_in_silence(root: Path, shards: Path) -> None:
    for step in (2, 4, 6):
        flip_a_bit(checkpoint(root, step) / STATE_FILE)
    for _ in range(2):  # nothing is set aside, so it stays an error
        with pytest.raises(CheckpointError, match=r"must have an undamaged checkpoint .* but all 3 in ") as raised:
            start(tiny.config(root, shards))
    assert f"the newest because {checkpoint(root, 6) / STATE_FILE} is damaged" in str(raised.value)


@pytest.mark.multiprocess
def test_from_damage_that_one_rank_finds_all_fall_back(root: Path, shards: Path) -> None:
    """Of three files each of three ranks checks one; the others must not go on without the one that refuses."""
    flip_a_bit(checkpoint(root, 6) / STATE_FILE)
    opened = open_run(tiny.config(root, shards))
    assert run_ranks(3, resumed_step, opened) == [4, 4, 4]
    assert checkpoint(root, 6).with_name("damaged-step_00000006").exists()


def resumed_step(rank: int, opened: OpenRun) -> int:
    return build_run(opened, CPU).state.step


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff", b"[]", b"7", b"{}", b'{"format": 1}', b'{"format": 1, "step": 6}',
     b'{"format": 1, "step": "six", "files": {}}', b'{"format": 1, "step": 6, "files": []}',
     b'{"format": 1, "step": 6, "files": {"x": {}}}', b'{"format": 1, "step": 6, "files": {"x": {"sha256": "?"}}}',
     b'{"format": 1, "step": 6, "files": {"../x": {"sha256": "00"}}}',
     b'{"format": 1, "step": 6, "files": {}, "state": 6}'],
)  # fmt: skip
def test_a_marker_of_rubbish_is_named(
    content: bytes, root: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint(root, 6) / MARKER).write_bytes(content)
    assert start(tiny.config(root, shards)).state.step == 4
    assert f"{checkpoint(root, 6) / MARKER} is damaged (" in caplog.text


def test_a_marker_of_another_format_asks_for_the_release_that_wrote_it(root: Path, shards: Path) -> None:
    marker = checkpoint(root, 6) / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match=r"must have format 1, but .* has 2; use the matching release"):
        start(tiny.config(root, shards))


def test_a_state_of_another_release_asks_for_it(root: Path, shards: Path) -> None:
    marker = checkpoint(root, 6) / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"state": {"step": 6, "stride": 2}}))
    with pytest.raises(CheckpointError, match=r"does not know \(stride\); use the matching release"):
        start(tiny.config(root, shards))


def test_a_checkpoint_without_a_marker_cannot_be_asked_for(root: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must have a COMPLETE.json, but .* has none"):
        read_marker(root)


def replace_states(directory: Path, content: bytes) -> None:
    """Other states under a marker that vouches for them."""
    (directory / STATE_FILE).write_bytes(content)
    marker = json.loads((directory / MARKER).read_text())
    marker["files"][STATE_FILE] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize("missing", ["ema_0.99", "exp_avg_sq"])
def test_a_state_that_is_missing_is_named(missing: str, root: Path, shards: Path) -> None:
    tensors = safetensors.torch.load_file(checkpoint(root, 6) / STATE_FILE)
    kept = {key: value for key, value in tensors.items() if not key.startswith(f"{missing}/")}
    assert len(kept) < len(tensors)
    replace_states(checkpoint(root, 6), safetensors.torch.save(kept))
    with pytest.raises(CheckpointError, match=rf"must hold every state .* has 0 of [\d,]+ elements of {missing} of "):
        start(tiny.config(root, shards))


def vouched(directory: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a file, under a marker that vouches for them."""
    tensors = safetensors.torch.load_file(directory / file)
    change(tensors)
    content = safetensors.torch.save(tensors)
    (directory / file).write_bytes(content)
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    remark(directory, lambda files: files.update({file: record}))


def remark(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a marker lists."""
    marker = json.loads((directory / MARKER).read_text())
    change(marker["files"])
    (directory / MARKER).write_text(json.dumps(marker))


QKV = "blocks.0.attn.qkv.weight"


def halved(key: str) -> Callable[[dict[str, Tensor]], None]:
    """The first half of a parameter twice, and its other half never: as many elements as there should be."""

    def change(tensors: dict[str, Tensor]) -> None:
        values = tensors.pop(f"{key}/0")
        half = len(values) // 2
        tensors[f"{key}/0"], tensors[f"{key}/00"] = values[:half].clone(), values[:half].clone()

    return change


NOT_WHOLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "states of another dtype": (
        lambda path: vouched(path, STATE_FILE, lambda found: found.update({k: v.half() for k, v in found.items()})),
        "must hold fp32 numbers alone, but .* has F16",
    ),
    "one number of another dtype": (
        lambda path: vouched(path, EMA_FILE, lambda found: found.update({QKV: found[QKV].double()})),
        "must hold fp32 numbers alone, but .* has F64",
    ),
    "a range twice and none of the rest": (
        lambda path: vouched(path, STATE_FILE, halved(f"exp_avg/{QKV}")),
        f"of exp_avg of {QKV} it has two of element 0",
    ),
    "a part is missing": (
        lambda path: vouched(
            path, STATE_FILE, lambda found: found.update({f"weight/{QKV}/0": found[f"weight/{QKV}/0"][:-5]})
        ),
        f"has 763 elements of weight of {QKV}, and ema.safetensors has 768",
    ),
    "a parameter of one state is missing": (
        lambda path: vouched(path, STATE_FILE, lambda found: found.__delitem__(f"ema_0.99/{QKV}/0")),
        f"has 0 elements of ema_0.99 of {QKV}, and",
    ),
    "an EMA without a parameter": (
        lambda path: vouched(path, EMA_FILE, lambda found: found.__delitem__(QKV)),
        f"elements of .* of {QKV}, and ema.safetensors has 0",
    ),
    "no EMA": (lambda path: remark(path, lambda files: files.pop(EMA_FILE)), "does not list ema.safetensors"),
    "no config": (lambda path: remark(path, lambda files: files.pop("config.yaml")), "does not list config.yaml"),
    "no states": (lambda path: remark(path, lambda files: files.pop(STATE_FILE)), f"does not list {STATE_FILE}"),
    "a writer is missing": (
        lambda path: remark(path, lambda files: files.update({STATE_FILE.replace("1.", "2."): files.pop(STATE_FILE)})),
        f"does not list {STATE_FILE}",
    ),
    "another size": (
        lambda path: remark(path, lambda files: files[EMA_FILE].update({"bytes": 5})),
        "is damaged: it has .* bytes, its marker says 5",
    ),
    "of another place": (
        lambda path: remark(path, lambda files: files.update({"../../x": files[EMA_FILE]})),
        "is damaged .*file name",
    ),
    "an absolute name": (
        lambda path: remark(path, lambda files: files.update({"/etc/passwd": files[EMA_FILE]})),
        "is damaged .*file name",
    ),
    "its parent": (lambda path: remark(path, lambda files: files.update({"..": files[EMA_FILE]})), "file name"),
}


@pytest.mark.parametrize("what", NOT_WHOLE)
def test_who_resumes_verifies_loads_or_fetches_agrees_on_what_is_whole(
    what: str, root: Path, shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The checksums are right each time."""
    damage, sentence = NOT_WHOLE[what]
    damage(checkpoint(root, 6))
    mirror = tmp_path / "mirror" / "tiny"
    shutil.copytree(root / "tiny", mirror)
    for read in (verify, eqm_dist.load):
        with pytest.raises(CheckpointError, match=sentence):
            read(checkpoint(root, 6))

    fetched = Checkpoints(tmp_path / "new" / "checkpoints", keep=3)
    found = Mirror(str(mirror), tmp_path / "new", fetched, None).fetch(["step_00000006", "step_00000004"])
    assert found == fetched.path(4)
    assert re.search(sentence, caplog.text)
    assert not fetched.path(6).exists()

    caplog.clear()
    assert start(tiny.config(root, shards)).state.step == 4
    assert re.search(sentence, caplog.text)


def test_a_marker_of_another_step_is_damaged(root: Path, shards: Path) -> None:
    """A checkpoint that was copied over another one."""
    shutil.rmtree(checkpoint(root, 6))
    shutil.copytree(checkpoint(root, 2), checkpoint(root, 6))
    assert start(tiny.config(root, shards)).state.step == 4


# --- what a user keeps beside the checkpoints ---

OWN = ["step_00000004_keep", "step_best", "step_00000004.bak", "step_4", "step_0000000004", "step_", "damaged-mine",
       "step_\u0662\u0662\u0662\u0662\u0662\u0662\u0662\u0662"]  # fmt: skip


@pytest.mark.parametrize("whole", [True, False])
def test_copies_that_a_user_made_are_left_alone(whole: bool, root: Path, shards: Path, tmp_path: Path) -> None:
    for name in OWN:
        shutil.copytree(checkpoint(root, 4), checkpoint(root, 4).with_name(name))
        if not whole:
            (checkpoint(root, 4).with_name(name) / MARKER).unlink()
    for place, file in (("evaluations", "step_00000004_keep.json"), ("evaluations", "step_best.json"),
                        ("samples", "best.png"), ("samples", "samples_step4.png")):  # fmt: skip
        (root / "tiny" / place).mkdir(exist_ok=True)
        (root / "tiny" / place / file).write_bytes(b"mine")
    mirror = tmp_path / "mirror"
    shutil.copytree(root / "tiny", mirror / "tiny")
    config = tiny.config(root, shards, **{"train.steps": 8, "optimizer.schedule": "constant"})
    run = start(with_overrides(config, {"checkpoint.mirror": str(mirror), "checkpoint.keep": 1}))
    assert run.state.step == 6
    train(run)
    assert run.mirror is not None
    run.mirror.wait()
    kept = {"step_00000008", *OWN}
    for place in (root / "tiny", mirror / "tiny"):
        assert {path.name for path in (place / "checkpoints").iterdir()} == kept
        assert (place / "evaluations" / "step_best.json").read_bytes() == b"mine"
    assert eqm_dist.load(root / "tiny").step == 8
    assert newest_run(root) == root / "tiny"
    assert pictures(root / "tiny") == []
    (root / "tiny" / "config.yaml").write_bytes((checkpoint(root, 8) / "config.yaml").read_bytes())
    conditions = {entry.name: entry.condition for entry in entries(root / "tiny")}
    assert conditions == {"step_00000008": "whole", **dict.fromkeys(OWN, "your own")}


@pytest.mark.parametrize("content", [b"", b"no safetensors", safetensors.torch.save({"weight": torch.zeros(1)})])
def test_states_that_cannot_be_read_are_named(
    content: bytes, root: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replace_states(checkpoint(root, 6), content)
    assert start(tiny.config(root, shards)).state.step == 4
    assert f"The checkpoint {checkpoint(root, 6)} cannot be read (" in caplog.text


@pytest.mark.parametrize(
    "model",
    [{"model.hidden_size": 8}, {"model.hidden_size": 32}, {"model.depth": 2}, {"model.patch_size": 4},
     {"model.learn_sigma": True}],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(model: dict[str, Any], root: Path, shards: Path) -> None:
    other = start(tiny.config(root, shards, **model, **{"run.name": "other"}))
    before = state(other)
    with pytest.raises(CheckpointError, match=r"must be of the run's model, but .* weights in .* and the model has"):
        other.checkpoints.load(checkpoint(root, 6), other.engine)
    assert_equal(state(other), before)


def test_a_deeper_checkpoint_does_not_load_into_a_shallower_model(shards: Path, tmp_path: Path) -> None:
    deep = start(tiny.config(tmp_path, shards, **{"model.depth": 2}))
    train(deep)
    shallow = start(tiny.config(tmp_path, shards, **{"run.name": "shallow"}))
    with pytest.raises(CheckpointError, match=r"weights in blocks\.1\..* and the model has 0;"):
        shallow.checkpoints.load(checkpoint(tmp_path, 6), shallow.engine)


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path: Path, trained: Path) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    room = sum(file.stat().st_size for file in checkpoint(trained, 6).iterdir()) * 3 // 2 + 64 * 1024
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a small file system here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_costs_nothing_but_the_failed_saves(small_disk: Path, shards: Path, trained: Path) -> None:
    flags = tiny.flags(tiny.overrides(small_disk, shards))
    ended = tiny.train(*flags)
    assert ended.code == 1
    good = checkpoint(small_disk, 2)

    def sentence(step: int) -> str:
        return (
            rf"Saving step {step} failed on rank 0: Cannot write {checkpoint(small_disk, step)}/\S+: No space left on"
            r" device; free space or choose another directory\. "
        )

    assert re.search(rf"warning: {sentence(4)}Training goes on, .* failed saves in a row: 1, .* ends at 3", ended.out)
    assert re.fullmatch(rf"error: {sentence(6)}Nothing was lost: the last good checkpoint is {good}\.\n", ended.err)
    assert list((small_disk / "tiny" / "checkpoints").iterdir()) == [good]
    assert start(tiny.config(small_disk, shards)).state.step == 2

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert tiny.train(*flags).code == 0
    assert (checkpoint(small_disk, 6) / STATE_FILE).read_bytes() == (checkpoint(trained, 6) / STATE_FILE).read_bytes()
    assert curve(small_disk) == curve(trained)


def test_the_command_names_the_last_good_checkpoint_when_it_cannot_save(root: Path, shards: Path) -> None:
    shutil.rmtree(checkpoint(root, 6))
    largest = (checkpoint(root, 4) / STATE_FILE).stat().st_size
    with no_file_larger_than(largest - 1):
        ended = tiny.train(*tiny.flags(tiny.overrides(root, shards)))
    assert ended.code == 1
    assert ended.err.startswith("error: Saving step 6 failed on rank 0: Cannot write ")
    assert "File too large; free space" in ended.err
    assert ended.err.endswith(f"Nothing was lost: the last good checkpoint is {checkpoint(root, 4)}.\n")
    assert ended.err.count("\n") == 1
    assert start(tiny.config(root, shards)).state.step == 4
