"""The DeepSpeed engine: ZeRO stages 0 to 3 behind the ``Engine`` interface.

Only this file imports deepspeed. Its state is read and written through fragments, never through DeepSpeed's own
checkpoints, which lose the EMAs or refuse another number of workers (docs/decisions/0004).
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from eqm_dist.data.loader import Batch
from eqm_dist.errors import ConfigError
from eqm_dist.precision import Precision
from eqm_dist.train.distributed import rank, world_size
from eqm_dist.train.engine import WEIGHT, Accepts, Fragment, Observe
from eqm_dist.train.optimizer import EmaAdamW
from eqm_dist.train.step import ModelWithLoss


def deepspeed_config(
    *,
    parameters: int,
    zero_stage: int,
    offload: bool,
    precision: Precision,
    micro_batch: int,
    grad_accum: int,
    world_size: int,
    gradient_clip: float | None,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from ours; nobody writes these numbers twice.

    The batch sizes are nominal: DeepSpeed wants them consistent but never sees a loader, and the engine scales
    losses itself, so a batch need not divide by the workers.

    Args:
        parameters: how many are trained.
        zero_stage: 0 to 3.
        offload: keep the optimizer's state in host memory.
        precision: of the forward and backward pass.
        micro_batch, grad_accum, world_size: of the nominal batch.
        gradient_clip: largest norm of the gradient.
        more: keys of DeepSpeed's own, merged in; the config has refused those that would contradict.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": grad_accum,
        "train_batch_size": micro_batch * grad_accum * world_size,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,  # any subclass of AdamW is "untested"
        # Stage 0 reports no norm unless it clips, so there the engine clips by itself.
        "gradient_clipping": gradient_clip if gradient_clip is not None and zero_stage > 0 else 0.0,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the device twice a micro-batch
    }
    if zero_stage in (1, 2):
        # A reduce to the rank that keeps the sum, rather than an all-reduce of each bucket, while the backward pass
        # goes on; stage 3 does both by itself.
        config["zero_optimization"] |= {"use_multi_rank_bucket_allreduce": False, "overlap_comm": True}
    if zero_stage > 0:
        # The defaults (5e8 elements) reserve 2 GB a buffer, more than a whole XL/2 needs, however small the model is.
        bucket = min(parameters, 50_000_000)
        config["zero_optimization"] |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        config["zero_force_ds_cpu_optimizer"] = False  # its own Adam keeps no EMA
    if precision == "bf16":
        # Autocast inside DeepSpeed; no module is named, so that gradients are still summed in fp32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return _merged(config, more)


def _merged(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in more.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


class DeepSpeedEngine:
    """Model and loss under ``deepspeed.initialize``."""

    def __init__(
        self,
        module: ModelWithLoss,
        optimizer: EmaAdamW,
        *,
        device: torch.device,
        zero_stage: int,
        offload: bool = False,
        precision: Precision = "fp32",
        gradient_clip: float | None = None,
        micro_batch: int = 1,
        grad_accum: int = 1,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        # The shared-memory op would be compiled at the first start, which fails on a machine without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device = device
        self.replicated = zero_stage == 0
        self._stage = zero_stage
        self._clip = gradient_clip
        # DeepSpeed hangs its own attributes on parameters, which no type knows of.
        trained = module.trained_parameters()
        self.shapes: dict[str, torch.Size] = {
            name: param.shape for name, param in trained.items()
        }  # stage 3 makes them empty
        self.frozen = module.frozen_parameters()
        self._names: dict[Any, str] = {param: name for name, param in trained.items()}
        self._base = optimizer
        config = deepspeed_config(
            parameters=sum(param.numel() for param in self._names),
            zero_stage=zero_stage,
            offload=offload,
            precision=precision,
            micro_batch=micro_batch,
            grad_accum=grad_accum,
            world_size=world_size(),
            gradient_clip=gradient_clip,
            more=more or {},
        )
        try:
            engine, zero, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        except (DeepSpeedConfigError, ValidationError) as error:
            raise ConfigError(
                f"engine.deepspeed must be what DeepSpeed {deepspeed.__version__} takes, got {dict(more or {})}, which"
                f" it refuses ({' '.join(str(error).split())[:300]}); correct it or leave it out."
            ) from None
        self._engine: Any = engine
        self._zero: Any = zero
        optimizer.initialize_state(self._flat_weights())

    @property
    def name(self) -> str:
        """With its stage."""
        return f"DeepSpeed ZeRO-{self._stage}"

    def losses(self, batch: Batch, last: bool = True) -> Tensor:
        """The wrapped module."""
        return self._engine(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """DeepSpeed averages gradients over ranks and micro-batches; the factor turns that into a plain sum."""
        self._engine.backward(loss * world_size(), scale_wrt_gas=False)
        if not last:
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self, learning_rate: float, accepts: Accepts | None = None, observe: Observe | None = None) -> Tensor:
        """Update; the gradient norm is global and unclipped, NaN or infinite if the gradient was."""
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        norm = self._clipped() if self._stage == 0 else None

        def found_norm() -> Tensor:
            return torch.as_tensor(self._zero._global_grad_norm) if norm is None else norm

        judge = cache(lambda: accepts is None or accepts(found_norm().item()))

        def before_update(flats: Sequence[Tensor]) -> bool:
            accepted = judge()
            if accepted and observe is not None:
                self._observe(flats, found_norm(), observe)
            return accepted

        # DeepSpeed finds the norm inside its step, and updates flat partitions one by one.
        self._base.accepts = before_update
        self._engine.step()
        judge()  # nobody has asked where the norm is not finite: DeepSpeed skips those updates by itself
        return found_norm().to(self.device)

    def _clipped(self) -> Tensor:
        """Clip whole gradients, as DeepSpeed does not under stage 0 where nobody sets a limit; returns their norm."""
        norm = nn.utils.get_total_norm([param.grad for param in self._names if param.grad is not None])
        if self._clip is not None:
            nn.utils.clip_grads_with_norm_(list(self._names), self._clip, norm)
        return norm

    def _observe(self, flats: Sequence[Tensor], norm: Tensor, observe: Observe) -> None:
        # DeepSpeed and torch divide by this.
        clipped = 1.0 if self._clip is None else ((norm + 1e-6) / self._clip).clamp(min=1)
        updated = set(map(id, flats))
        for place in self._places():
            if id(place.flat) in updated:
                observe(place.name, place.cut(place.flat.grad).square().sum() * clipped**2)

    def fragments(self) -> list[Fragment]:
        """This rank's piece of every weight, moment and EMA, as views into DeepSpeed's flat partitions."""
        pieces = []
        for place in self._places():
            pieces.append(Fragment(place.name, WEIGHT, place.start, place.cut(place.flat)))
            states = self._base.state[place.flat]
            pieces += [Fragment(place.name, key, place.start, place.cut(states[key])) for key in self._base.state_keys]
        return pieces

    def restored(self, updates: int) -> None:
        """Set the counts of the bias correction and renew the compute weights from the restored fp32 ones."""
        for flat in self._flat_weights():
            self._base.state[flat]["step"].fill_(updates)
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            zero = self._zero
            if zero.persistent_parameters:  # small parameters stay gathered: drop the stale copies, gather anew
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _flat_weights(self) -> list[Tensor]:
        """The tensors that the base optimizer really updates."""
        if self._stage == 0:
            return list(self._names)
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _places(self) -> Iterator["_Place"]:
        """Where this rank's piece of each parameter lies."""
        for param, name in self._names.items():
            if self._stage == 0:
                yield _Place(name, 0, param, 0, param.numel())
            elif self._stage == 3:
                group, offset, size = self._zero.grad_position[self._zero.get_param_id(param)]
                start = rank() * size
                # The last rank's piece is padded so that all pieces have one size.
                numel = max(0, min(size, param.ds_numel - start))
                if numel:
                    yield _Place(name, start, self._zero.fp32_partitioned_groups_flat[group], offset, numel)
            elif param._hp_mapping is not None:  # None: no part of this parameter lies on this rank
                flat = self._zero.single_partition_of_fp32_groups[param._hp_mapping.param_group_index]
                address = param._hp_mapping.get_hp_fragment_address()
                yield _Place(name, param._hp_mapping.lp_fragment_address.start, flat, address.start, address.numel)


class _Place(NamedTuple):
    """Elements [start, start + numel) of a parameter are [offset, offset + numel) of what the optimizer updates."""

    name: str
    start: int
    flat: Any
    offset: int
    numel: int

    def cut(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor that is laid out like ``flat``; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)
