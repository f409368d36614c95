"""Who runs the updates: the interface of an engine, and the plain-torch one.

An engine owns the model, the gradients and the optimizer. The loop gives it a loss that is already a share of the
mean over the global batch, so that an engine only ever sums over ranks (docs/decisions/0003).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eqm_dist.data.loader import Batch
from eqm_dist.precision import Precision
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero_in_place, world_size
from eqm_dist.train.optimizer import EmaAdamW
from eqm_dist.train.step import ModelWithLoss

Accepts = Callable[[float], bool]
"""Says by the norm of the whole gradient whether the update is to be made."""
Observe = Callable[[str, Tensor], None]
"""Takes a parameter's name and the sum of squares of this rank's piece of its gradient, before clipping."""
WEIGHT = "weight"
"""Name of a parameter's fp32 value among its states."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one state of one parameter, as this rank holds it.

    Attributes:
        name: the parameter's name in the model.
        state: ``weight``, ``exp_avg``, ``exp_avg_sq`` or ``ema_DECAY``.
        start: offset of the piece in the flattened parameter, in elements.
        values: the piece itself, flat; a view, so writing to it changes the engine's state.
    """

    name: str
    state: str
    start: int
    values: Tensor


class Engine(Protocol):
    """What the loop, the checkpoints and the evaluation need of an engine."""

    device: torch.device
    replicated: bool
    """Whether every rank holds everything (then rank 0 alone saves) or its own fragments only."""
    shapes: dict[str, torch.Size]
    """Shape of each trained parameter, by its name in the model."""
    frozen: dict[str, Tensor]
    """The parameters that are not trained, in host memory."""

    @property
    def name(self) -> str:
        """As a user knows it."""
        ...

    def losses(self, batch: Batch, last: bool = True) -> Tensor:
        """Loss of each sample [n], ready for ``backward``; ``last`` marks the last micro-batch of the step."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the loss; ``last`` as in ``losses``."""
        ...

    def step(self, learning_rate: float, accepts: Accepts | None = None, observe: Observe | None = None) -> Tensor:
        """Update weights and EMAs; returns the norm of the whole gradient before clipping.

        Args:
            learning_rate: of this update.
            accepts: asked once, with that norm, before anything changes; if it says no, nothing does. Asking makes
                the host wait for the device.
            observe: called for every piece of the gradient of an update that is made.
        """
        ...

    def fragments(self) -> list[Fragment]:
        """All that this rank holds of weights and optimizer states."""
        ...

    def restored(self, updates: int) -> None:
        """Called after the fragments were overwritten by a checkpoint of so many updates."""
        ...


def _sum_over_ranks(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What becomes of a bucket of gradients; torch's own would make a mean of it."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


class TorchEngine:
    """Weights and states on every rank, gradients summed over ranks: the twin that DeepSpeed is checked against.

    Several ranks begin with rank 0's weights, for initial ones may differ in a last bit between kinds of machine, and
    torch's ``DistributedDataParallel`` sums their gradients bucket by bucket while the backward pass goes on.

    Args:
        module: with the model.
        optimizer: of its parameters.
        device: where they are.
        precision: of the forward and backward pass.
        gradient_clip: largest norm of the gradient.
        overlap: False: sum after the backward pass, each parameter by itself.
    """

    replicated = True
    name = "the plain engine"

    def __init__(
        self,
        module: ModelWithLoss,
        optimizer: EmaAdamW,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        gradient_clip: float | None = None,
        overlap: bool = True,
    ) -> None:
        self.device = device
        self._module: nn.Module = module
        self._optimizer = optimizer
        self._clip = gradient_clip
        self._bf16 = precision == "bf16"
        self._parameters = module.trained_parameters()
        self.shapes: dict[str, torch.Size] = {name: param.shape for name, param in self._parameters.items()}
        self._reducer: DistributedDataParallel | None = None
        if overlap and world_size() > 1:
            self._module = self._reducer = DistributedDataParallel(
                module, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            self._reducer.register_comm_hook(None, _sum_over_ranks)
        else:
            for tensor in (*module.parameters(), *module.buffers()):
                from_rank_zero_in_place(tensor.detach())
        self.frozen = module.frozen_parameters()
        optimizer.initialize_state(self._parameters.values())

    def losses(self, batch: Batch, last: bool = True) -> Tensor:
        """Under bf16 autocast if so configured."""
        if self._reducer is not None:
            self._reducer.require_backward_grad_sync = last  # what its ``no_sync`` sets, around both passes
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            return self._module(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate locally; with the last micro-batch, sum over ranks."""
        loss.backward()
        if last and self._reducer is None:
            for param in self._parameters.values():
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
                all_reduce_sum(param.grad)

    def step(self, learning_rate: float, accepts: Accepts | None = None, observe: Observe | None = None) -> Tensor:
        """Clip, update, forget the gradients."""
        gradients = {name: param.grad for name, param in self._parameters.items() if param.grad is not None}
        norm = nn.utils.get_total_norm(gradients.values())
        if accepts is None or accepts(norm.item()):
            if observe is not None:
                for name, gradient in gradients.items():
                    observe(name, gradient.square().sum())
            if self._clip is not None:  # a pass over all gradients
                nn.utils.clip_grads_with_norm_(list(self._parameters.values()), self._clip, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def fragments(self) -> list[Fragment]:
        """Every state of every trained parameter, whole."""
        pieces = []
        for name, param in self._parameters.items():
            pieces.append(Fragment(name, WEIGHT, 0, param.detach().view(-1)))
            states = self._optimizer.state[param]
            pieces += [Fragment(name, key, 0, states[key].view(-1)) for key in self._optimizer.state_keys]
        return pieces

    def restored(self, updates: int) -> None:
        """Set the count of the bias correction."""
        for param in self._parameters.values():
            self._optimizer.state[param]["step"].fill_(updates)
