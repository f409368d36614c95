"""The evaluation inside a run: the same figures and pictures from any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqm_dist.build import build_evaluator, build_model
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.shards import digits_shards
from eqm_dist.errors import ConfigError
from eqm_dist.evaluate.evaluator import Evaluator
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits
from tests.distributed import run_ranks

OVERRIDES = {
    "model.hidden_size": 16,
    "model.depth": 1,
    "model.num_heads": 2,
    "model.zero_init": False,
    "evaluation.samples": 47,  # neither 2 nor 3 divide it
    "evaluation.batch": 16,
    "evaluation.grid_columns": 3,
    "sampler.nfe": 5,
}


def evaluator(shards: Path, directory: Path) -> Evaluator:
    config = with_overrides(digits(), OVERRIDES)
    reader = ShardReader(shards)
    return build_evaluator(config, directory, reader, torch.device("cpu"))


def evaluate(rank: int, shards: Path, directory: Path) -> tuple[dict[str, float], list[Path]]:
    weights = build_model(with_overrides(digits(), {**OVERRIDES, "run.seed": 7})).state_dict()
    return evaluator(shards, directory)(weights, step=5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "digits"
    digits_shards(directory)
    return directory


@pytest.mark.multiprocess
def test_figures_and_picture_do_not_depend_on_the_number_of_workers(shards: Path, tmp_path: Path) -> None:
    alone, path = run_ranks(1, evaluate, shards, tmp_path / "1")[0]
    assert path == [tmp_path / "1" / "samples" / "samples_step00000005.png"]
    assert alone["eval/samples"] == 47
    assert alone["eval/nfe"] == 5
    for world in (2, 3):
        results = run_ranks(world, evaluate, shards, tmp_path / str(world))
        metrics, paths = results[0]
        # Batches of other sizes round the network's sums differently (1e-7), which may turn a pixel's 8-bit value.
        assert metrics["eval/fid"] == pytest.approx(alone["eval/fid"], rel=1e-3)
        assert metrics["eval/fid_yardstick"] == alone["eval/fid_yardstick"]
        assert [len(other) for _, other in results[1:]] == [0] * (world - 1)  # rank 0 alone draws
        first, second = (np.asarray(Image.open(picture), dtype=int) for picture in (path[0], paths[0]))
        assert np.abs(first - second).max() <= 1


def test_the_real_images_are_those_of_the_shards(shards: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    images = torch.cat(list(evaluator(shards, tmp_path).real.read(0, 1797, 256))).numpy()
    levels = np.rint(images[..., 0].astype(float) * 16 / 255)
    pixels, _ = load_digits(return_X_y=True)
    np.testing.assert_array_equal(levels.reshape(1797, 64), pixels)


def test_all_metrics_come_with_the_fid_where_one_process_measures(shards: Path, tmp_path: Path) -> None:
    names = ["fid", "kid", "is", "precision", "recall"]
    options = {
        **OVERRIDES, "evaluation.metrics": names, "evaluation.samples": 1000, "launch.launcher": "local",
        "sampler.nfe": 1,
    }  # fmt: skip
    config = with_overrides(digits(), options)
    weights = build_model(config).state_dict()
    cache = str(tmp_path / "cache")
    first, second = (
        build_evaluator(config, tmp_path, ShardReader(shards), torch.device("cpu"), cache)(weights, 5)[0]
        for _ in range(2)
    )
    assert {f"eval/{name}" for name in names} <= first.keys()
    assert second == first  # the second time the real images come from the cache
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert 1 <= first["eval/is"] <= 10
    with pytest.raises(ConfigError, match="keeps features of every image, which only one process can"):
        with_overrides(config, {"launch.launcher": "ray"})
    with pytest.raises(ConfigError, match="metrics must hold fid"):
        with_overrides(config, {"evaluation.metrics": ["kid"]})
