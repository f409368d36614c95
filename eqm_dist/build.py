"""The composition root: the maker of all objects that a config describes.

``build_run`` is what each worker does; who wants to know what a run is made of reads this file.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eqm_dist.config import (
    Config,
    DecayConfig,
    GuardConfig,
    SamplerConfig,
    require_matching_sampler,
    to_yaml,
)
from eqm_dist.core.corruption import Path as GammaPath
from eqm_dist.core.corruption import SelfStoppingPath, constant_pace
from eqm_dist.core.decay import ConstantDecay, Decay, LinearDecay, PiecewiseDecay, TruncatedDecay, divergence_bound
from eqm_dist.core.dispersive import Dispersed
from eqm_dist.core.energy import ExplicitEnergy, of_energy
from eqm_dist.core.guidance import TimedField, blind_to_time, guided
from eqm_dist.core.objective import eqm_loss, flow_matching_loss
from eqm_dist.core.ode import Dopri5, Euler, Heun
from eqm_dist.core.samplers import (
    Adam,
    BacktrackingStep,
    ConstantStep,
    DecayingStep,
    GradientDescent,
    NesterovGradientDescent,
    Sampler,
)
from eqm_dist.core.sampling import GradientNormStop
from eqm_dist.core.weighting import MinSnrWeighting, RelativeWeighting, Weighting, weighted
from eqm_dist.data.cache import FileCache
from eqm_dist.data.loader import JoinedReader, Loader, ShardReader
from eqm_dist.data.manifest import Manifest
from eqm_dist.data.order import MixedOrder, SampleOrder
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.evaluator import Evaluator
from eqm_dist.evaluate.extractors import load_extractor
from eqm_dist.evaluate.images import TrainingImages
from eqm_dist.models.autoencoder import Autoencoder, IdentityAutoencoder, load_autoencoder
from eqm_dist.models.sit import SiT
from eqm_dist.models.sizes import SIZES, forward_macs, parameter_count, training_flops_per_image
from eqm_dist.storage.location import is_remote, local_path
from eqm_dist.storage.open import DEADLINE_S
from eqm_dist.track.attempts import Attempts, CountingTracker
from eqm_dist.track.composite import CompositeTracker
from eqm_dist.track.jsonl import JsonlTracker, read_metrics
from eqm_dist.track.mlflow import MlflowRun, MlflowTracker
from eqm_dist.train.checkpoint import Checkpoints, Rule
from eqm_dist.train.distributed import all_reduce_sum, rank, world_size
from eqm_dist.train.engine import Engine, TorchEngine
from eqm_dist.train.evaluations import SCORE, Evaluations
from eqm_dist.train.grad_norms import GradientNorms
from eqm_dist.train.guard import Guard
from eqm_dist.train.loop import Run
from eqm_dist.train.memory import model_state_bytes
from eqm_dist.train.meters import peak_flops
from eqm_dist.train.mirror import Mirror
from eqm_dist.train.optimizer import EmaAdamW, ema_key
from eqm_dist.train.saving import Saver
from eqm_dist.train.schedule import LearningRateSchedule
from eqm_dist.train.step import Objective, TrainingStep

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"

CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
DISPERSIVE_GROUP = 32

DEFAULT_STEP_SIZE = 0.003


@dataclass(frozen=True)
class OpenRun:
    """A run whose directory, data and record are ready.

    Attributes:
        config: with absolute paths; what the workers get.
        directory: the run directory.
        mlflow: where it is recorded, or None.
    """

    config: Config
    directory: Path
    mlflow: MlflowRun | None


def build_run(
    opened: OpenRun, device: torch.device, on_checkpoint: Callable[[Path, int], None] = lambda path, step: None
) -> Run:
    """All parts of a run on this worker, resumed from its newest checkpoint if it has one. A collective.

    Args:
        opened: what the driver prepared.
        device: this worker's device.
        on_checkpoint: called with path and step, on every rank, after a checkpoint is whole.

    Raises:
        ConfigError: an option cannot take effect on this device.
        CheckpointError: the newest undamaged checkpoint is not of this run, or all are damaged.
        DataError: the shards are damaged.
    """
    config, world = opened.config, world_size()
    if config.train.precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"train.precision=tf32 needs a GPU, and this worker has {device.type}; use fp32.")
    torch.set_float32_matmul_precision("high" if config.train.precision == "tf32" else "highest")
    grad_accum, micro_batch = plan_batch(config, world)

    reader, order = build_data(config)
    model = build_model(config).to(device)
    shapes = {name: param.shape for name, param in model.named_parameters() if param.requires_grad}
    frozen = {name: param.detach().cpu().clone() for name, param in model.named_parameters() if not param.requires_grad}
    loss = TrainingStep(
        loss=_build_loss(config),
        seed=config.run.seed,
        latent_scale=reader.manifest.latent_scale,
        latent_shift=reader.manifest.latent_shift,
        label_dropout=config.objective.label_dropout,
        null_label=config.data.num_classes,
        flip=config.data.flip,
    )
    engine = _build_engine(config, Objective(model, loss), device, micro_batch, grad_accum)

    checkpoints, evaluations = build_checkpoints(opened)
    state = checkpoints.resume(engine, shapes)
    if rank() == 0:
        evaluations.restart(state.step)
    mirror = build_mirror(opened) if rank() == 0 else None
    ema_state = ema_key(config.optimizer.ema_decays[0])

    return Run(
        engine=engine,
        loader=Loader(
            reader,
            order,
            global_batch=config.train.global_batch,
            rank=rank(),
            world=world,
            workers=config.data.workers,
            pin_memory=device.type == "cuda",
        ),
        schedule=LearningRateSchedule(
            peak=config.optimizer.learning_rate,
            steps=config.train.steps,
            warmup_steps=config.optimizer.warmup_steps,
            shape=config.optimizer.schedule,
        ),
        checkpoints=checkpoints,
        saver=Saver(
            checkpoints,
            engine,
            shapes=shapes,
            frozen=frozen,
            ema_state=ema_state,
            config=to_yaml(config),
            max_failed=config.checkpoint.max_failed_saves,
            on_checkpoint=on_checkpoint,
            **({"on_whole": mirror.copy} if mirror else {}),
        ),
        evaluate=build_evaluator(config, opened.directory, reader, device)
        # A mixture is not evaluated, and what is evaluated apart not here.
        if config.evaluation.every and isinstance(reader, ShardReader) and not config.evaluation.apart
        else None,
        evaluations=evaluations,
        tracker=_begin_record(opened, evaluations, state.step) if rank() == 0 else None,
        shapes=shapes,
        frozen=frozen,
        ema_state=ema_state,
        steps=config.train.steps,
        global_batch=config.train.global_batch,
        grad_accum=grad_accum,
        log_every=config.train.log_every,
        save_every=config.checkpoint.every,
        grad_norms=GradientNorms(list(shapes), device, engine.replicated) if config.train.log_grad_norms else None,
        guard=_build_guard(config.train.guard),
        flops_per_image=training_flops_per_image(forward_macs(**_shape_arguments(config))),
        peak_flops=peak_flops(device, config.train.precision, world),
        mirror=mirror,
        state=state,
    )


def build_data(config: Config) -> tuple[ShardReader | JoinedReader, SampleOrder | MixedOrder]:
    """What reads the samples, and the order in which they come."""
    data, seed = config.data, config.run.seed
    limit_bytes = int((data.cache_gib or 64) * 2**30)
    remote = any(map(is_remote, data.locations()))
    cache = FileCache(data.cache_dir or "~/.cache/eqm-dist", limit_bytes) if remote else None
    options: dict[str, Any] = {"verify_checksums": data.verify_checksums, "deadline_s": data.deadline_s or DEADLINE_S}
    readers = [ShardReader(location, cache=cache, **options) for location in data.locations()]
    orders = [SampleOrder(reader.shard_sizes, seed, data.window_shards) for reader in readers]
    window_bytes = sum(reader.largest_bytes(2 * data.window_shards) for reader in readers if reader.remote)
    if window_bytes > limit_bytes:
        raise ConfigError(
            f"The cache must hold two windows of {data.window_shards} shards, {window_bytes / 2**30:.3g} GiB here, and"
            f" data.cache_gib={limit_bytes / 2**30:g}; raise it or lower data.window_shards."
        )
    if not data.mix:
        return readers[0], orders[0]
    return JoinedReader(readers), MixedOrder(orders, [part.weight for part in data.mix], seed)


def build_model(config: Config) -> SiT:
    """The backbone with its initial weights, a function of the seed."""
    model, hidden_size, depth, num_heads = config.model, *_width_depth_heads(config)
    channels, side, _ = config.data.latent_shape
    return SiT(
        input_size=side,
        patch_size=model.patch_size,
        in_channels=channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=config.data.num_classes,
        learn_sigma=model.learn_sigma,
        time_conditioned=config.objective.kind == "flow_matching",
        qk_norm=model.qk_norm,
        checkpoint_blocks=config.train.activation_checkpointing,
        zero_init=model.zero_init,
        seed=config.run.seed,
    )


def build_decay(decay: DecayConfig) -> Decay:
    """c(gamma) of the config."""
    start = 0.8 if decay.decay_start is None else decay.decay_start
    if decay.family == "constant":
        return ConstantDecay(decay.gradient_scale)
    if decay.family == "linear":
        return LinearDecay(decay.gradient_scale)
    if decay.family == "truncated":
        return TruncatedDecay(start, decay.gradient_scale)
    return PiecewiseDecay(start, 1.4 if decay.decay_value is None else decay.decay_value, decay.gradient_scale)


def build_sampler(sampler: SamplerConfig) -> Sampler:
    """The method of the config."""
    step_size, horizon = sampler.step_size or DEFAULT_STEP_SIZE, sampler.horizon or 1.0
    if sampler.name == "euler":
        return Euler(horizon)
    if sampler.name == "heun":
        return Heun(horizon)
    if sampler.name == "dopri5":
        return Dopri5(horizon, sampler.rtol or 1e-3, sampler.atol or 1e-6)
    decaying = DecayingStep(sampler.final_step_size or step_size / 10) if sampler.step_policy == "decay" else None
    if sampler.name == "adam":
        return Adam(step_size, decaying or ConstantStep())
    policy = decaying or (BacktrackingStep() if sampler.step_policy == "backtracking" else ConstantStep())
    if sampler.name == "gd":
        return GradientDescent(step_size, policy)
    return NesterovGradientDescent(step_size, 0.3 if sampler.momentum is None else sampler.momentum, policy)


def build_stop(sampler: SamplerConfig) -> GradientNormStop | None:
    """The stopping rule of the config, if it has one."""
    if sampler.stop_norm is None and sampler.stop_ratio is None:
        return None
    return GradientNormStop(sampler.stop_norm, sampler.stop_ratio)


def build_field(config: Config, model: nn.Module, null_label: int) -> TimedField:
    """What samplers follow: the model, or minus the gradient of its energy, guided if so configured.

    Raises:
        ConfigError: the sampler cannot follow a field of this objective.
    """
    require_matching_sampler(config.objective, config.evaluation.sampler)
    sampler = config.evaluation.sampler
    field = model if config.objective.energy == "none" else ExplicitEnergy(model, config.objective.energy)
    return guided(
        field if config.objective.kind == "flow_matching" else blind_to_time(field),
        cfg_scale=sampler.cfg_scale,
        null_label=null_label,
        guided_channels=sampler.guided_channels,
        interval=sampler.guidance_interval,
    )


def build_autoencoder(manifest: Manifest) -> Autoencoder:
    """The autoencoder that a data set was made with.

    Raises:
        ConfigError: it needs a package that is not installed.
        DataError: it is not where it was, or is another one now.
    """
    if manifest.autoencoder_location is None and manifest.autoencoder != IdentityAutoencoder.id:
        raise DataError(
            f"The shards were encoded with the autoencoder {manifest.autoencoder!r}, and their manifest does not say"
            " where it is; set evaluation.every=0 to train without pictures, or index the tars with --autoencoder."
        )
    return load_autoencoder(manifest.autoencoder_location, manifest.autoencoder)


def plan_batch(config: Config, world: int) -> tuple[int, int]:
    """Micro-batches per update, the same on every rank, and the most samples of one of them.

    Raises:
        ConfigError: a rank or a micro-batch would be empty, or would cut a group of the dispersive loss.
    """
    global_batch, largest = config.train.global_batch, math.ceil(config.train.global_batch / world)
    if global_batch < world:
        raise ConfigError(
            f"train.global_batch={global_batch} must be at least the number of workers, {world};"
            " raise it or lower launch.workers."
        )
    grad_accum = math.ceil(largest / (config.train.micro_batch or largest))
    if global_batch // world < grad_accum:
        raise ConfigError(
            f"train.micro_batch={config.train.micro_batch} leaves a worker's micro-batch empty with"
            f" train.global_batch={global_batch} on {world} workers; raise train.micro_batch."
        )
    dispersive = config.objective.dispersive
    parts = world * grad_accum * (dispersive.group or DISPERSIVE_GROUP)
    if dispersive.weight and global_batch % parts:
        raise ConfigError(
            f"objective.dispersive compares groups of samples that no worker or micro-batch may cut, so"
            f" train.global_batch={global_batch} must be a multiple of {parts}: {world} workers x {grad_accum}"
            f" micro-batches x objective.dispersive.group={dispersive.group or DISPERSIVE_GROUP}; change one of them."
        )
    return grad_accum, math.ceil(largest / grad_accum)


def derived_numbers(config: Config) -> dict[str, str]:
    """What a config amounts to, for ``--dry-run``: label -> figure with its unit."""
    shape = _shape_arguments(config)
    hidden_size, _, num_heads = _width_depth_heads(config)
    counted = {
        **shape,
        "num_classes": config.data.num_classes,
        "qk_norm_size": hidden_size // num_heads if config.model.qk_norm else 0,
    }
    parameters, trained = parameter_count(**counted), parameter_count(**counted, trainable_only=True)
    macs = forward_macs(**shape)
    states = 3 + len(config.optimizer.ema_decays)  # fp32 weight, two moments, the averages
    checkpoint = 4 * (states * trained + parameters)  # and the first average whole
    numbers = {
        "parameters": f"{parameters:,} ({trained:,} trained)",
        "global batch": f"{config.train.global_batch:,} images",
        "steps": f"{config.train.steps:,}",
        "images": f"{config.train.steps * config.train.global_batch:,}",
        "checkpoint": f"{checkpoint:,} bytes ({checkpoint / 2**30:.2f} GiB), {config.checkpoint.keep} kept",
        "model state": _model_state(config, trained),
        "training cost": f"{training_flops_per_image(macs) / 1e9:.3f} GFLOP per image ({macs / 1e9:.3f} GMAC forward)",
        "run directory": str(runs_root(config.run.root) / config.run.name),
    }
    bound, _ = step_size_bound(config)
    if bound is not None:
        numbers["largest stable step"] = f"{bound:.4g} (plain descent near data; evaluation.sampler.step_size)"
    return numbers


def _model_state(config: Config, trained: int) -> str:
    """What a worker holds of weights, moments, averages and gradient; of elastic workers, when they are fewest."""
    workers = config.launch.workers or 1
    if not isinstance(workers, int):
        workers = min(workers)
    plain = config.engine.kind == "torch" or config.launch.launcher == "local"
    stage = 0 if plain else _zero_stage(config)
    size = model_state_bytes(trained, len(config.optimizer.ema_decays), stage, workers)
    how = "plain" if plain else f"ZeRO {stage}"
    return f"{size:,} bytes ({size / 2**30:.2f} GiB) on each of {workers} worker{'s' * (workers > 1)}, {how}"


def step_size_warning(config: Config) -> str | None:
    """A sentence if the configured descent cannot come to rest near data, else None (docs/decisions/0001)."""
    bound, what_happens = step_size_bound(config)
    sampler = config.evaluation.sampler
    step_size = sampler.step_size or DEFAULT_STEP_SIZE
    constant = sampler.name in ("gd", "nag") and sampler.step_policy in (None, "constant")
    if not config.evaluation.every or bound is None or not constant or step_size <= bound:
        return None
    return (
        f"evaluation.sampler.step_size={step_size:g} is above {bound:.4g}, where descent {what_happens};"
        " expect broken samples, or lower it."
    )


def step_size_bound(config: Config) -> tuple[float | None, str]:
    """The largest step size with which descent comes to rest near data, if any does, and what it does above."""
    if config.objective.kind == "self_stopping":
        return _self_stopping_path(config).step_size_bound, "jumps over the part of the path on which it slows down"
    decay, _ = _decay_and_path(config)
    return divergence_bound(decay), "near data diverges for this c(gamma)"


def runs_root(root: str | None = None) -> Path:
    """The directory that holds all runs: ``run.root``, or the default where that is None."""
    if root is not None:
        return local_path(root)
    # Ray unpacks a submitted working directory into a copy that it throws away: runs there would be lost.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / "eqm-dist-runs" if in_job else Path.cwd() / "runs"


def _width_depth_heads(config: Config) -> tuple[int, int, int]:
    model = config.model
    if model.size is not None:
        size = SIZES[model.size]
        return size.hidden_size, size.depth, size.num_heads
    assert model.hidden_size is not None
    assert model.depth is not None
    assert model.num_heads is not None
    return model.hidden_size, model.depth, model.num_heads


def _shape_arguments(config: Config) -> dict[str, Any]:
    hidden_size, depth, _ = _width_depth_heads(config)
    channels, side, _ = config.data.latent_shape
    return {
        "input_size": side,
        "patch_size": config.model.patch_size,
        "in_channels": channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "learn_sigma": config.model.learn_sigma,
    }


def _build_loss(config: Config) -> Callable[..., torch.Tensor]:
    """(model, latents, labels, gamma=, noise=) -> loss [B]: the error of the field, weighted, then dispersed."""
    objective = config.objective
    decay, path = _decay_and_path(config)
    flow = objective.kind == "flow_matching"
    loss: Callable[..., torch.Tensor] = flow_matching_loss if flow else partial(eqm_loss, decay=decay, path=path)
    if objective.energy != "none":
        loss = of_energy(loss, objective.energy)
    if (weighting := _build_weighting(config, decay, path)) is not None:
        loss = weighted(loss, weighting)
    dispersive = objective.dispersive
    if dispersive.weight:
        loss = Dispersed(loss, dispersive.weight, dispersive.temperature or 1.0, dispersive.group or DISPERSIVE_GROUP)
    return loss


def _decay_and_path(config: Config) -> tuple[Decay, GammaPath]:
    """c(gamma) of the target, and how gamma moves from noise to data."""
    objective = config.objective
    if objective.kind == "eqm":
        return build_decay(objective.decay), constant_pace
    if objective.kind == "self_stopping":
        path = _self_stopping_path(config)
        return path.pace, path
    return ConstantDecay(1.0), constant_pace


def _self_stopping_path(config: Config) -> SelfStoppingPath:
    start = config.objective.braking_start
    return SelfStoppingPath() if start is None else SelfStoppingPath(start)


def _build_weighting(config: Config, decay: Decay, path: GammaPath) -> Weighting | None:
    weighting = config.objective.weighting
    if weighting.kind == "relative":
        return RelativeWeighting(decay, weighting.floor or 0.1 * decay.gradient_scale)
    if weighting.kind == "min_snr":
        return MinSnrWeighting(decay, weighting.snr_limit or 5.0, path)
    return None


def _zero_stage(config: Config) -> int:
    return 2 if config.engine.zero_stage is None else config.engine.zero_stage


def _build_guard(guard: GuardConfig) -> Guard | None:
    if guard.skip == "none":
        return None
    return Guard(
        spike_factor=(guard.spike_factor or 10.0) if guard.skip == "spikes" else None,
        spike_window=guard.spike_window or 100,
        max_skips=guard.max_skips or 10,
        max_rollbacks=3 if guard.max_rollbacks is None else guard.max_rollbacks,
    )


def _build_engine(
    config: Config, objective: Objective, device: torch.device, micro_batch: int, grad_accum: int
) -> Engine:
    settings = config.optimizer
    optimizer = EmaAdamW(
        objective.trained_parameters().values(),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        ema_decays=settings.ema_decays,
    )
    common: dict[str, Any] = {
        "device": device,
        "precision": config.train.precision,
        "gradient_clip": settings.gradient_clip,
    }
    if config.engine.kind == "torch" or config.launch.launcher == "local":
        return TorchEngine(objective, optimizer, **common)
    from eqm_dist.train.deepspeed_engine import DeepSpeedEngine  # seconds to import, and not needed above

    return DeepSpeedEngine(
        objective,
        optimizer,
        **common,
        zero_stage=_zero_stage(config),
        offload=config.engine.offload == "cpu",
        micro_batch=micro_batch,
        grad_accum=grad_accum,
        more=config.engine.deepspeed,
    )


def build_evaluator(
    config: Config, directory: Path, reader: ShardReader, device: torch.device, cache: str | None = None
) -> Evaluator:
    """What measures a run while it trains. A collective when called, so every rank builds one."""
    model = build_model(config).to(device).eval()
    autoencoder, evaluation = build_autoencoder(reader.manifest), config.evaluation
    return Evaluator(
        model=model,
        field=build_field(config, model, config.data.num_classes),
        sampler=build_sampler(evaluation.sampler),
        evaluations=evaluation.sampler.evaluations,
        stop=build_stop(evaluation.sampler),
        autoencoder=autoencoder,
        real=TrainingImages(config.data.shards or "", reader, autoencoder, device),
        num_classes=config.data.num_classes,
        latent_shape=config.data.latent_shape,
        extractor=load_extractor(evaluation.extractor, evaluation.extractor_weights).to(device),
        metrics=evaluation.metrics,
        samples=evaluation.samples,
        batch=evaluation.batch,
        columns=evaluation.grid_columns,
        seed=config.run.seed,
        directory=directory / "samples",
        cache=cache,
        rank=rank(),
        world=world_size(),
        all_reduce_sum=all_reduce_sum,
    )


def build_checkpoints(opened: OpenRun) -> tuple[Checkpoints, Evaluations]:
    """The checkpoints of a run and the evaluations that say which of them are worth keeping."""
    config = opened.config
    evaluations = Evaluations(opened.directory / EVALUATIONS, config.evaluation.every, config.train.steps)

    settings = config.checkpoint
    rules: dict[str, Rule] = {"best": lambda steps: evaluations.best(steps, settings.keep_best)}
    if settings.keep_every is not None:
        multiple = settings.keep_every
        rules[f"every {multiple}"] = lambda steps: [step for step in steps if step % multiple == 0]
    if config.evaluation.apart:
        rules["to be evaluated"] = evaluations.awaited
    return Checkpoints(opened.directory / CHECKPOINTS, settings.keep, rules), evaluations


def build_mirror(opened: OpenRun) -> Mirror | None:
    """The mirror of a run, if it has one.

    Raises:
        DataError: it is neither a directory nor on s3://.
    """
    config = opened.config
    if config.checkpoint.mirror is None:
        return None
    location = f"{config.checkpoint.mirror.rstrip('/')}/{config.run.name}"
    deadline_s = config.checkpoint.mirror_deadline_s or DEADLINE_S
    return Mirror(location, opened.directory, build_checkpoints(opened)[0], deadline_s)


def _begin_record(opened: OpenRun, evaluations: Evaluations, step: int) -> CountingTracker:
    """The record of an attempt; what the one before did beyond ``step`` is counted, then dropped."""
    attempts = Attempts(
        opened.directory / ATTEMPTS_FILE, read_metrics(opened.directory / METRICS_FILE), step, world_size()
    )
    return CountingTracker(open_tracker(opened, evaluations, step), attempts)


def open_tracker(opened: OpenRun, evaluations: Evaluations, resume_step: int) -> CompositeTracker:
    """The record of a run that starts or resumes at a step; what it knows of the evaluations already is no news."""
    file = opened.directory / METRICS_FILE
    trackers: list[Any] = [JsonlTracker(file, resume_step)]  # first: it drops the steps that are done again
    if opened.mlflow is not None:
        trackers.append(MlflowTracker(opened.mlflow, read_metrics(file)))
    evaluations.seen(line["step"] for line in read_metrics(file) if SCORE in line)
    return CompositeTracker(trackers)
