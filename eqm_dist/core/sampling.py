"""Sampling: follow the field from a start, count what that cost, and stop each sample when it may stop."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from eqm_dist.core.corruption import per_sample
from eqm_dist.core.samplers import Field, Sampler, State, field_norm
from eqm_dist.errors import ConfigError

QueueField = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [b, ...], rows [b], time [b]) -> field [b, ...]: which samples these are, and how far each is on its way."""

LOOK_EVERY = 4
"""Evaluations of the field between two looks at which samples have ended, on a GPU, which idles while the host looks.
A sample that has ended is evaluated 1.5 times in vain on average, some 1 % of what it took; its values stay."""


@dataclass(frozen=True)
class GradientNormStop:
    """Adaptive compute: a sample stops once the norm of its field has fallen below a limit (paper, Algorithm 2).

    The norm is the root mean square over the dimensions of the sample: the paper's g_min is ``norm`` times the root of
    their number. Its value is not published. The evaluation that meets the limit still moves the sample, so one that
    stopped after k evaluations of the field equals that of a fixed schedule of k.

    Attributes:
        norm: the limit itself, or None.
        ratio: the limit as a part of the norm at the sample's first evaluation, or None. With both, either is enough.
    """

    norm: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if self.norm is None and self.ratio is None:
            raise ConfigError("A stopping rule needs norm, ratio or both; without a rule leave stop out.")
        if self.norm is not None and not 0 < self.norm < math.inf:
            raise ConfigError(f"norm of a stopping rule must be positive and finite, got {self.norm}.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"ratio of a stopping rule must lie in (0, 1), got {self.ratio}.")

    def below(self, norm: Tensor, first_norm: Tensor) -> Tensor:
        """Which samples [B] bool may stop, from the norms [B] now and at the first evaluation."""
        return (norm < (self.norm or 0)) | (norm < (self.ratio or 0) * first_norm)


@dataclass(frozen=True)
class SampleResult:
    """Samples [B, ...], the evaluations of the field that each took, ``nfe`` [B] int64, and ``complete`` [B].

    A sample is not complete where the limit of its NFE cut it off before the stopping rule or the end of time.
    """

    samples: Tensor
    nfe: Tensor
    complete: Tensor


@dataclass(frozen=True)
class Ended:
    """Samples that have ended, with the ``rows`` [b] int64 that say which; the rest as in ``SampleResult``."""

    rows: Tensor
    samples: Tensor
    nfe: Tensor
    complete: Tensor


@dataclass(frozen=True)
class SamplingMethod:
    """How samples are drawn from a field.

    Attributes:
        sampler: the way from a start to a sample.
        nfe: evaluations of the field (NFE), at least 1: the most that a sample may take. The official "250 steps" are
            249 of them. A guided field counts once, though its model sees two batches.
        stop: lets each sample stop earlier.

    Raises:
        ConfigError: nfe is less than 1.
    """

    sampler: Sampler
    nfe: int
    stop: GradientNormStop | None = None

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ConfigError(f"nfe must be at least 1, got {self.nfe}.")


def sample(field: Field, start: Tensor, method: SamplingMethod) -> SampleResult:
    """Follow the field from ``start``.

    The field always sees the whole batch, also where some samples have ended before others: ``sample_queue`` is what
    saves their compute, and what a field that depends on time needs.

    Args:
        field: x [B, ...] -> field [B, ...], pointing downhill.
        start: [B, ...]: noise, or a partly noised sample; left as it is.
        method: how.

    Raises:
        ConfigError: the sampler cannot use this NFE.
    """

    def of_rows(x: Tensor, rows: Tensor, time: Tensor) -> Tensor:
        if len(x) == len(start):
            return field(x)
        whole = start.to(x.dtype, copy=True)
        whole[rows] = x
        return field(whole)[rows]

    rows = torch.arange(len(start), device=start.device)
    queue = sample_queue(of_rows, start.__getitem__, rows, method, slots=max(1, len(start)))
    return in_order(list(queue))


def in_order(parts: list[Ended]) -> SampleResult:
    """All samples of a queue, in the order of their rows."""
    order = torch.cat([part.rows for part in parts]).argsort()
    return SampleResult(*(
        torch.cat([getattr(part, name) for part in parts])[order] for name in ("samples", "nfe", "complete")
    ))  # fmt: skip


@torch.no_grad()
def sample_queue(
    field: QueueField,
    start: Callable[[Tensor], Tensor],
    rows: Tensor,
    method: SamplingMethod,
    *,
    slots: int,
    start_time: float = 0.0,
) -> Iterator[Ended]:
    """Follow the field from many starts, so many at a time; where a sample ends, the next in the queue takes its slot.

    Up to the rounding of the field's own sums a sample does not depend on ``slots`` or on the others. (Rounding may
    decide when a norm is within it of the limit: such a sample may take one evaluation more or less.)

    Args:
        field: (x [b, ...], rows [b], time [b]) -> field [b, ...], pointing downhill, for any b of the rows.
        start: rows [b] -> [b, ...], called once for each row.
        rows: [n] int64, the queue, in its order; on the device of the work.
        method: how.
        slots: samples under way at once.
        start_time: where on the way from 0 to 1 the starts lie, for integrators: the gamma of partly noised samples.

    Yields:
        Samples as they end. Without rows, one part without samples.

    Raises:
        ConfigError: slots is less than 1, or the sampler cannot use these numbers.
    """
    if slots < 1:
        raise ConfigError(f"slots must be at least 1, got {slots}.")

    def begin(joining: Tensor) -> _Batch:
        x = start(joining)
        first_norm = torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        state = method.sampler.start(x, method.nfe, start_time)
        return _Batch(x, joining, none, none.bool(), first_norm, state, torch.zeros(len(x), dtype=torch.int64))

    look_every = 1 if rows.device.type == "cpu" else LOOK_EVERY
    batch, taken, evaluations = begin(rows[:slots]), slots, 0
    if not len(rows):
        yield Ended(rows, batch.x, rows, rows.bool())
    while len(batch.age):
        batch, may_end = _evaluate(batch, field, method)
        evaluations += 1
        leaving = batch.age == method.nfe
        if may_end and evaluations % look_every == 0:
            leaving |= batch.over.cpu()
        if not leaving.any():
            continue
        gone = batch.only(leaving)
        yield Ended(gone.rows, gone.x, gone.nfe, gone.over if may_end else torch.ones_like(gone.over))
        batch = batch.only(~leaving)
        joining = rows[taken : taken + slots - len(batch.age)]
        taken += len(joining)
        if len(joining):
            batch = batch.with_others(begin(joining))


@dataclass(frozen=True)
class _Batch:
    """Samples under way.

    Attributes:
        x: [b, ...].
        rows: [b], which samples these are.
        nfe: [b], the evaluations that each took.
        over: [b] bool, those that have ended, which stay as they are until somebody looks.
        first_norm: [b], the norm of the field at the first evaluation, for a stopping rule.
        state: the sampler's.
        age: [b], on the CPU: evaluations since each joined. Where all take as many, nobody waits for a GPU.
    """

    x: Tensor
    rows: Tensor
    nfe: Tensor
    over: Tensor
    first_norm: Tensor
    state: State
    age: Tensor

    def only(self, mask: Tensor) -> Self:
        """The samples that a mask [b] on the CPU names."""
        index = mask.nonzero().flatten().to(self.x.device)
        return type(self)(
            self.x[index],
            self.rows[index],
            self.nfe[index],
            self.over[index],
            self.first_norm[index],
            tuple(part[index] for part in self.state),
            self.age[mask],
        )

    def with_others(self, other: Self) -> Self:
        """These samples, then the others."""
        return type(self)(
            torch.cat([self.x, other.x]),
            torch.cat([self.rows, other.rows]),
            torch.cat([self.nfe, other.nfe]),
            torch.cat([self.over, other.over]),
            torch.cat([self.first_norm, other.first_norm]),
            tuple(torch.cat(parts) for parts in zip(self.state, other.state, strict=True)),
            torch.cat([self.age, other.age]),
        )


def _evaluate(batch: _Batch, field: QueueField, method: SamplingMethod) -> tuple[_Batch, bool]:
    """The batch after one evaluation, and whether a sample may have ended before its NFE."""
    progress = batch.nfe.to(batch.first_norm.dtype) / method.nfe
    point, time = method.sampler.look(batch.x, batch.state, progress)
    value = field(point, batch.rows, time)
    x, state, ended = method.sampler.move(batch.x, batch.state, value, progress)
    first_norm = batch.first_norm
    if method.stop is not None:
        norm = field_norm(value)
        first_norm = torch.where(progress == 0, norm, first_norm)
        below = method.stop.below(norm, first_norm)
        ended = below if ended is None else ended | below
    if ended is None:
        return replace(batch, x=x, nfe=batch.nfe + 1, state=state, age=batch.age + 1), False
    x = torch.where(per_sample(batch.over, x), batch.x, x)
    nfe = batch.nfe + ~batch.over
    return _Batch(x, batch.rows, nfe, batch.over | ended, first_norm, state, batch.age + 1), True
