"""Images of several conditions at once: descent of the weighted sum of their fields (paper, Figure 11).

Fields are gradients of energies, so the sum of fields is the field of the sum of energies: of the product of the two
densities that they stand for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eqm_dist.core.guidance import TimedField
from eqm_dist.errors import ConfigError


def composed(field: TimedField, labels: Sequence[int], weights: Sequence[float]) -> TimedField:
    """The field sum_k weights[k] * field(x, labels[k], time), whatever label it is asked for.

    Weights that add to 1 keep the length of a step as it is for one condition.

    Raises:
        ConfigError: not as many weights as labels, or none at all.
    """
    if not labels or len(labels) != len(weights):
        raise ConfigError(f"Every condition needs one weight, got {len(labels)} labels and {len(weights)} weights.")

    def total(x: Tensor, _: Tensor, time: Tensor) -> Tensor:
        parts = (
            weight * field(x, torch.full(x.shape[:1], label, dtype=torch.int64, device=x.device), time)
            for label, weight in zip(labels, weights, strict=True)
        )
        return torch.stack(list(parts)).sum(0)

    return total


def share_of_both(logits: Tensor, labels: Sequence[int]) -> float:
    """How often a classifier's likeliest classes [n, num_classes] are just the conditions, in any order."""
    top = logits.topk(len(labels), dim=1).indices.sort(1).values
    wanted = torch.tensor(sorted(labels), device=logits.device)
    return (top == wanted).all(1).double().mean().item()
