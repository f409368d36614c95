"""The class of every sample index: a rule that any worker can apply to any range of indices."""

import torch
from torch import Tensor

from eqm_dist import rng
from eqm_dist.errors import ConfigError

BALANCED, RANDOM = "balanced", "random"


def balanced_labels(indices: Tensor, num_classes: int) -> Tensor:
    """Labels [n] of the sample indices [n]: ``i % num_classes``, so any range of indices is as balanced as can be."""
    return indices % num_classes


def labels_of(rule: str, indices: Tensor, num_classes: int, seed: int) -> Tensor:
    """Labels [n] int64 of sample indices [n].

    Args:
        rule: ``balanced``, the classes in turn, so that any range of indices is as balanced as can be; ``random``,
            uniform and independent, as the official figures are drawn; or classes in turn as ``7`` or ``3,1,4``.
        indices: [n] int64.
        num_classes: labels lie in [0, num_classes); ``num_classes`` itself, the null label, can be named.
        seed: of the random rule, drawn from ``Stream.START_LABEL``.

    Raises:
        ConfigError: another rule, or a class that there is not.
    """
    if rule == BALANCED:
        return balanced_labels(indices, num_classes)
    if rule == RANDOM:
        draws = rng.uniform(seed, rng.Stream.START_LABEL, indices, (), dtype=torch.float64)
        return (draws * num_classes).long().clamp(max=num_classes - 1)
    classes = rule.split(",")
    most = len(str(num_classes))  # of 5,000 digits Python makes no number at all
    if not all(len(part.strip()) <= most and part.strip().isdecimal() and int(part) <= num_classes for part in classes):
        raise ConfigError(
            f"--labels must be balanced, random, or classes up to {num_classes} (which is none) like 3,1,4, got"
            f" {rule[:100]};"
            " correct it."
        )
    named = torch.tensor([int(part) for part in classes], device=indices.device)
    return named[indices % len(named)]
