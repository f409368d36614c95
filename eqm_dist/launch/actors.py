"""Independent tasks, done by the actors of a Ray cluster or by this process alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from eqm_dist.data.image_set import Unit

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_units(
    work: Callable[[Unit, torch.device], Result], units: Sequence[Unit], launcher: str, actors: int | None
) -> Iterator[tuple[Unit, Result]]:
    """Each unit with what ``work`` made of it, in any order, by the actors of a cluster or by this process alone."""
    if units:
        with open_actors(work, launcher, min(len(units), actors or len(units))) as run:
            yield from run(units)


@contextmanager
def open_actors(
    work: Callable[[Task, torch.device], Result], launcher: str, actors: int | None
) -> Iterator[Callable[[Iterable[Task]], Iterator[tuple[Task, Result]]]]:
    """What gives each of several tasks with what ``work`` made of it, in any order, and can be called again."""
    if launcher == "local":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield lambda tasks: ((task, work(task, device)) for task in tasks)
        return
    from eqm_dist.launch.ray_actors import ray_actors  # a local run works without Ray

    with ray_actors(work, most_actors=actors) as run:
        yield run
