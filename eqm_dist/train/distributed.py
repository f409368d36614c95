"""The few collectives that training needs; each does nothing harmful in a process that is alone."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Rank of this process; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together; 1 when this one is alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum ``tensor`` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_zero_in_place(tensor: Tensor) -> None:
    """Overwrite ``tensor`` with rank 0's."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)


def background_group() -> Any:
    """A process group for a thread of its own: the default one belongs to the training threads. A collective."""
    return dist.new_group(backend="gloo") if world_size() > 1 else None


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The value of every rank, on every rank, in rank order. Small objects only: they are pickled."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank: one decides, all obey."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
