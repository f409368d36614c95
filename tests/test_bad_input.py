"""What a user can get wrong ends with the right exit code and one sentence, and costs nothing.

Wrong options by themselves are in test_config and test_cli, damaged checkpoints and full disks in test_checkpoint,
silent servers in test_track, clusters in test_ray.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eqm_dist.data.manifest import MANIFEST_NAME
from eqm_dist.data.shards import write_shards
from eqm_dist.models.autoencoder import IdentityAutoencoder
from tests import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards to do damage to."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The root of a run that has made its first two steps of six and was then killed."""
    root = tmp_path_factory.mktemp("begun")
    flags = tiny.flags(tiny.overrides(root, shards, **{"optimizer.schedule": "constant"}))
    assert tiny.train(*flags).code == 0
    for step in (4, 6):
        shutil.rmtree(root / "tiny" / "checkpoints" / f"step_{step:08d}")
    (root / "tiny" / "result.json").unlink()
    return root


def train(root: Path, shards: Path, **others: Any) -> tiny.Outcome:
    return tiny.train(*tiny.flags(tiny.overrides(root, shards, **others)))


def assert_sentence(ended: tiny.Outcome, sentence: str, code: int = 2) -> None:
    """The command ended with this code and said this, in one line and without a traceback."""
    assert ended.code == code, ended.err
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert sentence in ended.err


def files(directory: Path) -> dict[str, bytes]:
    """All files below a directory with their bytes, but for logs, which may grow."""
    found = [path for path in directory.rglob("*") if path.is_file() and "logs" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


# --- options ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {step: 5}", "train.step is not an option ({file}); did you mean train.steps?"),
        ("train: {steps: many}", "train.steps: should be a valid integer"),
        ("train: {steps: yes}", "train.steps: should not be true or false, got True ({file})"),
        ("train: [", "{file} is not valid YAML"),
    ],
)
def test_a_wrong_file(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    root = tmp_path / "runs"
    assert_sentence(tiny.train("--config", str(file), "--run.root", str(root)), sentence.format(file=file))
    assert not root.exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train.step", "5"], "--train.step is not an option (command line); did you mean --train.steps?"),
        (["--train.steps", "many"], "train.steps: should be a valid integer"),
        (["--dryrun"], "--dryrun is not an option (command line); did you mean --dry-run?"),
        (["--run.name", "data"], "name data is taken by what all runs share; choose another"),
        (["--run.name", "mlflow-artifacts"], "name mlflow-artifacts is taken"),
        (["--run.name", "mlflow.db"], "name mlflow.db is taken"),
        (["--run.name", "up/../../and/away"], "run.name: String should match pattern"),
        (["--config", "nowhere.yaml"], "--config must name a readable YAML file, got nowhere.yaml"),
        (["--train.micro_batch", "500"], "micro_batch=500 must be at most global_batch=128"),
    ],
)
def test_a_wrong_flag(flags: list[str], sentence: str, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert_sentence(tiny.train("--run.root", str(root), *flags), sentence)
    assert not root.exists()


def test_a_root_that_cannot_be_a_directory(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = train(tmp_path / "file", shards)
    assert_sentence(ended, f"Cannot create {tmp_path / 'file' / 'tiny'}: Not a directory; check the disk", code=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which has tf32")
def test_tf32_without_a_gpu_and_then_its_remedy(shards: Path, tmp_path: Path) -> None:
    sentence = "train.precision=tf32 needs a GPU, and this process has cpu; use fp32."
    assert_sentence(train(tmp_path, shards, **{"train.precision": "tf32"}), sentence)
    assert train(tmp_path, shards, **{"train.precision": "fp32"}).code == 0  # nothing had begun


# --- data ---


@pytest.mark.parametrize(
    ("shards", "sentence"),
    [
        ("/nowhere/at/all", "Shards must lie in a directory, but /nowhere/at/all does not exist; prepare one with"),
        ("gs://bucket/shards", "A location must be a local path, received the gs: URL gs://bucket/shards; use"),
        ("pipe:cat shards", "A location must be a local path, received the pipe: URL pipe:cat shards; use"),
    ],
)
def test_shards_that_are_nowhere(shards: str, sentence: str, tmp_path: Path) -> None:
    assert_sentence(train(tmp_path / "runs", Path("/"), **{"data.shards": shards}), sentence)
    assert not (tmp_path / "runs").exists()


def test_a_directory_without_a_manifest(tmp_path: Path) -> None:
    sentence = f"A data set must have a manifest.json, but {tmp_path} holds none; prepare one with"
    assert_sentence(train(tmp_path / "runs", tmp_path), sentence)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"data.latent_shape": [1, 8, 8]}, "data.latent_shape=[1, 8, 8] must be that of the shards in {shards}, [1"),
        ({"data.latent_shape": [2, 4, 4]}, "data.latent_shape=[2, 4, 4] must be that of the shards in {shards}, [1"),
        ({"data.num_classes": 10}, "data.num_classes=10 must be that of the shards in {shards}, 3; correct"),
        ({"data.flip": True}, "data.flip=true needs shards that hold mirrored images, and those in {shards} do not"),
        ({"evaluation.every": 2}, "The classifier takes uint8 images of shape [B, 8, 8, 1], got uint8 [1,"),
    ],
)  # fmt: skip
def test_shards_that_are_not_what_the_options_say(
    others: dict[str, Any], sentence: str, shards: Path, tmp_path: Path
) -> None:
    assert_sentence(train(tmp_path / "runs", shards, **others), sentence.format(shards=shards))
    assert not (tmp_path / "runs").exists()


def test_mirrored_shards_can_be_flipped(tmp_path: Path) -> None:
    shards = tiny.write_blots(tmp_path / "shards", mirror=True)
    assert train(tmp_path, shards, **{"data.flip": True, "train.steps": 2}).code == 0


class Elsewhere(IdentityAutoencoder):
    """An autoencoder that this release does not have."""

    id = "elsewhere"


def test_latents_that_cannot_be_decoded_can_still_be_trained_on(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", "blots", tiny.Blots(), Elsewhere(), samples_per_shard=16, dtype="float32")
    ended = train(tmp_path, tmp_path / "shards", **{"evaluation.every": 2})
    assert_sentence(
        ended, "were encoded with the autoencoder 'elsewhere', and their manifest does not say where it is; set"
    )
    assert train(tmp_path, tmp_path / "shards", **{"evaluation.every": 0}).code == 0


def truncate(directory: Path) -> None:
    tar = directory / "blots-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1024])


def edit(directory: Path) -> None:
    tar = directory / "blots-000001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"NUMPY") + 125] ^= 1  # the first pixel
    tar.write_bytes(content)


def remove(directory: Path) -> None:
    (directory / "blots-000001.tar").unlink()


def edit_index(directory: Path) -> None:
    index = directory / "index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"\x7f")


def edit_manifest(directory: Path) -> None:
    manifest = directory / MANIFEST_NAME
    manifest.write_text(manifest.read_text()[:-20])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, r"blots-000001\.tar must have [\d,]+ bytes as the manifest records, found [\d,]+; delete it"),
        (edit, r"blots-000001\.tar must have the sha256 \w{12}\.\.\. that the manifest records, found \w{12}\.\.\.: "),
        (remove, r"blots-000001\.tar must be there, for the manifest lists it; restore it"),
        (edit_index, r"index\.npy must have the sha256"),
        (edit_manifest, r"The manifest \S+manifest\.json is damaged \("),
    ],
)
def test_damaged_shards(damage: Callable[[Path], None], sentence: str, own_shards: Path, tmp_path: Path) -> None:
    damage(own_shards)
    ended = train(tmp_path, own_shards)
    found = re.search(sentence, ended.err)
    assert found, ended.err
    assert_sentence(ended, found[0])


def test_a_shard_that_is_edited_while_a_run_is_away(begun: Path, own_shards: Path, tmp_path: Path) -> None:
    """The last good checkpoint outlives data that went bad, and the run goes on once they are back."""
    root = Path(shutil.copytree(begun, tmp_path / "begun"))
    constant = {"optimizer.schedule": "constant"}
    whole = (own_shards / "blots-000001.tar").read_bytes()
    edit(own_shards)
    checkpoints = files(root / "tiny" / "checkpoints")
    assert_sentence(train(root, own_shards, **constant), "blots-000001.tar must have the sha256")
    assert files(root / "tiny" / "checkpoints") == checkpoints
    (own_shards / "blots-000001.tar").write_bytes(whole)
    ended = train(root, own_shards, **constant)
    assert (ended.code, ended.err) == (0, "")
    assert "run tiny resumes at step 2" in ended.out


# --- resuming ---


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"optimizer.learning_rate": 0.5}, "optimizer.learning_rate was 0.002 when the run tiny started and is"),
        ({"model.depth": 2}, "model.depth was 1 when the run tiny started and is now 2; start another run"),
        ({"run.seed": 1}, "run.seed was 0 when the run tiny started and is now 1; "),
        ({"train.global_batch": 5}, "train.global_batch was 4 when the run tiny started and is now 5; "),
        ({"optimizer.ema_decays": [0.99, 0.9]}, "optimizer.ema_decays was [0.99] when the run tiny started and is now"),
        ({"objective.label_dropout": 0.2}, "objective.label_dropout was 0.1 when the run tiny started and is"),
        ({"train.steps": 1}, "train.steps=1 must be at least the 2 steps that the run tiny has made already; raise it"),
    ],
)  # fmt: skip
def test_a_run_goes_on_only_as_what_it_was(
    others: dict[str, Any], sentence: str, begun: Path, shards: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(begun, tmp_path / "begun"))
    before = files(root)
    assert_sentence(train(root, shards, **{"optimizer.schedule": "constant"}, **others), sentence)
    assert files(root) == before


def test_the_steps_of_a_decaying_schedule_cannot_change(shards: Path, tmp_path: Path) -> None:
    assert train(tmp_path, shards).code == 0
    sentence = (
        "train.steps was 6 when the run tiny started and is now 8, which would change the learning rates of its cosine"
    )
    assert_sentence(train(tmp_path, shards, **{"train.steps": 8}), sentence)


def test_a_run_is_not_continued_on_other_shards(begun: Path, own_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(begun, tmp_path / "begun"))
    manifest = own_shards / MANIFEST_NAME
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(fields | {"latent_scale": 0.5}))
    ended = train(root, own_shards, **{"optimizer.schedule": "constant"})
    assert_sentence(ended, f"The shards in {own_shards} are not those that the run tiny started with; restore them")


def test_a_run_is_continued_on_the_same_shards_elsewhere(begun: Path, own_shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(begun, tmp_path / "begun"))
    assert train(root, own_shards, **{"optimizer.schedule": "constant"}).code == 0


def test_a_checkpoint_that_cannot_be_read(begun: Path, shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(begun, tmp_path / "begun"))
    file = root / "tiny" / "checkpoints" / "step_00000002" / "state-0000-of-0001.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    ended = train(root, shards, **{"optimizer.schedule": "constant"})
    assert_sentence(ended, f"{file} is damaged: its sha256 is ")


# --- as a process ---


def process(*arguments: str) -> tiny.Outcome:
    """The command as a user starts it."""
    command = [sys.executable, str(ROOT / "pipelines" / "train.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    return tiny.Outcome(ended.returncode, ended.stdout, ended.stderr)


def test_a_wrong_flag_ends_the_process_with_2() -> None:
    ended = process("--train.step", "5")
    assert_sentence(ended, "--train.step is not an option (command line); did you mean --train.steps?")
    assert ended.out == ""


def test_a_changed_shard_ends_the_process_with_2(own_shards: Path, tmp_path: Path) -> None:
    edit(own_shards)
    ended = process(*tiny.flags(tiny.overrides(tmp_path, own_shards)))
    assert_sentence(ended, "blots-000001.tar must have the sha256")
    assert "is complete" not in ended.out
