"""Every objective through the real command: it trains, and what it adds to the loss is in the loss that is logged."""

from pathlib import Path
from typing import Any

import pytest

from eqm_dist.track.jsonl import read_metrics
from tests import tiny


def losses(root: Path, shards: Path, **others: Any) -> list[float]:
    ended = tiny.train(*tiny.flags(tiny.overrides(root, shards, **others)))
    assert ended.code == 0, ended.err
    return [line["train/loss"] for line in read_metrics(root / "tiny" / "metrics.jsonl")]


@pytest.mark.parametrize(
    "objective",
    [
        {"objective.kind": "self_stopping"},
        {"objective.kind": "self_stopping", "objective.braking_start": 0.5, "objective.energy": "dot"},
        {"objective.kind": "flow_matching", "objective.dispersive.weight": 0.5, "objective.dispersive.group": 4},
        {"objective.kind": "time_free_flow_matching", "objective.weighting.kind": "min_snr"},
        {"objective.weighting.kind": "relative", "objective.energy": "l2", "model.zero_init": False},
    ],
    ids=lambda objective: "-".join(str(value) for value in objective.values()),
)
def test_an_objective_trains_and_differs_from_the_default(
    objective: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    found = losses(tmp_path / "one", shards, **objective)
    assert len(found) == 6
    assert all(loss > 0 for loss in found)
    assert found != losses(tmp_path / "default", shards)


def test_the_zero_field_costs_what_each_objective_says(shards: Path, tmp_path: Path) -> None:
    # At the first step the field is 0, so the loss is the mean of |latents - noise|^2 c(gamma)^2 w(gamma).
    plain = losses(tmp_path / "a", shards)[0]
    # A floor at lambda itself caps c from below everywhere: the weight is 1 / lambda^2 for every gamma.
    relative = {"objective.weighting.kind": "relative", "objective.weighting.floor": 1.0}
    flat = losses(tmp_path / "b", shards, **relative)[0]
    assert flat == pytest.approx(plain / 16, rel=1e-6)
    # The pace of the path that brakes at a is the truncated decay with lambda = 2 / (1 + a).
    stopping = losses(tmp_path / "c", shards, **{"objective.kind": "self_stopping"})[0]
    assert stopping == pytest.approx(plain * (2 / 1.8 / 4) ** 2, rel=1e-6)


def test_the_dispersive_loss_is_added_and_zero_where_all_tokens_are_alike(shards: Path, tmp_path: Path) -> None:
    plain = losses(tmp_path / "a", shards)
    weighed = {"objective.dispersive.weight": 0.5, "objective.dispersive.group": 2}
    dispersed = losses(tmp_path / "b", shards, **weighed)
    assert dispersed[0] < plain[0]  # it is negative where samples differ
    hot = losses(tmp_path / "c", shards, **{**weighed, "objective.dispersive.temperature": 1e9})
    assert hot[0] == pytest.approx(plain[0], rel=1e-6)


def test_a_group_that_workers_would_cut_is_refused_in_a_sentence(shards: Path, tmp_path: Path) -> None:
    others = {"objective.dispersive.weight": 0.5, "objective.dispersive.group": 3}
    ended = tiny.train(*tiny.flags(tiny.overrides(tmp_path, shards, **others)))
    assert ended.code == 2
    assert "train.global_batch=4 must be a multiple of 3: 1 workers x 1 micro-batches x" in ended.err
    assert ended.err.count("\n") == 1
