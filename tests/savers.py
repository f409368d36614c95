"""Ranks that do nothing but save, one step after the other, until somebody kills them."""

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from eqm_dist.build import OpenRun, build_run
from eqm_dist.train.loop import Run
from eqm_dist.train.state import TrainState
from tests.distributed import join_group
from tests.processes import forked

CPU = torch.device("cpu")


def values_at(step: int, start: int, numel: int) -> torch.Tensor:
    """What a test saves at a step: every element knows its step and its place. Exact in fp32."""
    return (torch.arange(start, start + numel) % 997 + 1000 * step).float()


def fill(run: Run, step: int) -> None:
    for piece in run.engine.fragments():
        piece.values.copy_(values_at(step, piece.start, piece.values.numel()))


def assert_filled(run: Run, step: int) -> None:
    for piece in run.engine.fragments():
        assert torch.equal(piece.values, values_at(step, piece.start, piece.values.numel())), piece.name


def start_savers(
    world: int, opened: OpenRun, directory: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> list[Any]:
    """The processes of a group that meets in the directory and goes on where the newest checkpoint is; by now they
    save. What they find in their environment besides is given."""
    context = forked()
    receive, send = context.Pipe(duplex=False)
    arguments = world, opened, directory, dict(environment), send
    ranks = [context.Process(target=_save_on, args=(rank, *arguments)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    send.close()  # or the end of all ranks would not be the end of the pipe
    with receive:
        assert receive.recv() == "saving"
    return ranks


def _save_on(
    rank: int, world: int, opened: OpenRun, directory: Path, environment: dict[str, str], send: Connection
) -> None:
    os.environ |= environment
    join_group(rank, world, directory)
    run = build_run(opened, CPU)
    if rank == 0:
        send.send("saving")
    send.close()
    for step in range(run.state.step + 1, 1_000_000):
        run.saver.wait_copied()
        fill(run, step)
        run.saver.begin(TrainState(step))
