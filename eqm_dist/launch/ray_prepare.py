"""Shards written by the actors of a Ray cluster: one shard is one unit of work, and Ray changes no byte of it.

An actor holds an autoencoder, a GPU if there are any, and the cores that go with it: its threads decode the next images
while it encodes. It writes its shards itself, so images and moments stay on its machine; only their indices
come back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from eqm_dist.data.encode import ShardTask, ShardWriter
from eqm_dist.data.index import ShardIndex
from eqm_dist.errors import EqmDistError, LaunchError
from eqm_dist.launch.ray_cluster import cluster

IN_FLIGHT = 2
"""Shards that an actor has been given at once: one in work, one waiting. Bounds what a slow disk can pile up."""
TRIES = 4
"""Times that a shard is tried, on actor after actor, when the machine or the process under it dies."""


def run_on_ray(writer: ShardWriter, tasks: Sequence[ShardTask]) -> Iterator[tuple[ShardTask, ShardIndex]]:
    """The runner of the cluster that RAY_ADDRESS names, or of a local one that is started for it.

    Raises:
        EqmDistError: what an actor raised, as it raised it.
        LaunchError: actors died again and again on one shard.
    """
    with cluster():
        recipe = ray.put(writer)  # once, whatever the number of actors: it may name millions of files
        actors = _actors(recipe, len(tasks))
        waiting = iter(tasks)
        running: dict[Any, tuple[ShardTask, Any]] = {}
        for actor, task in zip(cycle(actors), islice(waiting, IN_FLIGHT * len(actors)), strict=False):
            running[actor.write.remote(task)] = task, actor
        while running:
            [finished], _ = ray.wait(list(running), num_returns=1)
            task, actor = running.pop(finished)
            index = _result(finished, task)
            for following in islice(waiting, 1):
                running[actor.write.remote(following)] = following, actor
            yield task, index


@dataclass(frozen=True)
class _Share:
    """What one actor gets."""

    cpus: int
    gpus: int


@ray.remote(max_restarts=-1, max_task_retries=TRIES - 1)
class _Encoder:
    def __init__(self, recipe: Sequence[Any], share: _Share) -> None:
        torch.set_num_threads(share.cpus)
        self._writer: ShardWriter = ray.get(recipe[0])
        self._device = torch.device("cuda" if share.gpus else "cpu")

    def write(self, task: ShardTask) -> ShardIndex:
        return self._writer.write(task, self._device)


def _actors(recipe: Any, tasks: int) -> list[Any]:
    count, share = _divide([node["Resources"] for node in ray.nodes() if node["Alive"]])
    remote = _Encoder.options(num_cpus=share.cpus, num_gpus=share.gpus)
    # As a reference inside a list, which the driver keeps alive: an actor that is restarted asks for it again.
    return [remote.remote([recipe], share) for _ in range(min(count, tasks))]


def _divide(nodes: Sequence[dict[str, float]]) -> tuple[int, _Share]:
    """One actor for each GPU, with its share of the cores of the node that has fewest for each; without GPUs one
    actor for each core."""
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus:
        cpus = min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus)
        return sum(int(node["GPU"]) for node in with_gpus), _Share(max(1, cpus), 1)
    return max(1, sum(int(node.get("CPU", 0)) for node in nodes)), _Share(1, 0)


def _result(reference: Any, task: ShardTask) -> ShardIndex:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, EqmDistError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LaunchError(
            f"A shard must be written within {TRIES} tries, but the processes that wrote {task.path.name} died each"
            f" time ({str(error).strip().splitlines()[0]}); see that they have enough memory, and run the same command"
            " again to go on."
        ) from error
