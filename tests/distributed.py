"""Runs a function on several ranks, as processes that talk over gloo on this machine."""

import faulthandler
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from tests.processes import forked

_DEADLINE_S = 300


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on every rank; its results in rank order.

    A rank that fails or hangs past the deadline fails the test with its traceback. Rendezvous is a file: no ports.
    """
    context = forked()
    with tempfile.TemporaryDirectory() as directory:
        queue = context.Queue()
        # What the processes would inherit of the environment is that of their server's start.
        environment = dict(os.environ)
        processes = [
            context.Process(target=_rank, args=(rank, world, directory, queue, environment, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            results = dict(_next_result(queue, processes) for _ in range(world))
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    for rank, (error, _) in results.items():
        assert error is None, f"rank {rank} failed:\n{error}"
    return [results[rank][1] for rank in range(world)]


def _next_result(queue: Any, processes: list[Any]) -> Any:
    end = time.monotonic() + _DEADLINE_S
    while time.monotonic() < end:
        try:
            return pickle.loads(queue.get(timeout=1))
        except Empty:
            died = [rank for rank, process in enumerate(processes) if process.exitcode]
            assert not died, f"rank {died[0]} died with exit code {processes[died[0]].exitcode}"
    raise AssertionError(f"no result within {_DEADLINE_S} s")


def join_group(rank: int, world: int, directory: Path) -> None:
    """Make this process a rank of a group that meets in the directory."""
    # DeepSpeed reads these even when the process group exists already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory / 'rendezvous'}", rank=rank, world_size=world
    )


def _rank(
    rank: int,
    world: int,
    directory: str,
    queue: Any,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.dump_traceback_later(_DEADLINE_S - 10, exit=True)
    os.environ.clear()
    os.environ.update(environment)
    join_group(rank, world, Path(directory))
    try:
        outcome = None, function(rank, *arguments)
    except Exception:
        outcome = traceback.format_exc(), None
    # Pickled here: a queue would hand over tensors as file descriptors of a process that is about to end.
    queue.put(pickle.dumps((rank, outcome)))
    torch.distributed.destroy_process_group()
