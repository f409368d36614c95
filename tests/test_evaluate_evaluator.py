"""The evaluation inside a run: the same figures and pictures from any number of workers."""

from dataclasses import replace
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
from eqm_dist.evaluate.images import TrainingImages
from eqm_dist.evaluate.metrics import FeatureMoments, half_split_fid
from eqm_dist.evaluate.statistics import MOST_ROWS, Rows
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits
from eqm_dist.train.distributed import all_reduce_sum
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
        # Features of batches of other sizes, again 1e-7, and fp64 sums of the halves in another order.
        assert metrics["eval/fid_yardstick"] == pytest.approx(alone["eval/fid_yardstick"], rel=1e-6)
        assert all(other["eval/fid_yardstick"] == metrics["eval/fid_yardstick"] for other, _ in results)
        assert [len(other) for _, other in results[1:]] == [0] * (world - 1)  # rank 0 alone draws
        first, second = (np.asarray(Image.open(picture), dtype=int) for picture in (path[0], paths[0]))
        assert np.abs(first - second).max() <= 1


class Recording(IdentityAutoencoder):
    """Says how many images it decodes at once."""

    def __init__(self, events: list[int]) -> None:
        self._events = events

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self._events.append(len(latents))
        return super().decode(latents)


def events_of(rank: int, shards: Path, directory: Path) -> list[int]:
    """The real images that this rank decodes at once, and 0 for each collective, in their order."""
    events: list[int] = []

    def summed(tensor: torch.Tensor) -> torch.Tensor:
        events.append(0)
        return all_reduce_sum(tensor)

    made = evaluator(shards, directory)
    real = TrainingImages(str(shards), ShardReader(shards), Recording(events), torch.device("cpu"))
    replace(made, real=real, all_reduce_sum=summed)(made.model.state_dict(), step=5)
    return events


@pytest.mark.multiprocess
def test_ranks_share_the_real_images_and_none_waits_for_more_than_a_batch_of_another(
    shards: Path, tmp_path: Path
) -> None:
    found = run_ranks(3, events_of, shards, tmp_path)
    for rank, events in enumerate(found):
        assert sum(events) == 1797 // 3, f"rank {rank}"
        decoded = [at for at, event in enumerate(events) if event]
        assert all(events[at + 1] == 0 for at in decoded), f"rank {rank} decodes on while others wait"
        assert max(events) == 16
    assert len({tuple(event == 0 for event in events) for events in found}) == 1  # the same collectives everywhere


def test_the_yardstick_of_divided_images_is_that_of_all() -> None:
    # More images than rows are kept, so that the choice is part of it; each part as a worker would hold it.
    count, width = MOST_ROWS + 7, 3
    features = torch.rand(count, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    whole = Rows(torch.arange(0), features[:0]) + Rows(torch.arange(count), features)
    expected = half_split_fid(whole.values, seed=3, splits=2)
    again = half_split_fid(whole.values, seed=3, splits=2, positions=whole.among(count)[0], count=len(whole.values))
    assert again == expected  # to the last bit: one worker's figures are what they were

    sums_of_whole = halves_of(whole, count)
    parts = [Rows(torch.arange(count)[part], features[part]) for part in (slice(0, 9), slice(9, 9), slice(9, count))]
    # fp64 sums of 25,000 squares in another order: some 1e-13 of their size.
    for whole_sum, *sums in zip(sums_of_whole, *(halves_of(rows, count) for rows in parts), strict=True):
        torch.testing.assert_close(sum(sums), whole_sum, rtol=1e-11, atol=0)


def halves_of(rows: Rows, count: int) -> list[torch.Tensor]:
    """What a worker with these rows adds to the moments of each half; of what comes back nothing is looked at."""
    found: list[torch.Tensor] = []
    any_moments = FeatureMoments.of_gaussian(torch.zeros(3), torch.eye(3))

    def add(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return torch.cat([part.flatten() for part in vars(any_moments).values()])

    positions, kept = rows.among(count)
    half_split_fid(
        rows.values[positions >= 0], 3, 2, positions=positions[positions >= 0], count=kept, all_reduce_sum=add
    )
    return found


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
