"""From data to noise along a straight line."""

from torch import Tensor

from eqm_dist.errors import DataError


def corrupt(latents: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """x_gamma = gamma * latents + (1 - gamma) * noise: noise at gamma = 0, data at gamma = 1.

    Args:
        latents: [B, ...].
        noise: [B, ...], like ``latents``.
        gamma: [B] in [0, 1].

    Returns:
        [B, ...].
    """
    gamma = per_sample(gamma, latents)
    return gamma * latents + (1 - gamma) * noise


def per_sample(values: Tensor, batch: Tensor) -> Tensor:
    """Values [B] in a shape that multiplies a batch [B, ...] sample by sample.

    Raises:
        DataError: the number of values is not the batch size.
    """
    if values.shape != batch.shape[:1]:
        raise DataError(
            f"A batch of shape {tuple(batch.shape)} needs one value per sample, got shape {tuple(values.shape)}; "
            "pass a vector of the batch size."
        )
    return values.reshape(-1, *[1] * (batch.ndim - 1))
