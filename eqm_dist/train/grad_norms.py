"""The norm of the gradient by parts of the model: where a run that grows unstable does so first."""

import torch
from torch import Tensor

from eqm_dist.train.distributed import all_reduce_sum
from eqm_dist.train.engine import Engine


def group_of(parameter: str) -> str:
    """The part of the model that a parameter belongs to: ``embedders``, ``block_07``, ``final_layer``."""
    head, *rest = parameter.split(".")
    if head == "blocks":
        return f"block_{int(rest[0]):02d}"
    return "embedders" if head.endswith("embedder") else head


class GradientNorms:
    """Adds up squares of gradients, piece by piece, wherever the pieces of a parameter lie.

    Args:
        engine: whose gradient it is.
    """

    def __init__(self, engine: Engine) -> None:
        self._index = {group: at for at, group in enumerate(dict.fromkeys(map(group_of, engine.shapes)))}
        self._squares = torch.zeros(len(self._index), dtype=torch.float64, device=engine.device)
        self._replicated = engine.replicated

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
