"""A model directory from somebody else runs nothing, and decides the model, the objective and the sampler alone."""

import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import eqm_dist
from eqm_dist.commands.export import main as export
from eqm_dist.config import Config
from eqm_dist.errors import CheckpointError, ConfigError, DataError, EqmDistError
from eqm_dist.models.autoencoder import load_autoencoder
from eqm_dist.options import options, parse
from eqm_dist.pretrained import Pretrained
from tests import commands, tiny
from tests.vae import save_tiny_vae

PAYLOAD = "import pathlib, torch\npathlib.Path('PWNED').touch()\ndef make():\n    return torch.nn.Identity()\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("theirs")
    shards = tiny.write_blots(root / "data" / "blots")
    assert tiny.train(*tiny.flags(tiny.overrides(root, shards, **{"train.steps": 2, "sampler.nfe": 3}))).code == 0
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the user's, who has credentials and whose path holds it."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "PASSW0RD")
    (place / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(str(place))
    sys.modules.pop("payload", None)
    return place


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server of theirs, and what it was asked."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(500)
            self.end_headers()

        do_POST = do_PUT = do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", seen
        served.shutdown()


def hostile(url: str, here: Path) -> dict[str, Any]:
    """Everything in a config that could act."""
    return {
        "run": {"root": str(here / "stolen")},
        "data": {"shards": "s3://theirs/shards", "cache_dir": str(here / "stolen"), "deadline_s": 1e9},
        "evaluation": {"extractor": "payload:make"},
        "checkpoint": {"mirror": str(here / "stolen"), "every": 1},
        "track": {"mlflow": True, "mlflow_uri": url, "experiment": "theirs"},
        "engine": {
            "kind": "deepspeed",
            "zero_stage": 1,
            "deepspeed": {"flops_profiler": {"enabled": True, "output_file": str(here / "stolen")}},
        },
        "launch": {"launcher": "ray", "max_failures": -1},
    }


def merge(into: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        into[name] = merge(into.get(name) or {}, value) if isinstance(value, dict) else value
    return into


def edit(config: Path, values: dict[str, Any]) -> None:
    config.write_text(yaml.safe_dump(merge(yaml.safe_load(config.read_text()), values)))
    marker = config.with_name("COMPLETE.json")
    if marker.exists():
        content = config.read_bytes()
        record = json.loads(marker.read_text())
        record["files"]["config.yaml"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        marker.write_text(json.dumps(record))


def as_run(trained: Path, gift: Path) -> Path:
    shutil.copytree(trained / "tiny", gift)
    return gift


def as_checkpoint(trained: Path, gift: Path) -> Path:
    return Path(shutil.copytree(trained / "tiny" / "checkpoints" / "step_00000002", gift))


def as_export(trained: Path, gift: Path) -> Path:
    export(["--model", str(trained / "tiny"), "--run.root", str(trained), "--out", str(gift)])
    return gift


KINDS: dict[str, Callable[[Path, Path], Path]] = {"run": as_run, "checkpoint": as_checkpoint, "export": as_export}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_gift_names_is_not_taken(
    kind: str, trained: Path, here: Path, tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    url, seen = server
    gift = KINDS[kind](trained, tmp_path / "gift")
    for config in gift.rglob("config.yaml"):
        edit(config, hostile(url, here))
    (gift / "payload.py").write_text(PAYLOAD)
    (gift / "mlflow.json").write_text(json.dumps({"tracking_uri": url, "run_id": "x", "timeout_s": 1}))
    given = ["--model", str(gift), *(["--autoencoder", "identity"] if kind == "checkpoint" else [])]
    shards = str(trained / "data" / "blots")
    draw = ["--launcher", "local", "--samples", "4"]
    sweep = ["--rungs", "2", "--cache", "none", *draw]

    ended = commands.run("sample", *given, *draw, "--out", "drawn")
    assert ended.code == 0, ended.err
    for name, flags, sentence in (
        ("evaluate", draw, "evaluation.extractor=payload:make in its config is not taken; add --extractor"),
        ("evaluate", [*draw, "--extractor", "digits"], "data.shards=s3://theirs/shards in its config is not taken"),
        ("evaluate", [*draw, "--extractor", "digits", "--reference", shards, "--mlflow", str(gift)], "one of your own"),
        ("denoise", [], "evaluation.extractor=payload:make in its config is not taken; add --evaluation.extractor"),
        ("denoise", ["--evaluation.extractor", "digits"], "data.shards=s3://theirs/shards in its config is not taken"),
        ("compose", ["--labels", "0,1"], "evaluation.extractor=payload:make in its config is not taken"),
        ("ood", [], "data.shards=s3://theirs/shards in its config is not taken; add --images"),
        ("sweep-stepsize", sweep, "evaluation.extractor=payload:make in its config is not taken"),
    ):
        ended = commands.run(name, *given, *flags)
        assert (ended.code, ended.err.count("\n"), sentence in ended.err) == (2, 1, True), ended.err
    ended = commands.run("export", *given, "--out", "exported")
    assert ended.code == 0, ended.err
    text = "".join(path.read_text(errors="ignore") for path in (here / "exported").iterdir())
    for secret in (url, "s3://", "payload", str(here), str(gift)):
        assert secret not in (here / "exported" / "config.yaml").read_text(), secret
    assert "theirs" not in text
    assert seen == []
    assert "payload" not in sys.modules
    assert sorted(path.name for path in here.iterdir()) == ["drawn", "exported", "payload.py"]


def test_the_same_run_is_taken_whole_where_it_is_ones_own(trained: Path, here: Path) -> None:
    model = eqm_dist.load(trained / "tiny", root=trained)
    assert (model.own, model.config.data.shards) == (True, str(trained / "data" / "blots"))
    (here / "runs").symlink_to(trained)
    assert eqm_dist.load("runs/tiny").own
    assert eqm_dist.load().own  # the newest one in runs/
    assert eqm_dist.load(trained / "tiny").own  # the same place by another name
    assert not eqm_dist.load(trained / "tiny", root=here).own
    assert not eqm_dist.load(trained / "data" / ".." / "tiny", root=trained / "data").own


def test_of_a_gift_nothing_is_kept_but_the_model_the_objective_and_the_sampler(
    trained: Path, here: Path, tmp_path: Path
) -> None:
    """Whatever options there will be: those that are kept are named."""
    gift = as_run(trained, tmp_path / "gift")
    edit(gift / "checkpoints" / "step_00000002" / "config.yaml", hostile("http://x", here))
    config, default = eqm_dist.load(gift).config, Config.model_validate({"model": {"size": "S"}})
    kept = ("run.name", "run.seed", "data.latent_shape", "data.num_classes", "model.", "objective.", "optimizer.",
            "train.", "sampler.", "evaluation.every", "evaluation.samples")  # fmt: skip
    for option in options(Config):
        if not option.key.startswith(kept):
            section, _, name = option.key.partition(".")
            assert getattr(getattr(config, section), name) == getattr(getattr(default, section), name), option.key


# --- files that lie ---


def to_secret(path: Path, secret: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(secret)


def remark(checkpoint: Path, name: str) -> None:
    marker = json.loads((checkpoint / "COMPLETE.json").read_text())
    marker["files"][name] = next(iter(marker["files"].values()))
    (checkpoint / "COMPLETE.json").write_text(json.dumps(marker))


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def huge_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{" * 100)


def deep(path: Path) -> None:
    path.write_bytes(b'{"format": ' + b"[" * 1_000_000)


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LIES: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "a link for the EMA": ("run", lambda gift, secret: to_secret(gift / CHECKPOINT / "ema.safetensors", secret)),
    "a link for the config": ("run", lambda gift, secret: to_secret(gift / CHECKPOINT / "config.yaml", secret)),
    "a link for the marker": ("run", lambda gift, secret: to_secret(gift / CHECKPOINT / "COMPLETE.json", secret)),
    "a link for the manifest": ("run", lambda gift, secret: to_secret(gift / "manifest.json", secret)),
    "a link for the metrics": ("run", lambda gift, secret: to_secret(gift / "metrics.jsonl", secret)),
    "a link for the picture": (
        "run",
        lambda gift, secret: (
            (gift / "samples").mkdir(exist_ok=True),
            to_secret(gift / "samples" / "samples_step00000002.png", secret),
        ),
    ),
    "a marker that lists a parent": ("checkpoint", lambda gift, secret: remark(gift, "../x")),
    "a marker that lists an absolute name": ("checkpoint", lambda gift, secret: remark(gift, str(secret))),
    "a marker that is nested too deeply": ("checkpoint", lambda gift, _: deep(gift / "COMPLETE.json")),
    "a pipe for the marker": ("checkpoint", lambda gift, _: pipe(gift / "COMPLETE.json")),
    "a pipe for the config": ("export", lambda gift, _: pipe(gift / "config.yaml")),
    "a link for the weights": ("export", lambda gift, secret: to_secret(gift / "model.safetensors", secret)),
    "a link for the description": ("export", lambda gift, secret: to_secret(gift / "model.json", secret)),
    "a device for the description": ("export", lambda gift, _: to_secret(gift / "model.json", Path("/dev/zero"))),
    "a description that is nested too deeply": ("export", lambda gift, _: deep(gift / "model.json")),
    "a description of null": ("export", lambda gift, _: (gift / "model.json").write_text("null")),
    "a step of text": ("export", lambda gift, _: edit_json(gift / "model.json", step="\x1b[2J")),
    "class names that move the cursor": (
        "export", lambda gift, _: edit_json(gift / "model.json", class_names=["\x1b[2J"] * 3),
    ),
    "a header of 4 EiB": ("export", lambda gift, _: huge_header(gift / "model.safetensors")),
    "a config of aliases": ("export", lambda gift, _: (gift / "config.yaml").write_text(ALIASES)),
    "a config that is nested too deeply": ("export", lambda gift, _: (gift / "config.yaml").write_text("[" * 100_000)),
    "a config of Python": (
        "export", lambda gift, _: (gift / "config.yaml").write_text("!!python/object/apply:os.system ['touch PWNED']"),
    ),
    "an empty config": ("export", lambda gift, _: (gift / "config.yaml").write_text("")),
    "a model of a petabyte": ("export", lambda gift, _: edit(gift / "config.yaml", {"model": {"hidden_size": 2**24}})),
    "a model of a billion blocks": ("export", lambda gift, _: edit(gift / "config.yaml", {"model": {"depth": 10**9}})),
    "a sampler of a billion evaluations": (
        "export",
        lambda gift, _: edit(gift / "config.yaml", {"sampler": {"nfe": 10**9}}),
    ),
    "a billion classes": ("export", lambda gift, _: edit(gift / "config.yaml", {"data": {"num_classes": 10**12}})),
    "a latent of a terabyte": (
        "export", lambda gift, _: edit(gift / "config.yaml", {"data": {"latent_shape": [1, 2**20, 2**20]}}),
    ),
    "an autoencoder elsewhere on this machine": (
        "export",
        lambda gift, secret: edit_json(
            gift / "model.json", autoencoder_id="x", autoencoder_location=str(secret.parent)
        ),
    ),
}  # fmt: skip
CHECKPOINT = "checkpoints/step_00000002"
ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)
)


@pytest.mark.parametrize("what", LIES)
def test_a_gift_that_lies_is_refused_in_one_sentence(what: str, trained: Path, here: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password: T0PSECRET")
    kind, lie = LIES[what]
    gift = KINDS[kind](trained, tmp_path / "gift")
    lie(gift, secret)
    began = time.monotonic()
    given = ["--model", str(gift), *(["--autoencoder", "identity"] if kind == "checkpoint" else [])]
    ended = commands.run("sample", *given, "--launcher", "local", "--samples", "2", "--out", "drawn")
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert "T0PSECRET" not in ended.err + ended.out
    assert "\x1b" not in ended.err
    assert time.monotonic() - began < 20
    assert {path.name for path in here.iterdir()} == {"payload.py"}


def test_links_of_the_hubs_cache_are_followed(trained: Path, here: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--they--model"
    gift = as_export(trained, cache / "snapshots" / "0123abc")
    (cache / "blobs").mkdir()
    for file in list(gift.iterdir()):
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert eqm_dist.load(gift).sample([0]).shape == (1, 4, 4, 1)


def test_an_export_says_nothing_of_where_it_was_made(trained: Path, here: Path, tmp_path: Path) -> None:
    run = as_run(trained, tmp_path / "runs" / "tiny")
    edit(run / "checkpoints" / "step_00000002" / "config.yaml", hostile("http://secret.example", here))
    manifest = json.loads((run / "manifest.json").read_text())
    folder = {"autoencoder": "vae (sha256 0)", "autoencoder_location": str(tmp_path / "vae")}
    (run / "manifest.json").write_text(json.dumps(manifest | folder))
    export(["--model", str(run), "--run.root", str(run.parent), "--out", "out"])
    for path in (here / "out").iterdir():
        for place in (tmp_path, trained):
            assert str(place).encode() not in path.read_bytes(), path.name
        assert b"secret.example" not in path.read_bytes(), path.name
    config = parse(Config, yaml.safe_load((here / "out" / "config.yaml").read_text()))
    assert (config.checkpoint.mirror, config.track.mlflow_uri, config.run.root) == (None, None, None)
    assert config.model == eqm_dist.load(run, root=run.parent).config.model
    with pytest.raises(DataError, match="does not say where that is; name it with autoencoder"):
        eqm_dist.load("out").autoencoder  # noqa: B018


# --- files of weights ---


class _Calls:
    """Pickles as a call that torch lets through, with what it is called with."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def official(trained: Path) -> dict[str, torch.Tensor]:
    return load_file(trained / "tiny" / "checkpoints" / "step_00000002" / "ema.safetensors")


def compressed(path: Path, trained: Path) -> None:
    import zipfile

    torch.save({**official(trained), "x": torch.zeros(4_000_000)}, path.with_suffix(".raw"))
    with zipfile.ZipFile(path.with_suffix(".raw")) as raw, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in raw.namelist():
            packed.writestr(name, raw.read(name))


BOMBS: dict[str, Callable[[Path, Path], object]] = {
    "block 200000": lambda path, trained: torch.save(
        official(trained) | {"blocks.200000.attn.qkv.bias": torch.zeros(1)}, path
    ),
    "a tensor without its numbers": lambda path, trained: torch.save(
        official(trained) | {"y_embedder.embedding_table.weight": torch.zeros(1).expand(10**9, 16)}, path
    ),
    "a compressed tensor": compressed,
    "a bytearray": lambda path, _: torch.save({"x": _Calls(bytearray, 10**12)}, path),
    "a bytearray of old": lambda path, _: torch.save(
        {"x": _Calls(bytearray, 10**12)}, path, _use_new_zipfile_serialization=False
    ),
    "a patch of nothing": lambda path, trained: torch.save(
        official(trained) | {"x_embedder.proj.weight": torch.zeros(16, 1, 0, 0)}, path
    ),
    "a number for a tensor": lambda path, trained: torch.save(
        official(trained) | {"y_embedder.embedding_table.weight": torch.zeros(())}, path
    ),
    "no mapping": lambda path, _: torch.save([1, 2], path),
    "an EMA of text": lambda path, _: torch.save({"ema": "x"}, path),
    "names of numbers": lambda path, _: torch.save({1: torch.zeros(1)}, path),
    "a sparse tensor": lambda path, trained: torch.save(
        official(trained) | {"pos_embed": torch.zeros(1, 4, 16).to_sparse()}, path
    ),
    "a tensor of nowhere": lambda path, trained: torch.save(
        official(trained) | {"pos_embed": torch.zeros(1, 4, 16, device="meta")}, path
    ),
    "half a file": lambda path, trained: (
        torch.save(official(trained), path), path.write_bytes(path.read_bytes()[:2000]),
    ),
    "nothing": lambda path, _: path.write_bytes(b""),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_a_file_of_weights_costs_no_more_than_its_size(what: str, trained: Path, tmp_path: Path) -> None:
    BOMBS[what](tmp_path / "gift.pt", trained)
    began = time.monotonic()
    with pytest.raises(EqmDistError) as error:
        eqm_dist.load(tmp_path / "gift.pt", overrides={"model.num_heads": 2}).model  # noqa: B018
    assert isinstance(error.value, CheckpointError | ConfigError)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 10


def test_a_safetensors_file_with_block_200000_is_refused(trained: Path, tmp_path: Path) -> None:
    save_file(official(trained) | {"blocks.200000.x": torch.zeros(1)}, tmp_path / "gift.safetensors")
    with pytest.raises(CheckpointError, match=r"2 blocks have numbers up to 200,000"):
        eqm_dist.load(tmp_path / "gift.safetensors", overrides={"model.num_heads": 2})


@pytest.mark.parametrize(
    "config",
    [{"block_out_channels": [2**24] * 3}, {"block_out_channels": [8, 8, 4096]}, {"layers_per_block": 10**6},
     {"latent_channels": 10**9}, {"block_out_channels": [8] * 1000}, {"norm_num_groups": 0}, {"act_fn": "nowhere"}],
    ids=str,
)  # fmt: skip
def test_an_autoencoder_is_no_larger_than_its_weights(config: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny_vae(tmp_path / "vae")
    edit_json(folder / "config.json", **config)
    began = time.monotonic()
    with pytest.raises(DataError, match="must hold a diffusers AutoencoderKL"):
        load_autoencoder(str(folder))
    assert time.monotonic() - began < 20


def test_an_autoencoder_of_other_channels_is_refused_before_anything_is_drawn(trained: Path) -> None:
    class Four:
        id, latent_channels = "four", 4

    model = eqm_dist.load(trained / "tiny", root=trained)
    other = Pretrained(model.config, model.weights, "gift", autoencoder_id="four", autoencoder_location="a/b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eqm_dist.pretrained.load_autoencoder", lambda *_: Four())
        with pytest.raises(DataError, match=r"four has latents of 4 channels, and the model in gift makes 1"):
            other.require_pictures()
