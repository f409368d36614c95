"""Every option of every command, as frozen models that refuse what they do not know.

``Config`` is the whole of a training run; its sections are its table of contents. A value comes from, in rising
order, the defaults below, a preset, a YAML file and the command line (``eqm_dist.cli``). Nothing here imports torch,
so that ``--help`` answers at once; only ``eqm_dist.build`` and what stands above it read it.
"""

import contextlib
import difflib
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, TypeVar, cast
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from eqm_dist.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, complete, unknown keys refused, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To pydantic true is 1 and false is 0; in YAML yes, no, on and off are booleans too.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"should not be true or false, got {value}")
        return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``.

    An option whose value is a mapping stays one.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" != "engine.deepspeed":
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


T = TypeVar("T", bound=Section)


class RunConfig(Section):
    """Which run this is. The same name in the same root is the same run: starting it again resumes it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "digits"
    """Name of the run; also the name of its directory."""
    root: str | None = None
    """Directory that holds all runs; default: runs/ here, or ~/eqm-dist-runs inside a submitted Ray job."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of everything random: order, noise, gamma, label dropout, initial weights."""

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in ("data", "mlflow-artifacts", "mlflow.db"):
            raise ValueError(f"name {self.name} is taken by what all runs share; choose another")
        return self


class MixConfig(Section):
    """One of the data sets of a mixture."""

    shards: Annotated[str, Field(min_length=1)]
    """Directory or s3:// prefix with manifest.json."""
    weight: Positive = 1.0
    """Its share of all samples, in proportion to the other weights."""


class DataConfig(Section):
    """The latent shards that training reads."""

    shards: str | None = None
    """Directory or s3:// prefix with manifest.json; default: the embedded digits, written at first use."""
    mix: tuple[MixConfig, ...] = ()
    """Several data sets instead of one, as [{shards: ..., weight: ...}, ...]."""
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 8, 8)
    """Channels, height and width of a latent; checked against the shards."""
    num_classes: PositiveInt = 10
    """Number of classes; checked against the shards."""
    window_shards: PositiveInt = 8
    """Samples are shuffled within windows of this many shards."""
    flip: bool = False
    """Draw the mirrored image half of the time; the shards must hold it."""
    verify_checksums: bool = True
    """Compare each shard with the manifest's sha256 when it is first read."""
    workers: Count = 1
    """Threads per process that make batches ahead of need; 0 makes each when it is asked for."""
    cache_dir: str | None = None
    """Where files from s3:// are kept, for all processes of a machine; default ~/.cache/eqm-dist; s3:// only."""
    cache_gib: Positive | None = None
    """Disk that they may take, in GiB; default 64; s3:// only."""
    deadline_s: Positive | None = None
    """Seconds for which s3:// may fail or stall before the run gives up; default 60; s3:// only."""

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        if self.shards is not None and self.mix:
            raise ValueError("shards has no effect beside mix; put it into mix or leave one of them out")
        remote = any(location.startswith("s3://") for location in self.locations())
        for name in ("cache_dir", "cache_gib", "deadline_s"):
            if not remote and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect on shards that are not on s3://; leave it out")
        return self

    def locations(self) -> list[str]:
        """Every data set's location."""
        return [part.shards for part in self.mix] or [self.shards or ""]


class ModelConfig(Section):
    """The SiT backbone: a named size, or width, depth and heads of your own."""

    size: Literal["S", "B", "L", "XL"] | None = None
    """Official size; leave out hidden_size, depth and num_heads then."""
    patch_size: PositiveInt = 2
    """Side of a patch in latent pixels."""
    hidden_size: PositiveInt | None = None
    """Width of the tokens."""
    depth: PositiveInt | None = None
    """Number of blocks."""
    num_heads: PositiveInt | None = None
    """Attention heads."""
    qk_norm: bool = False
    """Normalise queries and keys, which keeps attention in bf16 from blowing up; official checkpoints do not."""
    learn_sigma: bool = False
    """Keep the unused second half of the output channels that official checkpoints have."""
    zero_init: bool = True
    """Start with a zero output layer; the l2 energy cannot (its gradient would stay zero)."""

    @model_validator(mode="after")
    def _one_way_to_size(self) -> Self:
        free = {"hidden_size": self.hidden_size, "depth": self.depth, "num_heads": self.num_heads}
        given = [name for name, value in free.items() if value is not None]
        if self.size is not None and given:
            raise ValueError(f"size {self.size} already fixes {', '.join(given)}; set them to null, or size to null")
        if self.size is None and len(given) < 3:
            missing = [name for name in free if name not in given]
            raise ValueError(f"without a size, {', '.join(missing)} must be given; or choose size S, B, L or XL")
        return self


class DecayConfig(Section):
    """c(gamma), the factor that lets the target field vanish at the data (paper Eqs. 4-6)."""

    family: Literal["constant", "linear", "truncated", "piecewise"] = "truncated"
    """Shape of c(gamma)."""
    gradient_scale: Positive = 4.0
    """lambda, the factor in front."""
    decay_start: Fraction | None = None
    """a, where the decay to zero begins; default 0.8; truncated and piecewise only."""
    decay_value: Annotated[float, Field(ge=0)] | None = None
    """b, the value at gamma = 0; default 1.4; piecewise only."""

    @model_validator(mode="after")
    def _only_what_the_family_has(self) -> Self:
        if self.decay_start is not None and self.family not in ("truncated", "piecewise"):
            raise ValueError(f"decay_start has no effect on the {self.family} family; leave it out")
        if self.decay_value is not None and self.family != "piecewise":
            raise ValueError(f"decay_value has no effect on the {self.family} family; leave it out")
        return self


class WeightingConfig(Section):
    """Weights of the loss by gamma; the logged loss is the weighted one."""

    kind: Literal["none", "relative", "min_snr"] = "none"
    """relative: 1 / max(c, floor)^2, the error in proportion to its target; min_snr: by signal to noise, capped."""
    floor: Positive | None = None
    """Smallest c(gamma) that is divided by; default a tenth of its scale; relative only."""
    snr_limit: Positive | None = None
    """Largest signal-to-noise ratio that counts; default 5; min_snr only."""

    @model_validator(mode="after")
    def _only_what_the_kind_has(self) -> Self:
        for name, kind in (("floor", "relative"), ("snr_limit", "min_snr")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} has no effect with kind={self.kind}; leave it out or use kind={kind}")
        return self


class DispersiveConfig(Section):
    """The dispersive loss on the last block's tokens (Wang & He, arXiv 2506.09027)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its factor; 0 for none, 0.5 in the official code."""
    temperature: Positive | None = None
    """Squared distances are divided by it; default 1, as in the official code."""
    group: Annotated[int, Field(ge=2)] | None = None
    """Samples that are compared with each other, which one worker's micro-batch holds whole; default 32."""

    @model_validator(mode="after")
    def _needs_a_weight(self) -> Self:
        for name in ("temperature", "group"):
            if self.weight == 0 and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with weight=0; leave it out or give a weight")
        return self


class ObjectiveConfig(Section):
    """What the network learns."""

    kind: Literal["eqm", "self_stopping", "flow_matching", "time_free_flow_matching"] = "eqm"
    """Equilibrium Matching, its form on a path that stops at the data, or one of its two baselines."""
    decay: DecayConfig = DecayConfig()
    """c(gamma) of Equilibrium Matching."""
    braking_start: Fraction | None = None
    """t_c, where the path of kind=self_stopping begins to slow down; default 0.8 (not published)."""
    energy: Literal["none", "dot", "l2"] = "none"
    """Explicit energy whose gradient is the field (EqM-E)."""
    weighting: WeightingConfig = WeightingConfig()
    """Weights of the loss by gamma."""
    dispersive: DispersiveConfig = DispersiveConfig()
    """A loss that pushes representations apart."""
    label_dropout: Fraction = 0.1
    """Probability of replacing a label by the null label, for classifier-free guidance."""

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        if self.kind != "eqm" and self.decay != DecayConfig():
            raise ValueError(f"decay has no effect with kind={self.kind}; leave it out or use kind=eqm")
        if self.kind != "self_stopping" and self.braking_start is not None:
            raise ValueError(f"braking_start has no effect with kind={self.kind}; leave it out or use self_stopping")
        if self.kind not in ("eqm", "self_stopping") and self.energy != "none":
            raise ValueError(f"energy={self.energy} needs kind=eqm or self_stopping, not {self.kind}; use energy=none")
        constant = self.kind not in ("eqm", "self_stopping") or self.decay.family == "constant"
        if self.weighting.kind == "relative" and constant:
            raise ValueError("weighting.kind=relative has no effect on a target of constant length; use kind=none")
        if self.dispersive.weight and self.energy != "none":
            raise ValueError(
                f"dispersive.weight needs a model that is called once and plainly, which energy={self.energy} does not"
                " do; use weight=0 or energy=none"
            )
        return self


class OptimizerConfig(Section):
    """AdamW that carries the exponential moving averages, and its learning-rate schedule."""

    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    gradient_clip: Positive | None = None
    """Largest norm of the whole gradient; null for no clipping."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: kept, or decayed to zero at the last step."""
    ema_decays: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.9999,)
    """Decays of the averaged weights; the first is evaluated and exported."""

    @model_validator(mode="after")
    def _distinct_averages(self) -> Self:
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decays must differ from each other, got {list(self.ema_decays)}; drop the repeats")
        return self


class GuardConfig(Section):
    """Updates that would do harm: which are skipped, and when the run goes back to a checkpoint."""

    skip: Literal["none", "non_finite", "spikes"] = "non_finite"
    """Skip updates whose loss or gradient is NaN or infinite; spikes: also those whose gradient is far too large."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """How many times the usual norm a gradient may have; default 10; skip=spikes only."""
    spike_window: PositiveInt | None = None
    """Updates whose mean norm is the usual one; nothing is a spike before; default 100; skip=spikes only."""
    max_skips: PositiveInt | None = None
    """Updates skipped in a row after which the run goes back and passes their batches over; default 10."""
    max_rollbacks: Count | None = None
    """Times that it goes back to the same checkpoint before it ends as failed; default 3."""

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        for name in ("spike_factor", "spike_window"):
            if self.skip != "spikes" and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with skip={self.skip}; leave it out or use skip=spikes")
        for name in ("max_skips", "max_rollbacks"):
            if self.skip == "none" and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with skip=none; leave it out or use skip=non_finite")
        return self


class TrainConfig(Section):
    """How long and in which batches."""

    steps: PositiveInt = 2000
    """Number of updates."""
    global_batch: PositiveInt = 128
    """Samples per update over all workers; any number, divisible by the workers or not."""
    micro_batch: PositiveInt | None = None
    """Most samples of one forward pass per worker; more are accumulated. Default: no accumulation."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights and averages stay fp32."""
    activation_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them: a third more arithmetic."""
    log_grad_norms: bool = False
    """Log the norm of the gradient also for the embedders, each block and the final layer."""
    log_every: PositiveInt = 50
    """Steps between two lines of progress."""
    guard: GuardConfig = GuardConfig()
    """What happens to updates that would do harm."""

    @model_validator(mode="after")
    def _micro_fits(self) -> Self:
        if self.micro_batch is not None and self.micro_batch > self.global_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} must be at most global_batch={self.global_batch}; lower it or drop it"
            )
        return self


# Keys of DeepSpeed's that say what a key of ours says, or what the engine relies on, with our word for it.
DEEPSPEED_WORDS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optimizer.gradient_clip",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "zero_allow_untested_optimizer": "optimizer.*",
    "zero_force_ds_cpu_optimizer": "engine.offload",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
    "activation_checkpointing": "train.activation_checkpointing",
    "checkpoint": "checkpoint.*",
    "steps_per_print": "train.log_every",
}
# What else may be passed on: how DeepSpeed moves and measures things. It ignores a key that it does not know.
DEEPSPEED_KEYS = ("zero_optimization", "communication_data_type", "comms_logger", "flops_profiler",
                  "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc")  # fmt: skip


class EngineConfig(Section):
    """Who runs the updates."""

    kind: Literal["deepspeed", "torch"] | None = None
    """DeepSpeed with ZeRO, or its plain-torch twin (everything on every worker); default torch if launched locally."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO stage of DeepSpeed; default 2."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: keep fp32 weights, moments and averages in host memory, and update them there; ZeRO 1 to 3."""
    deepspeed: dict[str, Any] = {}
    """More of DeepSpeed's own keys, as {zero_optimization: {overlap_comm: true}}."""

    @field_validator("offload", mode="before")
    @classmethod
    def _no_nvme(cls, value: Any) -> Any:
        if value == "nvme":
            raise ValueError(
                "offload=nvme would keep the state in files of DeepSpeed's that our checkpoints cannot see into;"
                " use offload=cpu, or zero_stage=3 on more workers"
            )
        return value

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        for name, given in self.deepspeed_settings().items():
            if self.kind == "torch" and given:
                raise ValueError(f"{name}={getattr(self, name)} has no effect on the torch engine; use kind=deepspeed")
        if self.offload == "cpu" and self.zero_stage == 0:
            raise ValueError("offload=cpu needs a state that is partitioned; use zero_stage 1, 2 or 3")
        for key in (*self.deepspeed, *flatten(self.deepspeed)):
            word = next((ours for raw, ours in DEEPSPEED_WORDS.items() if f"{key}.".startswith(f"{raw}.")), None)
            if word is not None:
                raise ValueError(f"deepspeed.{key} is what {word} is for; use that and leave this out")
            if key.split(".")[0] not in DEEPSPEED_KEYS:
                raise ValueError(
                    f"deepspeed.{key} is none of what can be passed on ({', '.join(DEEPSPEED_KEYS)}); leave it out"
                )
        return self

    def deepspeed_settings(self) -> dict[str, bool]:
        """The keys that only DeepSpeed has, and whether they are set."""
        return {
            "zero_stage": self.zero_stage is not None,
            "offload": self.offload != "none",
            "deepspeed": bool(self.deepspeed),
        }


class LaunchConfig(Section):
    """Where the run runs. Nothing here changes a number."""

    launcher: Literal["ray", "local"] = "ray"
    """Ray Train on a cluster (or on this machine), or this process alone with the torch engine."""
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """Number of workers, or [fewest, most] for a run that shrinks and grows with its cluster; default: one per GPU,
    without GPUs one per core, at most 4."""
    cpus_per_worker: PositiveInt | None = None
    """CPUs of each worker; default: the cluster's, shared evenly; elastic: a GPU's share of its node, else 1."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failures in a row, with no newer checkpoint in between, that the run recovers from; -1 any number."""
    resize_check_s: Positive | None = None
    """Seconds between two looks for room for more workers; default 60; elastic only."""
    hang_deadline_s: Annotated[float, Field(ge=0)] | None = None
    """Longest time between two steps: a worker that hangs is ended, and the run restarts; default 600, 0 for none."""

    @field_validator("workers", mode="wrap")
    @classmethod
    def _one_number_or_two(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        with contextlib.suppress(ValidationError):
            workers: Any = check(value)
            if not isinstance(workers, tuple) or workers[0] < workers[1]:
                return workers  # pyright: ignore[reportUnknownVariableType]
        raise ValueError(f"should be a number of workers, or the fewest and the most as [1,4], got {value!r}")

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        for name in ("workers", "cpus_per_worker", "resize_check_s", "hang_deadline_s"):
            if self.launcher == "local" and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with launcher=local, which is one process; use launcher=ray")
        if self.resize_check_s is not None and not isinstance(self.workers, tuple):
            raise ValueError("resize_check_s has no effect on a fixed number of workers; give workers as [fewest,most]")
        return self


class CheckpointConfig(Section):
    """When the run is saved."""

    every: PositiveInt = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep."""
    keep_best: Count = 1
    """Number of checkpoints with the lowest FID to keep besides; those at steps that are not evaluated have none."""
    keep_every: PositiveInt | None = None
    """Keep every checkpoint besides whose step is a multiple of this."""
    max_failed_saves: PositiveInt = 3
    """Saves in a row that may fail, as on a full disk, before the run ends; the last one must not."""
    mirror: Annotated[str, Field(min_length=1)] | None = None
    """Directory or s3:// prefix for a second copy of the run; a run directory that is lost is fetched from there."""
    mirror_deadline_s: Positive | None = None
    """Seconds for which an s3:// mirror may fail or stall before a copy is given up; default 60; s3:// only."""

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        if self.mirror_deadline_s is not None and not (self.mirror or "").startswith("s3://"):
            raise ValueError("mirror_deadline_s has no effect on a mirror that is not on s3://; leave it out")
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every={self.keep_every} must be a multiple of every={self.every}, for only such steps are saved;"
                " change one of them"
            )
        return self


DESCENTS = ("gd", "nag", "adam")
INTEGRATORS = ("euler", "heun", "dopri5")


class SamplerConfig(Section):
    """How samples are drawn: descent along the field (paper Eqs. 8 and 9), or integration of dx/dt = field."""

    name: Literal["gd", "nag", "adam", "euler", "heun", "dopri5"] = "gd"
    """Gradient descent, its Nesterov form with look-ahead, Adam; or Euler's, Heun's, Dormand and Prince's method."""
    step_size: Positive | None = None
    """eta, the step size; default 0.003; gd, nag and adam only."""
    step_policy: Literal["constant", "decay", "backtracking"] | None = None
    """Constant (the default), falling geometrically, or halved where the field's norm rises (gd and nag only)."""
    final_step_size: Positive | None = None
    """Where the step size falls to; default a tenth of step_size; step_policy=decay only."""
    momentum: Fraction | None = None
    """mu, the look-ahead; default 0.3; nag only."""
    evaluations: PositiveInt = 249
    """Field evaluations per sample (the official "250 steps" are 249); with stop_* or dopri5 the most of them."""
    stop_norm: Positive | None = None
    """Stop a sample once its field's norm (root mean square over dimensions) is below this; gd, nag and adam only."""
    stop_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Stop a sample once that norm is below this part of what it was at the start; gd, nag and adam only."""
    horizon: Positive | None = None
    """For how long the field is followed; euler, heun and dopri5 only. Fixed to 1 by flow_matching; else needed."""
    rtol: Positive | None = None
    """Relative tolerance of a step; default 1e-3; dopri5 only."""
    atol: Positive | None = None
    """Absolute tolerance of a step; default 1e-6; dopri5 only."""
    cfg_scale: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance; 1 is none."""
    guided_channels: PositiveInt | None = None
    """Guide the first channels only; default all (the official figures use 3 of 4)."""
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None
    """Guide from one part of the way to another, [0,1] being all: of the evaluations, or of an integrator's time."""

    @model_validator(mode="after")
    def _only_what_takes_effect(self) -> Self:
        takers = {
            "step_size": DESCENTS,
            "step_policy": DESCENTS,
            "momentum": ("nag",),
            "stop_norm": DESCENTS,
            "stop_ratio": DESCENTS,
            "horizon": INTEGRATORS,
            "rtol": ("dopri5",),
            "atol": ("dopri5",),
        }
        for key, names in takers.items():
            if getattr(self, key) is not None and self.name not in names:
                raise ValueError(f"{key} has no effect on {self.name}; use name={' or '.join(names)} or set it to null")
        if self.step_policy == "backtracking" and self.name == "adam":
            raise ValueError(
                "step_policy=backtracking judges steps along the field, which adam's are not; use gd or nag"
            )
        if self.final_step_size is not None and self.step_policy != "decay":
            raise ValueError("final_step_size has no effect without step_policy=decay; set one or the other")
        if self.name == "heun" and self.evaluations % 2:
            raise ValueError(
                f"evaluations={self.evaluations} must be even for heun, whose steps take two; change it by 1"
            )
        for key in ("guided_channels", "guidance_interval"):
            if getattr(self, key) is not None and self.cfg_scale == 1:
                raise ValueError(f"{key} has no effect with cfg_scale=1; leave it out or raise cfg_scale")
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must rise, got {list(self.guidance_interval)}; [0,1] is all the way")
        return self


def require_matching_sampler(objective: ObjectiveConfig, sampler: SamplerConfig) -> None:
    """Refuse a sampler that cannot follow the objective's field.

    Raises:
        ConfigError: it descends a field that knows time, or the time to integrate over is missing or given twice.
    """
    key, integrates = "evaluation.sampler", sampler.name in INTEGRATORS
    if objective.kind == "flow_matching" and not integrates:
        raise ConfigError(
            f"{key}.name={sampler.name} descends a field that is blind to time, which objective.kind=flow_matching is"
            f" not; use {key}.name=euler, heun or dopri5, and set step_size, momentum and the like to null."
        )
    if objective.kind == "flow_matching" and sampler.horizon is not None:
        raise ConfigError(
            f"{key}.horizon={sampler.horizon:g} has no effect on objective.kind=flow_matching, whose time ends at 1;"
            " leave it out."
        )
    if objective.kind != "flow_matching" and integrates and sampler.horizon is None:
        raise ConfigError(
            f"{key}.horizon must be given for {key}.name={sampler.name} with objective.kind={objective.kind}, whose"
            " field knows no time; step_size * evaluations of a good descent is a start."
        )


class EvaluationConfig(Section):
    """What is measured and drawn while the run goes on."""

    every: Count = 1000
    """Steps between two evaluations; the last step is always evaluated. 0: never evaluate."""
    apart: bool = False
    """Evaluate saved checkpoints in a Ray task of its own, on resources that training leaves free, and train on."""
    cpus: PositiveInt | None = None
    """CPUs of that task, which also gets a GPU if the workers have any; default 1; apart only."""
    metrics: tuple[Literal["fid", "sfid", "kid", "is", "precision", "recall"], ...] = ("fid",)
    """What is measured, the FID among it; others need evaluation.apart, or launch.launcher=local."""
    samples: PositiveInt = 1797
    """Images generated for the metrics, balanced over the classes."""
    batch: PositiveInt = 256
    """Images generated at once per worker."""
    grid_columns: PositiveInt = 10
    """Images per class in the picture of samples."""
    extractor: Annotated[str, Field(min_length=1)] = "digits"
    """What makes the features that the FID compares: digits, inception, dinov2-vit-{s,b,l,g}-14, a file of
    pipelines/train_classifier.py, or module:factory."""
    extractor_weights: str | None = None
    """File with the weights of inception; default: fetched at first use; inception only."""
    sampler: SamplerConfig = SamplerConfig()
    """How the images are drawn."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.cpus is not None and not self.apart:
            raise ValueError(f"cpus={self.cpus} has no effect with apart=false; leave it out or use apart=true")
        if "fid" not in self.metrics:
            raise ValueError(f"metrics must hold fid, which says what checkpoint is best, got {list(self.metrics)}")
        return self


class TrackConfig(Section):
    """Where the record goes, besides metrics.jsonl in the run directory."""

    mlflow: bool = True
    """Record the run in MLflow."""
    mlflow_uri: str | None = None
    """Tracking server or store; default: an SQLite file in the root of the runs."""
    experiment: str | None = None
    """MLflow experiment; default eqm-dist."""
    timeout_s: Positive | None = None
    """Longest wait for the tracking server; default 20."""

    @model_validator(mode="after")
    def _needs_mlflow(self) -> Self:
        if self.mlflow_uri is not None and urlsplit(self.mlflow_uri).password is not None:
            raise ValueError(
                "mlflow_uri must not hold a password, which would end up in every record of the run; give it as"
                " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        for name in ("mlflow_uri", "experiment", "timeout_s"):
            if not self.mlflow and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect with mlflow=false; leave it out or use mlflow=true")
        return self


class Config(Section):
    """One training run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    launch: LaunchConfig = LaunchConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        _, height, width = self.data.latent_shape
        if height != width or height % self.model.patch_size:
            raise ValueError(
                f"latents must be square with a side that is a multiple of model.patch_size={self.model.patch_size},"
                f" got data.latent_shape={list(self.data.latent_shape)}; choose another patch_size"
            )
        if self.objective.energy == "l2" and self.model.zero_init:
            raise ValueError(
                "objective.energy=l2 cannot start from a zero output layer, whose gradient stays zero;"
                " set model.zero_init=false"
            )
        if self.objective.energy != "none" and self.engine.zero_stage == 3:
            raise ValueError(
                f"objective.energy={self.objective.energy} differentiates the model inside its loss, when ZeRO stage 3"
                " has given the weights away again; use engine.zero_stage 0, 1 or 2"
            )
        if self.objective.energy != "none" and self.train.activation_checkpointing:
            raise ValueError(
                f"objective.energy={self.objective.energy} differentiates the model inside its loss and needs all"
                " activations for both passes; use train.activation_checkpointing=false"
            )
        if self.evaluation.every:
            try:
                require_matching_sampler(self.objective, self.evaluation.sampler)
            except ConfigError as error:
                raise ValueError(str(error).removesuffix(".")) from None
        if self.data.mix and self.evaluation.every:
            raise ValueError("evaluation compares with one data set, and data.mix has several; set evaluation.every=0")
        alone = self.evaluation.apart or self.launch.launcher == "local"
        if self.evaluation.metrics != ("fid",) and not alone:
            raise ValueError(
                f"evaluation.metrics={list(self.evaluation.metrics)} keeps features of every image, which only one"
                " process can; use evaluation.apart=true, or fid alone"
            )
        if self.evaluation.apart and not self.evaluation.every:
            raise ValueError("evaluation.apart has no effect with evaluation.every=0; leave it out or raise every")
        if self.evaluation.apart and self.launch.launcher == "local":
            raise ValueError("evaluation.apart needs a Ray task, and launch.launcher=local is one process; use ray")
        if self.evaluation.apart and self.evaluation.every % self.checkpoint.every:
            raise ValueError(
                f"evaluation.every={self.evaluation.every} must be a multiple of checkpoint.every="
                f"{self.checkpoint.every} with evaluation.apart, which evaluates checkpoints; change one of them"
            )
        if self.launch.launcher == "local" and self.engine.kind == "deepspeed":
            raise ValueError("launch.launcher=local is one plain process; leave out engine.kind=deepspeed or use ray")
        for name, given in self.engine.deepspeed_settings().items():
            if self.launch.launcher == "local" and given:
                raise ValueError(f"engine.{name} has no effect with launch.launcher=local; leave it out or use ray")
        return self


# What may differ when a run is started again: where and how it runs, how it is watched, how long it goes on.
# Everything else decides the numbers and stays as it was.
RESUMABLE_KEYS = ("run.root", "data.shards", "data.verify_checksums", "data.workers", "data.cache_dir",
                  "data.cache_gib", "data.deadline_s", "train.activation_checkpointing", "train.guard.",
                  "train.log_every", "train.log_grad_norms", "train.micro_batch", "train.steps", "engine.", "launch.",
                  "checkpoint.", "evaluation.", "track.")  # fmt: skip


def dump(config: Section) -> dict[str, Any]:
    """The config as plain lists, dicts and scalars: what goes into YAML, JSON and to the workers."""
    return config.model_dump(mode="json")


def to_yaml(config: Section) -> str:
    """The config as YAML that ``--config`` reads back to an equal config."""
    return yaml.safe_dump(dump(config), sort_keys=False, width=120)


def options(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key that a config has, with its pydantic field, in the order of this file."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from options(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def parse(section: type[T], values: Mapping[str, Any], source: str = "the config") -> T:
    """Validate nested ``values``.

    Raises:
        ConfigError: one sentence for the first wrong value: the rule, what was received, the remedy.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(section, error, source)) from None


def with_overrides(config: T, overrides: Mapping[str, Any], source: str = "the overrides") -> T:
    """A copy of ``config`` with dotted keys set, validated as a whole.

    The one way to change a config, for flags, files, presets, sweeps and tests alike.

    Raises:
        ConfigError: an unknown key, or a value that the rules refuse.
    """
    values = dump(config)
    for key, value in overrides.items():
        *parents, name = key.split(".")
        node = values
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                raise ConfigError(_unknown(type(config), key, source))
            node = node[parent]
        node[name] = value
    return parse(type(config), values, source)


def read_yaml(path: str) -> dict[str, Any]:
    """The dotted keys that a YAML file sets.

    Raises:
        ConfigError: no such file, no YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except OSError as error:
        raise ConfigError(f"--config must name a readable YAML file, got {path} ({error.strerror}).") from None
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"--config must name a YAML file, and {path} is not valid YAML: {line}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config must name a YAML file of sections, and {path} holds {type(values).__name__}.")
    return flatten(cast("dict[str, Any]", values))


def _sentence(section: type[Section], error: ValidationError, source: str) -> str:
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        sentence = _unknown(section, key, source)
    elif first["type"] == "missing":
        sentence = f"{key} must be given ({source})."
    else:
        rule = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
        received = "" if first["type"] == "value_error" else f", got {first['input']!r}"
        sentence = f"{key or source}: {rule}{received} ({source})." if key else f"{rule} ({source})."
    return sentence + (f" ({len(rest)} more of the kind.)" if rest else "")


def _unknown(section: type[Section], key: str, source: str) -> str:
    return f"{key} is not an option ({source}); {suggestion(key, [name for name, _ in options(section)])}"


def suggestion(key: str, known: Collection[str]) -> str:
    """What may have been meant by an unknown dotted key: a key with a similar last part, best in the same section."""
    parent, _, name = key.rpartition(".")
    similar = difflib.get_close_matches(name, {other.rpartition(".")[2] for other in known}, n=len(known))
    candidates = [other for other in known if other.rpartition(".")[2] in similar]
    siblings = [other for other in candidates if other.rpartition(".")[0] == parent]
    best = difflib.get_close_matches(key, siblings or candidates, n=1, cutoff=0)
    return f"did you mean {best[0]}?" if best else "see --help for all keys."


def annotation_name(annotation: Any) -> str:
    """Short name of a field's type for ``--help``: ``INT``, ``FLOAT``, ``{a,b}``, ``[INT,INT]``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(str(value) for value in arguments) + "}"
    if origin is dict:
        return "{KEY:VALUE,...}"
    if origin is Annotated:
        return annotation_name(arguments[0])
    if origin is tuple:
        return "[" + ",".join("..." if part is Ellipsis else annotation_name(part) for part in arguments) + "]"
    if arguments:  # a union with None
        return "|".join(annotation_name(part) for part in arguments if part is not type(None))
    return annotation.__name__.upper()
