"""Independent tasks done by the actors of a Ray cluster: shards to write, images to draw or to measure.

An actor holds what the work needs (weights, an open data set), a GPU if there are any, and the cores that go with it.
It does one task at a time and only what the task returns travels back. Ray changes no number of it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from eqm_dist.errors import EqmDistError, LaunchError
from eqm_dist.launch.ray_cluster import cluster

IN_FLIGHT = 2
"""Tasks that an actor has been given at once: one in work, one waiting. Bounds what slow work can pile up."""
TRIES = 4
"""Times that a task is tried, on actor after actor, when the machine or the process under it dies."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_on_ray(
    work: Callable[[Task, torch.device], Result], tasks: Sequence[Task], *, most_actors: int | None = None
) -> Iterator[tuple[Task, Result]]:
    """Do all tasks; see ``ray_actors``."""
    if not tasks:
        return
    with ray_actors(work, most_actors=min(len(tasks), most_actors or len(tasks))) as run:
        yield from run(tasks)


@contextmanager
def ray_actors(
    work: Callable[[Task, torch.device], Result], *, most_actors: int | None = None
) -> Iterator[Callable[[Iterable[Task]], Iterator[tuple[Task, Result]]]]:
    """Actors for several rounds of tasks, on the cluster that RAY_ADDRESS names or a local one started for them.

    Args:
        work: (task, the actor's device) -> result; pickles. Each actor has its own copy, which it keeps from task to
            task.
        most_actors: fewer actors than the cluster has room for.

    Yields:
        What does tasks: it takes them in the order in which they are begun (they pickle, their text names them in
        errors) and gives each with its result as it is done, in any order. It asks for a task no sooner than an actor
        can take it.

    Raises:
        EqmDistError: what an actor raised, as it raised it.
        LaunchError: actors died again and again on one task.
    """
    with cluster():
        recipe = ray.put(work)  # once, whatever the number of actors: it may hold weights, or name millions of files
        yield partial(_run, _actors(most_actors), recipe)


def _run(actors: Sequence[Any], recipe: Any, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
    waiting = iter(tasks)
    running: dict[Any, tuple[Task, Any]] = {}
    for actor, task in zip(islice(cycle(actors), IN_FLIGHT * len(actors)), waiting, strict=False):
        running[actor.do.remote([recipe], task)] = task, actor
    while running:
        [finished], _ = ray.wait(list(running), num_returns=1)
        task, actor = running.pop(finished)
        result = _result(finished, task)
        for following in islice(waiting, 1):
            running[actor.do.remote([recipe], following)] = following, actor
        yield task, result


@dataclass(frozen=True)
class _Share:
    """What one actor gets."""

    cpus: int
    gpus: int


@ray.remote(max_restarts=-1, max_task_retries=TRIES - 1)
class _Actor:
    def __init__(self, share: _Share) -> None:
        torch.set_num_threads(share.cpus)
        self._device = torch.device("cuda" if share.gpus else "cpu")
        self._work: Any = None

    def do(self, recipe: Sequence[Any], task: Any) -> Any:
        # Inside a list the reference comes as it is; an actor that was restarted asks for what it stands for again.
        if self._work is None:
            self._work = ray.get(recipe[0])
        return self._work(task, self._device)


def _actors(most: int | None) -> list[Any]:
    count, share = _divide([node["Resources"] for node in ray.nodes() if node["Alive"]])
    remote = _Actor.options(num_cpus=share.cpus, num_gpus=share.gpus)
    return [remote.remote(share) for _ in range(min(count, most or count))]


def _divide(nodes: Sequence[dict[str, float]]) -> tuple[int, _Share]:
    """One actor for each GPU, with its share of the cores of the node that has fewest for each; without GPUs one
    actor for each core.

    Raises:
        LaunchError: there is room for none.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus:
        cpus = max(1, min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus))
        # An actor that has no CPU would wait for one without end.
        count = sum(min(int(node["GPU"]), int(node.get("CPU", 0)) // cpus) for node in with_gpus)
        share = _Share(cpus, 1)
    else:
        count, share = sum(int(node.get("CPU", 0)) for node in nodes), _Share(1, 0)
    if not count:
        raise LaunchError(
            "The cluster must have a CPU for an actor, and has none beside its GPUs or at all; start its nodes with"
            " --num-cpus, or use --launcher local."
        )
    return count, share


def _result(reference: Any, task: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, EqmDistError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise LaunchError(
            f"A task must be done within {TRIES} tries, but the processes that did {task} died each time"
            f" ({str(error).strip().splitlines()[0]}); see that they have enough memory, and run the same command"
            " again to go on."
        ) from error
