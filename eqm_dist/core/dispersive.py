"""The dispersive loss: pushes the representations of different samples apart.

Wang & He, "Diffuse and Disperse" (arXiv 2506.09027), in its InfoNCE form with squared distances.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from eqm_dist.errors import DataError


def dispersive_loss(tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log mean_ij exp(-||z_i - z_j||^2 / (D * temperature)) over all pairs of a batch, each sample with itself too.

    As in the official code, which divides by the number of values D and has temperature 1 (the paper's text has 0.5).

    Args:
        tokens: [B, ...], z_i with its D values flattened.
        temperature: positive.

    Returns:
        A scalar between -log B (all far apart) and 0 (all the same), at least in fp32.
    """
    points = tokens.flatten(1).to(torch.promote_types(tokens.dtype, torch.float32))
    samples, values = points.shape
    exponents = -functional.pdist(points).square() / (values * temperature)
    # Each pair counts twice, each sample's distance of 0 to itself once.
    both = torch.cat([exponents, exponents, exponents.new_zeros(samples)])
    return both.logsumexp(0) - both.new_full((), len(both)).log()


@dataclass(frozen=True)
class Dispersed:
    """A loss with weight * dispersive_loss of the last block's tokens added.

    The dispersive loss belongs to a batch and not to a sample. So that it is the same on any number of workers, the
    batch here is a fixed group, samples k * group to (k + 1) * group - 1, whose members all carry the group's value.
    Whoever divides the samples must keep groups whole.

    Attributes:
        loss: ``(model, *inputs, **draws) -> loss [B]``.
        weight: the official code has 0.5.
        temperature: see ``dispersive_loss``.
        group: samples that are compared with each other; B must be a multiple.
    """

    loss: Callable[..., Tensor]
    weight: float
    temperature: float
    group: int

    def __call__(self, model: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor, **draws: Tensor) -> Tensor:
        """Loss of each sample [B].

        Args:
            model: takes ``return_tokens=True`` and then returns the field and the tokens, like ``SiT``.
            inputs, draws: what ``loss`` takes.

        Raises:
            DataError: the batch is not made of whole groups.
        """
        seen: list[Tensor] = []

        def field(*arguments: Tensor) -> Tensor:
            predicted, tokens = model(*arguments, return_tokens=True)
            seen.append(tokens)
            return predicted

        errors = self.loss(field, *inputs, **draws)
        (tokens,) = seen
        if len(tokens) % self.group:
            raise DataError(
                f"The dispersive loss compares groups of {self.group} samples, and a batch of {len(tokens)} is not"
                " made of whole groups; choose a batch that is a multiple."
            )
        groups = tokens.reshape(-1, self.group, tokens[0].numel())
        values = torch.stack([dispersive_loss(group, self.temperature) for group in groups])
        return errors + self.weight * values.repeat_interleave(self.group)
