"""``pipelines/sample.py``: the same images from any number of actors and any batch, whatever kills it."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from eqm_dist import rng
from eqm_dist.commands.sample import main
from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.labels import labels_of
from eqm_dist.pretrained import load
from tests import tiny
from tests.processes import wait_for

SCRIPT = Path(__file__).parent.parent / "pipelines" / "sample.py"
LOCAL = ["--launcher", "local"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    return tiny.trained(tmp_path_factory.mktemp("runs"), shards, **tiny.FAR)


def pixels(directory: Path) -> np.ndarray:
    files = sorted(path for path in directory.glob("*.png") if path.stem.isdecimal())
    return np.stack([np.asarray(Image.open(path)) for path in files])


def close(first: np.ndarray, second: np.ndarray) -> None:
    # Sums over another batch size round otherwise in fp32, about 1e-6 of a latent; where that crosses the border
    # between two of the 256 values, the image differs by one. With 24 steps of 0.02 nothing can grow beyond that.
    difference = np.abs(first.astype(int) - second.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_the_batch_changes_nothing(run: Path, tmp_path: Path) -> None:
    drawn = {}
    for batch in (1, 7, 64):
        out = tmp_path / str(batch)
        main(["--model", str(run), "--out", str(out), "--samples", "100", "--batch", str(batch), *LOCAL])
        drawn[batch] = pixels(out)
    assert len({image.tobytes() for image in drawn[64]}) == 100  # they are not all one image
    close(drawn[1], drawn[64])
    close(drawn[7], drawn[64])


@pytest.mark.ray
@pytest.mark.slow
def test_actors_and_batches_change_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", str(cluster.address))
    try:
        main(["--model", str(run), "--out", str(tmp_path / "alone"), "--samples", "500", *LOCAL])
        expected = pixels(tmp_path / "alone")
        for actors, batch in ((1, 64), (2, 7), (3, 64), (3, 1)):
            out = tmp_path / f"{actors}-{batch}"
            flags = f"--samples 500 --actors {actors} --batch {batch}".split()
            main(["--model", str(run), "--out", str(out), *flags])
            close(pixels(out), expected)
    finally:
        cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_command_goes_on_and_the_set_is_the_same(run: Path, tmp_path: Path) -> None:
    common = ["--model", str(run), "--samples", "500", "--batch", "8", "--sampler.nfe", "200"]
    main([*common, "--out", str(tmp_path / "alone"), *LOCAL])
    out = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *common, "--out", str(out)]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    kept: dict[Path, int] = {}

    def so_far(units: int) -> bool:
        return len(list(out.glob(".units/*.json"))) >= units

    for units in (1, 3):
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        wait_for(partial(so_far, units), process)
        below = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        for child in below:
            if child.is_running():
                child.kill()
        process.communicate()
        psutil.wait_procs(below, timeout=20)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
        kept = {path: path.stat().st_mtime_ns for path in out.glob(".units/*.json")}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert "images/s" in finished.stdout
    assert not (out / ".units").exists()
    close(pixels(out), pixels(tmp_path / "alone"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    main([*common, "--out", str(out), *LOCAL])  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_labels_are_a_rule_of_the_index() -> None:
    indices = torch.arange(10_000)
    assert labels_of("balanced", indices, 3, 0)[:5].tolist() == [0, 1, 2, 0, 1]
    assert labels_of("2,0", indices, 3, 0)[:4].tolist() == [2, 0, 2, 0]
    drawn = labels_of("random", indices, 3, 0)
    assert torch.equal(drawn[5000:], labels_of("random", indices[5000:], 3, 0))
    # Each count is binomial: standard deviation 47, so 5 of them are 0.024 of the mean.
    assert torch.allclose(torch.bincount(drawn, minlength=3) / 10_000, torch.tensor(1 / 3), atol=0.024)
    assert not torch.equal(drawn, labels_of("random", indices, 3, 1))
    for rule in ("4", "cat", "1,,2", "-1"):
        with pytest.raises(ConfigError, match="--labels must be balanced, random, or classes up to 3"):
            labels_of(rule, indices, 3, 0)


def test_the_report_and_the_grid(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--samples", "12", "--labels", "2,1", "--format", "npz", "--sampler.nfe", "5"]
    main(["--model", str(run), "--out", str(tmp_path / "out"), *flags, *LOCAL])
    report = capsys.readouterr().out
    assert "12 as npz, labels 2,1, seed 0" in report
    assert "5 an image" in report
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.mode == "RGB"
    with np.load(tmp_path / "out" / "samples.npz", allow_pickle=False) as file:
        assert file["arr_1"].tolist() == [2, 1] * 6


def test_adaptive_compute_is_shown_and_trouble_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(run), "--samples", "40", *LOCAL]
    model, indices = load(run), torch.arange(40)
    start = rng.normal(0, rng.Stream.START_NOISE, indices, (1, 4, 4))
    norms = model.field(torch.device("cpu"))(start, indices % 3, torch.zeros(40)).square().mean((1, 2, 3)).sqrt()
    limit = f"{norms.median().item():.4f}"  # half of them stop at once
    main([*common, "--out", str(tmp_path / "a"), "--sampler.stop_norm", limit])
    report = capsys.readouterr().out
    assert "(from " in report
    Image.open(tmp_path / "a" / "nfe.png").verify()
    main([*common, "--out", str(tmp_path / "b"), "--sampler.step_size", "1e30"])
    assert "40 images, which are blank; use a smaller step size" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_said_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="momentum has no effect with name=gd"):
        main(["--model", str(run), "--out", str(out), "--sampler.name", "gd", "--sampler.momentum", "0.3", *LOCAL])
    with pytest.raises(ConfigError, match="must be a whole number of at least 1, got 0"):
        main(["--model", str(run), "--out", str(out), "--samples", "0", *LOCAL])
    with pytest.raises(ConfigError, match="--labels must be"):
        main(["--model", str(run), "--out", str(out), "--labels", "9", *LOCAL])
    assert not out.exists()
