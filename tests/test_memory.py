"""Bytes that a worker holds: counted in its storages, against the closed form that docs/training.md gives."""

from pathlib import Path

import pytest
import torch

from benchmarks.bench_memory import CASES, EMA_DECAYS, STATES, on_ranks, state_bytes, storages
from eqm_dist.build import OpenRun, build_run
from eqm_dist.open_run import open_run
from eqm_dist.train.engine import WEIGHT
from eqm_dist.train.memory import model_state_bytes
from tests import tiny
from tests.distributed import run_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.deepspeed]

WORLD = 2


def held(rank: int, runs: list[OpenRun]) -> list[tuple[int, int, dict[str, int]]]:
    """Of every run: trained parameters, how many tensors they are, and the bytes of each state on this rank."""
    found = []
    for opened in runs:
        run = build_run(opened, torch.device("cpu"))
        pieces = run.engine.fragments()
        states = {piece.state for piece in pieces}
        sizes = {name: sum(storages(each.values for each in pieces if each.state == name).values()) for name in states}
        found.append((sum(shape.numel() for shape in run.engine.shapes.values()), len(run.engine.shapes), sizes))
    return found


def test_every_ema_costs_four_bytes_a_parameter_over_all_workers(shards: Path, tmp_path: Path) -> None:
    settings = {"launch.launcher": "ray", "optimizer.ema_decays": [0.9, 0.99]}
    runs = [
        open_run(tiny.config(tmp_path, shards, **settings, **{"run.name": f"zero{stage}", "engine.zero_stage": stage}))
        for stage in range(4)
    ]
    for at, found in enumerate(run_ranks(WORLD, held, runs)):
        for stage, (parameters, tensors, sizes) in enumerate(found):
            assert set(sizes) == {WEIGHT, "exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.99"}
            # Stages 1 and 2 pad all parameters together so that the ranks' parts have one size and begin at even
            # elements; stage 3 pads every parameter.
            share, padding = {0: (parameters, 0), 3: (parameters / WORLD, tensors)}.get(stage, (parameters / WORLD, 2))
            for name, size in sizes.items():
                assert 4 * share <= size <= 4 * (share + padding), f"{name} of rank {at} under ZeRO {stage}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, WORLD])
@pytest.mark.parametrize("case", ["plain", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"])
def test_what_a_rank_holds_has_its_closed_form(case: str, world: int) -> None:
    stage = (CASES[case] or {}).get("zero_stage", 0)
    for found in on_ranks(world, state_bytes, case, {"hidden_size": 192, "depth": 3, "num_heads": 3}):
        parameters = found["parameters"]
        expected = model_state_bytes(parameters, len(EMA_DECAYS), stage, world)
        counted = sum(found[kind] for kind in (*STATES, "computing", "buffers", "gradient"))
        bucket = 4 * parameters if stage == 3 else 0  # DeepSpeed's buffer for reductions, which stage 3 never frees
        assert counted - bucket == pytest.approx(expected, rel=0.005)  # padding
