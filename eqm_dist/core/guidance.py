"""Classifier-free guidance of a class-conditional field."""

from collections.abc import Callable

import torch
from torch import Tensor

from eqm_dist.core.objective import ConditionalField
from eqm_dist.errors import ConfigError

TimedField = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [B, ...], labels [B], time [B] in [0, 1]) -> field [B, ...]"""


def blind_to_time(model: ConditionalField) -> TimedField:
    """A field of Equilibrium Matching for a caller that tells the time."""
    return lambda x, labels, time: model(x, labels)


def guided(
    model: Callable[..., Tensor],
    *,
    cfg_scale: float,
    null_label: int,
    guided_channels: int | None = None,
    interval: tuple[float, float] | None = None,
) -> Callable[..., Tensor]:
    """The field f_null + cfg_scale * (f_cond - f_null), from one model call on the doubled batch [cond; null].

    Args:
        model: (x [B, C, ...], labels [B]) -> field [B, C, ...], or a ``TimedField``.
        cfg_scale: 1 leaves the model as it is, without doubling the batch; more guides harder.
        null_label: the label that stands for "no class".
        guided_channels: guide only the first so many channels, the others keep the conditional field. None guides all;
            3 reproduces the published figures of DiT, SiT and EqM on four-channel latents.
        interval: (first, last): guide only while first <= time <= last, and double only those samples (Kynkaanniemi et
            al., arXiv 2404.07724); the model is a ``TimedField`` then. None guides all the way.

    Returns:
        A callable like ``model``.

    Raises:
        ConfigError: cfg_scale is negative or not finite, there are not that many channels, or the interval is no part
            of [0, 1].
    """
    if not 0 <= cfg_scale < float("inf"):
        raise ConfigError(f"cfg_scale must be finite and not negative, got {cfg_scale}; 1 means no guidance.")
    if guided_channels is not None and guided_channels < 1:
        raise ConfigError(
            f"guided_channels must be at least 1, got {guided_channels}; leave it out to guide all channels."
        )
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ConfigError(f"interval must be a part of [0, 1] from its start to its end, got {interval}.")
    if cfg_scale == 1:
        return model

    def guided_field(x: Tensor, labels: Tensor, *time: Tensor) -> Tensor:
        if guided_channels is not None and guided_channels > x.shape[1]:
            raise ConfigError(
                f"guided_channels must be at most the {x.shape[1]} channels of the latents, got {guided_channels}; "
                "leave it out to guide all channels."
            )
        inside = slice(None) if interval is None else _within(interval, *time)
        fields = model(
            torch.cat([x, x[inside]]),
            torch.cat([labels, torch.full_like(labels[inside], null_label)]),
            *(torch.cat([t, t[inside]]) for t in time),
        )
        conditional, unconditional = fields.tensor_split([len(x)])
        field = torch.lerp(unconditional, conditional[inside], cfg_scale)
        if guided_channels is not None:
            field = torch.cat([field[:, :guided_channels], conditional[inside][:, guided_channels:]], dim=1)
        if interval is None:
            return field
        whole = conditional.clone()
        whole[inside] = field
        return whole

    return guided_field


def _within(interval: tuple[float, float], time: Tensor) -> Tensor:
    """Indices of the samples inside the interval."""
    first, last = interval
    return ((first <= time) & (time <= last)).nonzero().flatten()
