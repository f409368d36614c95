"""Every option of every command, as frozen sections that refuse what they do not know.

``Config`` is the whole of a training run; its sections are its table of contents. A value comes from, in rising
order, the defaults below, a preset, a YAML file and the command line (``eqm_dist.cli``). How an option states when it
takes effect is in ``eqm_dist.options``. Nothing here imports torch, so that ``--help`` answers at once; only
``eqm_dist.build`` and what stands above it read it.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator
from pydantic_core import PydanticCustomError

from eqm_dist.documents import MOST_YAML_BYTES, read_bounded
from eqm_dist.errors import ConfigError
from eqm_dist.metric_settings import MetricName
from eqm_dist.options import (
    REQUIRED,
    Axis,
    Only,
    Place,
    Resumable,
    Section,
    flatten,
    given,
    layered,
    make,
    no_effect,
    parse_document,
    put,
    put_section,
    settle,
    shown,
)
from eqm_dist.storage.location import DEADLINE_S, RUN_DEADLINE_S

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


S3, MIRROR, ROOT = "shards on s3://", "a mirror on s3://", "a run.root on s3://"


class RunConfig(Section):
    """Which run this is. The same name in the same root is the same run: starting it again resumes it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = "digits"
    """Name of the run; also the name of its directory."""
    root: Annotated[str | None, Resumable, Place] = None
    """Directory or s3:// prefix that holds all runs. Default: runs/ here, or ~/eqm-dist-runs in a submitted Ray job."""
    scratch: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Place,
        Resumable,
        Only("remote", (True,), "~/.cache/eqm-dist-runs", words=ROOT, by=("root",)),
    ] = None
    """Directory of each host for what is on its way to s3://; needs room for one checkpoint."""
    deadline_s: Annotated[
        Positive | None, Resumable, Only("remote", (True,), RUN_DEADLINE_S, words=ROOT, by=("root",))
    ] = None
    """Seconds for which s3:// may fail or stall before a save is given up."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of everything random: order, noise, gamma, label dropout, initial weights."""

    @property
    def remote(self) -> bool:
        """Whether runs lie on S3."""
        return (self.root or "").startswith("s3://")

    @model_validator(mode="after")
    def _name_is_free(self) -> Self:
        if self.name in ("data", "mlflow-artifacts", "mlflow.db", "mlflow.db.lock"):
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

    shards: Annotated[str | None, Resumable, Place] = None
    """Directory or s3:// prefix with manifest.json. Default: the embedded digits, written at first use."""
    mix: Annotated[tuple[MixConfig, ...], Place] = ()
    """Several data sets instead of one, as [{shards: ..., weight: ...}, ...]."""
    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 8, 8)
    """Channels, height and width of a latent; checked against the shards."""
    num_classes: PositiveInt = 10
    """Number of classes; checked against the shards."""
    window_shards: PositiveInt = 8
    """Samples are shuffled within windows of this many shards."""
    flip: Annotated[bool, Axis] = False
    """Draw the mirrored image half of the time; the shards must hold it."""
    verify_checksums: Annotated[bool, Resumable] = True
    """Compare each shard with the manifest's sha256 when it is first read."""
    workers: Annotated[Count, Resumable] = 1
    """Threads per process that prepare batches in advance; 0 prepares each batch when it is asked for."""
    cache_dir: Annotated[
        str | None, Only("remote", (True,), "~/.cache/eqm-dist", words=S3, by=("shards", "mix")), Resumable, Place
    ] = None
    """Directory that keeps files from s3://, shared by all processes of a machine."""
    cache_gib: Annotated[Positive | None, Only("remote", (True,), 64.0, words=S3, by=("shards", "mix")), Resumable] = (
        None
    )
    """Most disk space that these files may take, in GiB."""
    deadline_s: Annotated[
        Positive | None, Only("remote", (True,), DEADLINE_S, words=S3, by=("shards", "mix")), Resumable
    ] = None
    """Seconds for which s3:// may fail or stall before the run gives up."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.shards is not None and self.mix:
            raise no_effect(
                "shards", "shards has no effect beside mix; put it into mix or leave one of them out", ["mix"]
            )
        return self

    @property
    def remote(self) -> bool:
        """Whether any data set lies on S3."""
        return any(location.startswith("s3://") for location in self.locations())

    def locations(self) -> list[str]:
        """Every data set's location."""
        return [part.shards for part in self.mix] or [self.shards or ""]


class Size(NamedTuple):
    """A published size of the backbone."""

    depth: int
    hidden_size: int
    num_heads: int


SIZES = {
    "S": Size(depth=12, hidden_size=384, num_heads=6),
    "B": Size(depth=12, hidden_size=768, num_heads=12),
    "L": Size(depth=24, hidden_size=1024, num_heads=16),
    "XL": Size(depth=28, hidden_size=1152, num_heads=16),
}


def _published(attribute: str) -> Callable[[Any], int]:
    """What a published size fixes."""
    return lambda model: getattr(SIZES[model.size], attribute)


class ModelConfig(Section, marks=(Axis,)):
    """The SiT backbone: a published size, or width, depth and heads of your own."""

    size: Literal["custom", "S", "B", "L", "XL"] = "custom"
    """A published size, or custom: hidden_size, depth and num_heads are given."""
    patch_size: PositiveInt = 2
    """Side of a patch in latent pixels."""
    hidden_size: Annotated[PositiveInt | None, Only("size", ("custom",), REQUIRED, _published("hidden_size"))] = None
    """Width of the tokens."""
    depth: Annotated[PositiveInt | None, Only("size", ("custom",), REQUIRED, _published("depth"))] = None
    """Number of blocks."""
    num_heads: Annotated[PositiveInt | None, Only("size", ("custom",), REQUIRED, _published("num_heads"))] = None
    """Attention heads."""
    qk_norm: bool = False
    """Normalise queries and keys, which keeps attention stable in bf16. Official checkpoints do not."""
    learn_sigma: bool = False
    """Keep the second half of the output channels that official checkpoints have and nobody uses."""
    zero_init: bool = True
    """Start with an output layer of zeros. The l2 energy cannot: its gradient would stay zero."""


class DecayConfig(Section, marks=(Axis,)):
    """c(gamma), the factor that lets the target field vanish at the data (paper Eqs. 4-6)."""

    family: Literal["constant", "linear", "truncated", "piecewise"] = "truncated"
    """Shape of c(gamma)."""
    gradient_scale: Positive = 4.0
    """lambda, the factor in front."""
    decay_start: Annotated[Fraction | None, Only("family", ("truncated", "piecewise"), 0.8)] = None
    """a, the gamma at which the decay to zero begins."""
    decay_value: Annotated[Annotated[float, Field(ge=0)] | None, Only("family", ("piecewise",), 1.4)] = None
    """b, the value at gamma = 0."""


class WeightingConfig(Section, marks=(Axis,)):
    """Weights of the loss by gamma; the logged loss is the weighted one."""

    kind: Literal["none", "relative", "min_snr"] = "none"
    """relative: 1 / max(c, floor * lambda)^2, relative to the target; min_snr: by signal to noise, with a limit."""
    floor: Annotated[Positive | None, Only("kind", ("relative",), 0.1)] = None
    """Smallest c(gamma) that is divided by, as a part of lambda."""
    snr_limit: Annotated[Positive | None, Only("kind", ("min_snr",), 5.0)] = None
    """Largest signal-to-noise ratio that counts."""


class DispersiveConfig(Section, marks=(Axis,)):
    """The dispersive loss on the last block's tokens (Wang & He, arXiv 2506.09027)."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the dispersive loss; 0 turns it off, the official code has 0.5."""
    temperature: Annotated[Positive | None, Only("on", (True,), 1.0, words="a weight above 0", by=("weight",))] = None
    """Squared distances are divided by it, as in the official code."""
    group: Annotated[
        Annotated[int, Field(ge=2)] | None, Only("on", (True,), 32, words="a weight above 0", by=("weight",))
    ] = None
    """Samples that are compared with each other; one worker's micro-batch holds all of them."""

    @property
    def on(self) -> bool:
        """Whether it has any weight."""
        return self.weight > 0


class ObjectiveConfig(Section, marks=(Axis,)):
    """What the network learns."""

    kind: Literal["eqm", "self_stopping", "flow_matching", "time_free_flow_matching"] = "eqm"
    """Equilibrium Matching, its form on a path that stops at the data, or one of its two baselines."""
    decay: Annotated[DecayConfig | None, Only("kind", ("eqm",), make(DecayConfig))] = None
    """c(gamma) of Equilibrium Matching."""
    braking_start: Annotated[Fraction | None, Only("kind", ("self_stopping",), 0.8)] = None
    """t_c, the time at which the path begins to slow down (not published)."""
    energy: Annotated[
        Literal["none", "dot", "l2"], Only("kind", ("eqm", "self_stopping"), "none", otherwise="none")
    ] = "none"
    """Explicit energy whose gradient is the field (EqM-E)."""
    weighting: WeightingConfig = Field(default_factory=WeightingConfig)
    """Weights of the loss by gamma."""
    dispersive: DispersiveConfig = Field(default_factory=DispersiveConfig)
    """A loss that pushes representations away from each other."""
    label_dropout: Fraction = 0.1
    """Probability of replacing a label by the null label, for classifier-free guidance."""

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        constant = self.kind not in ("eqm", "self_stopping")
        if self.decay is not None:
            constant = self.decay.family == "constant"
        if self.weighting.kind == "relative" and constant:
            raise ValueError("weighting.kind=relative has no effect on a target of constant length; use kind=none")
        if self.dispersive.weight and self.energy != "none":
            raise ValueError(
                f"dispersive.weight needs a model that is called once and plainly, which energy={self.energy} does not"
                " do; use weight=0 or energy=none"
            )
        return self


class OptimizerConfig(Section, marks=(Axis,)):
    """AdamW that carries the exponential moving averages (EMA) of the weights, and its learning-rate schedule."""

    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    gradient_clip: Positive | None = None
    """Largest norm of the whole gradient; null turns clipping off."""
    warmup_steps: Count = 0
    """Steps of linear warm-up from zero."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or decayed to zero at the last step."""
    ema_decays: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.9999,)
    """Decays of the EMAs of the weights; the first EMA is evaluated and exported."""

    @model_validator(mode="after")
    def _distinct_emas(self) -> Self:
        if len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(f"ema_decays must differ from each other, got {list(self.ema_decays)}; drop the repeats")
        return self


class GuardConfig(Section, marks=(Resumable,)):
    """Updates that would do harm: which are skipped, and when the run goes back to a checkpoint."""

    skip: Literal["none", "non_finite", "spikes"] = "non_finite"
    """Skip updates whose loss or gradient is NaN or infinite; spikes: also those whose gradient is far too large."""
    spike_factor: Annotated[Annotated[float, Field(gt=1)] | None, Only("skip", ("spikes",), 10.0)] = None
    """Skip an update whose gradient norm exceeds this multiple of its running mean."""
    spike_window: Annotated[PositiveInt | None, Only("skip", ("non_finite", "spikes"), 100)] = None
    """Updates in the running mean of the gradient norm; no spike is skipped before there are so many."""
    max_skips: Annotated[PositiveInt | None, Only("skip", ("non_finite", "spikes"), 10)] = None
    """Go back to the last checkpoint after this many skipped updates in a row, and pass their batches over."""
    max_rollbacks: Annotated[Count | None, Only("skip", ("non_finite", "spikes"), 3)] = None
    """End the run as failed when it would go back to the same checkpoint more often than this."""


class TrainConfig(Section):
    """How long and in which batches."""

    steps: Annotated[PositiveInt, Resumable] = 2000
    """Number of updates."""
    global_batch: Annotated[PositiveInt, Axis] = 128
    """Samples per update over all workers; any number, divisible by the workers or not."""
    micro_batch: Annotated[PositiveInt | None, Resumable] = None
    """Most samples of one forward pass per worker; more are accumulated. null: no limit, no accumulation."""
    precision: Annotated[Literal["fp32", "tf32", "bf16"], Axis] = "fp32"
    """Arithmetic of the forward and backward pass; weights and EMAs stay fp32."""
    compile: Annotated[Literal["auto", "always", "never"], Resumable] = "auto"
    """Compile the blocks and the draws with torch's Inductor. auto: on a GPU, but for energies and ZeRO stage 3."""
    deterministic: Annotated[bool, Resumable] = False
    """On a GPU, take only algorithms that give the same bits at every start; slower, flash attention above all."""
    activation_checkpointing: Annotated[bool, Resumable] = False
    """Compute the blocks' activations again in the backward pass instead of keeping them: a third more arithmetic."""
    log_grad_norms: Annotated[bool, Resumable] = False
    """Log the gradient norm of the embedders, of each block and of the final layer as well."""
    log_every: Annotated[PositiveInt, Resumable] = 50
    """Steps between two lines of progress."""
    guard: GuardConfig = Field(default_factory=GuardConfig)
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


_STAGE = 1


def _stage_if_certain(engine: "EngineConfig") -> int | None:
    return _STAGE if engine.kind == "deepspeed" else None


class EngineConfig(Section, marks=(Resumable,)):
    """Who runs the updates."""

    kind: Annotated[
        Literal["auto", "deepspeed", "torch"] | None, Only("launch.launcher", ("ray",), "auto", otherwise="torch")
    ] = None
    """DeepSpeed with ZeRO, or its plain-torch twin, which keeps everything on every worker. auto: torch on one worker,
    DeepSpeed on several, or where one of its options below is given."""
    zero_stage: Annotated[
        Annotated[int, Field(ge=0, le=3)] | None, Only("kind", ("auto", "deepspeed"), _stage_if_certain)
    ] = None
    """ZeRO stage of DeepSpeed, by default 1: gradients are sent once a step. 2 and 3 send each micro-batch's, and hold
    less."""
    offload: Annotated[Literal["none", "cpu"], Only("kind", ("auto", "deepspeed"), "none", otherwise="none")] = "none"
    """cpu: keep fp32 weights, moments and EMAs in host memory, and update them there; needs ZeRO 1 to 3."""
    deepspeed: Annotated[dict[str, Any], Only("kind", ("auto", "deepspeed"), make(dict), otherwise=make(dict))] = Field(
        default={}
    )
    """More of DeepSpeed's own keys, as {zero_optimization: {overlap_comm: true}}."""

    def stage(self, workers: int) -> int | None:
        """ZeRO stage on so many workers; None for the plain engine."""
        asked = self.zero_stage is not None or self.offload != "none" or bool(self.deepspeed)
        if self.kind == "torch" or (self.kind == "auto" and workers == 1 and not asked):
            return None
        return _STAGE if self.zero_stage is None else self.zero_stage

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
    def _parts_agree(self) -> Self:
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


class LaunchConfig(Section, marks=(Resumable,)):
    """Where the run runs. Nothing here changes a number."""

    launcher: Literal["ray", "local"] = "ray"
    """Ray Train on a cluster (or on this machine), or this process alone with the torch engine."""
    workers: Annotated[
        PositiveInt | tuple[PositiveInt, PositiveInt] | Literal["auto"] | None,
        Only("launcher", ("ray",), "auto", otherwise=1),
    ] = None
    """Number of workers, or [fewest, most] for a run that shrinks and grows with its cluster. auto: one per GPU,
    without GPUs one per core, at most 4."""
    cpus_per_worker: Annotated[PositiveInt | Literal["auto"] | None, Only("launcher", ("ray",), "auto")] = None
    """CPUs of each worker. auto: the cluster's, shared evenly; of an elastic run a GPU's share of its node, else 1."""
    max_failures: Annotated[Annotated[int, Field(ge=-1)] | None, Only("launcher", ("ray",), 3)] = None
    """Failures in a row, with no newer checkpoint in between, that the run recovers from; -1 for any number."""
    resize_check_s: Annotated[
        Positive | None, Only("elastic", (True,), 60.0, words="workers as [fewest,most]", by=("workers",))
    ] = None
    """Seconds between checks for capacity to scale up."""
    hang_deadline_s: Annotated[Annotated[float, Field(ge=0)] | None, Only("launcher", ("ray",), 600.0)] = None
    """Longest time between two steps. A worker that takes longer is killed, and the run restarts; 0 for no limit."""

    @field_validator("workers", mode="wrap")
    @classmethod
    def _one_number_or_two(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        with contextlib.suppress(ValidationError):
            workers: Any = check(value)
            if not isinstance(workers, tuple) or workers[0] < workers[1]:
                return workers  # pyright: ignore[reportUnknownVariableType]
        raise ValueError(f"should be a number of workers, auto, or the fewest and the most as [1,4], got {value!r}")

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return isinstance(self.workers, tuple)


class CheckpointConfig(Section, marks=(Resumable,)):
    """When the run is saved."""

    every: PositiveInt = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: PositiveInt = 3
    """Number of newest checkpoints to keep."""
    keep_best: Count = 1
    """Number of checkpoints with the lowest FID to keep as well; those at steps that are not evaluated have none."""
    keep_every: PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this; null: none."""
    max_failed_saves: PositiveInt = 3
    """End the run when this many saves in a row have failed, as on a full disk; the last save must not fail."""
    mirror: Annotated[Annotated[str, Field(min_length=1)] | None, Place] = None
    """Directory or s3:// prefix for a second copy of the run; a lost run directory is fetched from it. null: none."""
    mirror_deadline_s: Annotated[
        Positive | None, Only("remote_mirror", (True,), DEADLINE_S, words=MIRROR, by=("mirror",))
    ] = None
    """Seconds for which an s3:// mirror may fail or stall before a copy is given up."""

    @property
    def remote_mirror(self) -> bool:
        """Whether the mirror lies on S3."""
        return (self.mirror or "").startswith("s3://")

    @model_validator(mode="after")
    def _multiples(self) -> Self:
        if self.keep_every is not None and self.keep_every % self.every:
            raise ValueError(
                f"keep_every={self.keep_every} must be a multiple of every={self.every}, for only such steps are saved;"
                " change one of them"
            )
        return self


DESCENTS = ("gd", "nag", "adam")
INTEGRATORS = ("euler", "heun", "dopri5")


def _tenth_of_the_step_size(sampler: Any) -> float:
    return sampler.step_size / 10


class SamplerConfig(Section, marks=(Resumable, Axis)):
    """How samples are drawn: descent along the field (paper Eqs. 8 and 9), or integration of dx/dt = field."""

    name: Literal["gd", "nag", "adam", "euler", "heun", "dopri5"] = "gd"
    """Gradient descent, its Nesterov form with look-ahead, Adam; or Euler's, Heun's, Dormand and Prince's method."""
    step_size: Annotated[Positive | None, Only("name", DESCENTS, 0.003)] = None
    """eta, the step size."""
    step_policy: Annotated[Literal["constant", "decay", "backtracking"] | None, Only("name", DESCENTS, "constant")] = (
        None
    )
    """Constant, falling geometrically, or halved where the field's norm rises (gd and nag only)."""
    final_step_size: Annotated[Positive | None, Only("step_policy", ("decay",), _tenth_of_the_step_size)] = None
    """Step size after the last evaluation of the field. Default: a tenth of step_size."""
    momentum: Annotated[Fraction | None, Only("name", ("nag",), 0.3)] = None
    """mu, the look-ahead."""
    nfe: Annotated[int, Field(gt=0, le=10_000)] = 249
    """Evaluations of the field per sample (the official "250 steps" are 249); with stop_* or dopri5 the limit."""
    stop_norm: Annotated[Positive | None, Only("name", DESCENTS)] = None
    """Stop a sample once its field's norm (root mean square over dimensions) is below this; null: never."""
    stop_ratio: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, Only("name", DESCENTS)] = None
    """Stop a sample once that norm is below this part of what it was at the start; null: never."""
    horizon: Annotated[Positive | None, Only("name", INTEGRATORS)] = None
    """How long the field is followed: 1 for objective.kind=flow_matching, and otherwise to be given."""
    rtol: Annotated[Positive | None, Only("name", ("dopri5",), 1e-3)] = None
    """Relative tolerance of a step."""
    atol: Annotated[Positive | None, Only("name", ("dopri5",), 1e-6)] = None
    """Absolute tolerance of a step."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Arithmetic of the model; what the sampler carries on is fp32. auto: bf16 on a GPU, TF32 on one that lacks it, and
    fp32 on a CPU."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the blocks with torch's Inductor. auto: on a GPU, to evaluate or to draw a set; energies stay eager."""
    cfg_scale: Annotated[float, Field(ge=0)] = 1.0
    """Scale of classifier-free guidance; 1 turns it off."""
    guided_channels: Annotated[
        PositiveInt | None, Only("guided", (True,), words="a cfg_scale other than 1", by=("cfg_scale",))
    ] = None
    """Guide only the first channels (the official figures use 3 of 4); null: all."""
    guidance_interval: Annotated[
        tuple[Share, Share] | None, Only("guided", (True,), words="a cfg_scale other than 1", by=("cfg_scale",))
    ] = None
    """Guide from one part of the trajectory to another: of the NFE, or of an integrator's time; null: always."""

    @property
    def guided(self) -> bool:
        """Whether guidance has an effect."""
        return self.cfg_scale != 1

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.step_policy == "backtracking" and self.name == "adam":
            raise no_effect(
                "step_policy",
                "step_policy=backtracking judges steps along the field, which adam's are not; use gd or nag",
                ["name"],
            )
        if self.name == "heun" and self.nfe % 2:
            raise ValueError(f"nfe={self.nfe} must be even for heun, whose steps take two; change it by 1")
        if self.guidance_interval is not None and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must rise, got {list(self.guidance_interval)}; [0,1] is all the way")
        return self


def require_matching_sampler(objective: ObjectiveConfig, sampler: SamplerConfig) -> None:
    """Refuse a sampler that cannot follow the objective's field.

    Raises:
        ConfigError: it descends a field that knows time, or the time to integrate over is missing or given twice.
    """
    integrates = sampler.name in INTEGRATORS
    if objective.kind == "flow_matching" and not integrates:
        raise ConfigError(
            f"sampler.name={sampler.name} descends a field that is blind to time, which objective.kind=flow_matching is"
            " not; use sampler.name=euler, heun or dopri5."
        )
    if objective.kind == "flow_matching" and sampler.horizon not in (None, 1.0):
        raise ConfigError(
            f"sampler.horizon={sampler.horizon:g} has no effect on objective.kind=flow_matching, whose time ends at 1;"
            " leave it out."
        )
    if objective.kind != "flow_matching" and integrates and sampler.horizon is None:
        raise ConfigError(
            f"sampler.horizon must be given for sampler.name={sampler.name} with objective.kind={objective.kind}, whose"
            " field knows no time; step_size * nfe of a good descent is a start."
        )


class EvaluationConfig(Section, marks=(Resumable,)):
    """What is measured and drawn while the run goes on."""

    every: Count = 1000
    """Steps between two evaluations; the last step is always evaluated. 0 turns evaluation off."""
    asynchronous: bool = False
    """Evaluate saved checkpoints in a Ray task, on resources that training leaves free, while training goes on."""
    cpus: Annotated[PositiveInt | None, Only("asynchronous", (True,), 1)] = None
    """CPUs of that task, which also gets a GPU if the workers have any."""
    metrics: tuple[MetricName, ...] = ("fid",)
    """What is measured, fid among it; the others need evaluation.asynchronous=true, or launch.launcher=local."""
    samples: PositiveInt = 1797
    """Images generated for the metrics, balanced over the classes."""
    batch: PositiveInt = 256
    """Images generated at once per worker."""
    grid_columns: PositiveInt = 10
    """Images per class in the picture of samples."""
    extractor: Annotated[str, Field(min_length=1)] = "digits"
    """What computes the features that the FID compares: digits, inception, dinov2-vit-{s,b,l,g}-14, a file of
    pipelines/train_classifier.py, or module:factory."""
    extractor_weights: str | None = None
    """File with the weights of inception; null: fetched at first use."""

    @model_validator(mode="after")
    def _has_fid(self) -> Self:
        if "fid" not in self.metrics:
            raise ValueError(f"metrics must hold fid, which says what checkpoint is best, got {list(self.metrics)}")
        return self


class TrackConfig(Section, marks=(Resumable,)):
    """Where the record goes, besides metrics.jsonl in the run directory."""

    mlflow: bool = True
    """Record the run in MLflow."""
    mlflow_uri: Annotated[str | None, Only("mlflow", (True,)), Place] = None
    """Tracking server or store. Default: an SQLite file in the root of the runs."""
    experiment: Annotated[str | None, Only("mlflow", (True,), "eqm-dist")] = None
    """MLflow experiment."""
    timeout_s: Annotated[Positive | None, Only("mlflow", (True,), 20.0)] = None
    """Longest wait for the tracking server, in seconds."""


class Config(Section):
    """One training run."""

    run: RunConfig = Field(default_factory=RunConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)

    @model_validator(mode="after")
    def _settle_across_sections(self) -> Self:
        if self.launch.launcher == "local":
            self._refuse_engine_of_workers()
        for name in type(self).model_fields:
            section = getattr(self, name).model_copy()
            try:
                settle(section, self)
            except PydanticCustomError as error:
                facts = error.context or {}
                because = [key if "." in key else f"{name}.{key}" for key in facts["because"]]
                raise no_effect(f"{name}.{facts['option']}", f"{name}.{facts['sentence']}", because) from None
            put_section(self, name, section)
        if self.objective.kind == "flow_matching" and self.sampler.name in INTEGRATORS and self.sampler.horizon is None:
            put(self.sampler, "horizon", 1.0)
        return self

    def _refuse_engine_of_workers(self) -> None:
        for key, value in given(self.engine).items():
            if value not in ("torch", "none", None, {}):
                raise no_effect(
                    f"engine.{key}",
                    f"engine.{key}={shown(value)} has no effect with launch.launcher=local, which is one plain process;"
                    " leave it out or use launch.launcher=ray",
                    ["launch.launcher"],
                )

    @property
    def stays_eager(self) -> str | None:
        """What of this run cannot be compiled, and why; None where all can."""
        if self.objective.energy != "none":
            return f"objective.energy={self.objective.energy}, which needs the second derivative of eager blocks"
        if self.engine.zero_stage == 3:
            return "engine.zero_stage=3, which fetches weights in the middle of what would be one graph"
        return None

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        _, height, width = self.data.latent_shape
        if height != width:
            raise ValueError(
                f"latents must be square, got data.latent_shape={list(self.data.latent_shape)}; prepare the shards anew"
                " with --resolution, which crops the images to a square"
            )
        if height % self.model.patch_size:
            raise ValueError(
                f"latents must have a side that is a multiple of model.patch_size={self.model.patch_size},"
                f" got data.latent_shape={list(self.data.latent_shape)}; choose another patch_size"
            )
        if self.run.remote and self.checkpoint.mirror is not None:
            raise ValueError(
                f"checkpoint.mirror has no effect with run.root={self.run.root}, for the run is on S3 already; leave it"
                " out"
            )
        if self.run.remote and self.evaluation.asynchronous:
            raise ValueError(
                "evaluation.asynchronous cannot be with a run.root on s3:// yet; set evaluation.asynchronous=false, or"
                " use a run.root that all hosts share"
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
        if self.train.compile == "always" and (reason := self.stays_eager):
            raise ValueError(f"train.compile=always cannot be with {reason}; leave it out")
        if self.sampler.compile == "always" and self.objective.energy != "none":
            raise ValueError(
                f"sampler.compile=always cannot be with objective.energy={self.objective.energy}, whose field is a"
                " gradient of eager blocks; leave it out"
            )
        sums = "communication_data_type"
        if sums in self.engine.deepspeed and self.train.precision == "bf16" and self.engine.stage(2):
            raise ValueError(
                f"engine.deepspeed.{sums} has no effect with train.precision=bf16 and ZeRO 1 to 3, where DeepSpeed sums"
                " in fp32; leave it out, or use engine.zero_stage=0"
            )
        if self.objective.energy != "none" and self.train.activation_checkpointing:
            raise ValueError(
                f"objective.energy={self.objective.energy} differentiates the model inside its loss and needs all"
                " activations for both passes; use train.activation_checkpointing=false"
            )
        if self.evaluation.every:
            try:
                require_matching_sampler(self.objective, self.sampler)
            except ConfigError as error:
                raise ValueError(str(error).removesuffix(".")) from None
        if self.data.mix and self.evaluation.every:
            raise ValueError("evaluation compares with one data set, and data.mix has several; set evaluation.every=0")
        alone = self.evaluation.asynchronous or self.launch.launcher == "local"
        if self.evaluation.metrics != ("fid",) and not alone:
            raise ValueError(
                f"evaluation.metrics={list(self.evaluation.metrics)} keeps features of every image, which only one"
                " process can; use evaluation.asynchronous=true, or fid alone"
            )
        if self.evaluation.asynchronous and not self.evaluation.every:
            raise ValueError(
                "evaluation.asynchronous has no effect with evaluation.every=0; leave it out or raise every"
            )
        if self.evaluation.asynchronous and self.launch.launcher == "local":
            raise ValueError(
                "evaluation.asynchronous needs a Ray task, and launch.launcher=local is one process; use ray"
            )
        if self.evaluation.asynchronous and self.evaluation.every % self.checkpoint.every:
            raise ValueError(
                f"evaluation.every={self.evaluation.every} must be a multiple of checkpoint.every="
                f"{self.checkpoint.every} with evaluation.asynchronous, which evaluates checkpoints; change one of them"
            )
        return self


PACKAGED_EXTRACTORS = ("digits", "inception")
"""Extractors that are no code or file of somebody's."""
PORTABLE = ("run.name", "run.seed", "data.latent_shape", "data.num_classes", "model.", "objective.", "optimizer.",
            "train.", "sampler.", "evaluation.every", "evaluation.samples")  # fmt: skip
"""What a config says of a model, and not of the machine and the places of whoever trained it."""


def portable_config(config: Config) -> Config:
    """What a config says of its model: all that leaves with an export, and all that is taken from somebody else's.

    The keys are named, so that a new option stays out until somebody puts it in.
    """
    values = {key: value for key, value in flatten(given(config), Config).items() if key.startswith(PORTABLE)}
    if config.evaluation.extractor in PACKAGED_EXTRACTORS:
        values["evaluation.extractor"] = config.evaluation.extractor
    return layered(Config, (values, "the config"))


def read_config(path: Path) -> Config:
    """The config that a run, a checkpoint or an export keeps of itself.

    Raises:
        ConfigError: it cannot be read, or a value in it is wrong.
    """
    try:
        content = read_bounded(path, MOST_YAML_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({reason}); restore it, or use another checkpoint.") from None
    return parse_document(Config, content, str(path))
