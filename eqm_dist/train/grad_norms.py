"""The norm of the gradient by parts of the model: where a run that grows unstable does so first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eqm_dist.train.distributed import all_reduce_sum


def group_of(parameter: str) -> str:
    """The part of the model that a parameter belongs to: ``embedders``, ``block_07``, ``final_layer``."""
    head, *rest = parameter.split(".")
    if head == "blocks":
        return f"block_{int(rest[0]):02d}"
    return "embedders" if head.endswith("embedder") else head


class GradientNorms:
    """Adds up squares of gradients, piece by piece, wherever the pieces of a parameter lie.

    Args:
        parameters: names of all trained parameters.
        device: of the sums.
        replicated: whether every rank has all pieces, or its own only.
    """

    def __init__(self, parameters: Sequence[str], device: torch.device, replicated: bool) -> None:
        self._index = {group: at for at, group in enumerate(dict.fromkeys(map(group_of, parameters)))}
        self._squares = torch.zeros(len(self._index), dtype=torch.float64, device=device)
        self._replicated = replicated

    def add(self, parameter: str, squares: Tensor) -> None:
        """Count the sum of squares, a scalar, of a piece of a parameter's gradient."""
        self._squares[self._index[group_of(parameter)]] += squares.to(self._squares.device)

    def report(self, updates: int) -> dict[str, float]:
        """Root mean squares over so many updates by name of their metric, and begin anew. A collective."""
        squares = self._squares if self._replicated else all_reduce_sum(self._squares)
        norms = (squares / max(updates, 1)).sqrt().tolist()
        self.restart()
        return {f"train/grad_norm/{group}": norms[at] for group, at in self._index.items()}

    def restart(self) -> None:
        """Begin anew."""
        self._squares.zero_()
