"""The composition root: the maker of all objects that a config describes.

``build_run`` is what each worker does; who wants to know what a run is made of reads this file.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, assert_never

import torch

from eqm_dist.compiled import compile_blocks, compiled, require_compiler
from eqm_dist.config import (
    Config,
    DecayConfig,
    GuardConfig,
    ObjectiveConfig,
    SamplerConfig,
    WeightingConfig,
    require_matching_sampler,
)
from eqm_dist.core.corruption import Path as GammaPath
from eqm_dist.core.corruption import SelfStoppingPath, constant_pace
from eqm_dist.core.decay import ConstantDecay, Decay, LinearDecay, PiecewiseDecay, TruncatedDecay
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
from eqm_dist.core.sampling import GradientNormStop, SamplingMethod
from eqm_dist.core.weighting import MinSnrWeighting, RelativeWeighting, Weighting, weighted
from eqm_dist.data.cache import FileCache
from eqm_dist.data.loader import JoinedReader, Loader, ShardReader
from eqm_dist.data.manifest import Manifest
from eqm_dist.data.order import MixedOrder, SampleOrder
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.evaluator import Evaluator
from eqm_dist.evaluate.extractors import load_extractor
from eqm_dist.evaluate.images import TrainingImages
from eqm_dist.evaluate.statistics import check_count
from eqm_dist.metric_settings import DEFAULT_SETTINGS
from eqm_dist.models.autoencoder import Autoencoder, IdentityAutoencoder, load_autoencoder
from eqm_dist.models.sit import SiT
from eqm_dist.models.sizes import forward_macs, training_flops_per_image
from eqm_dist.options import required, to_yaml
from eqm_dist.precision import Precision, computed_in, in_effect, set_products, with_products
from eqm_dist.run_directory import ATTEMPTS_FILE, CHECKPOINTS, EVALUATIONS, METRICS_FILE, SAMPLES
from eqm_dist.storage.location import Location, S3Path, to_location
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
from eqm_dist.train.meters import peak_flops
from eqm_dist.train.mirror import Mirror
from eqm_dist.train.optimizer import EmaAdamW, ema_key
from eqm_dist.train.reports import Reports
from eqm_dist.train.saving import Saver
from eqm_dist.train.schedule import LearningRateSchedule
from eqm_dist.train.step import BatchLoss, ModelWithLoss, draw_batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """A run whose directory, data and record are ready.

    Attributes:
        config: with absolute paths; what the workers get.
        directory: the run directory; of a run on S3, where this machine works for it.
        mlflow: where it is recorded, or None.
    """

    config: Config
    directory: Path
    mlflow: MlflowRun | None

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of; what it has opened since, such as threads and connections, stays where it is."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def place(self) -> Location:
        """Where the run lies for good: the run directory, or its prefix on S3."""
        run = self.config.run
        return to_location(required(run.root)) / run.name if run.remote else self.directory

    @cached_property
    def reports(self) -> Reports | None:
        """What brings the reports of a run on S3 there; None where the run directory is no other."""
        place = self.place
        return Reports(self.directory, place, self.config.run.deadline_s) if isinstance(place, S3Path) else None

    @cached_property
    def evaluations(self) -> Evaluations:
        """The results of its evaluations, and which steps are due."""
        return Evaluations(self.directory / EVALUATIONS, self.config.evaluation.every, self.config.train.steps)

    @cached_property
    def checkpoints(self) -> Checkpoints[Any]:
        """Its checkpoints, with the rules that say which of them are kept."""
        settings, evaluations = self.config.checkpoint, self.evaluations
        rules: dict[str, Rule] = {"best": lambda steps: evaluations.best(steps, settings.keep_best)}
        if settings.keep_every is not None:
            multiple = settings.keep_every
            rules[f"every {multiple}"] = lambda steps: [step for step in steps if step % multiple == 0]
        if self.config.evaluation.asynchronous:
            rules["to be evaluated"] = evaluations.awaited
        return Checkpoints(self.place / CHECKPOINTS, settings.keep, rules)


def build_run(
    opened: OpenRun, device: torch.device, on_checkpoint: Callable[[Any, int], None] = lambda path, step: None
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
    set_products(in_effect(config.train.precision, device, "train.precision"))
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(config.train.deterministic)
    grad_accum, micro_batch = plan_batch(config, world)

    reader, order = build_data(config)
    model = build_model(config).to(device)
    if compiles := _compiles(config, device):
        require_compiler(device, "train.compile")
        compile_blocks(model.blocks)
    loss = BatchLoss(
        loss=_build_loss(config),
        seed=config.run.seed,
        latent_scale=reader.manifest.latent_scale,
        latent_shift=reader.manifest.latent_shift,
        label_dropout=config.objective.label_dropout,
        null_label=config.data.num_classes,
        flip=config.data.flip,
        draw=compiled(draw_batch) if compiles else draw_batch,
    )
    engine = _build_engine(config, ModelWithLoss(model, loss), device, micro_batch, grad_accum)

    state = opened.checkpoints.resume(engine)
    if rank() == 0:
        opened.evaluations.restart(state.step)
        # Checkpoints that a killed save began on this machine are of no use to anybody.
        if config.run.remote:
            shutil.rmtree(opened.directory / CHECKPOINTS, ignore_errors=True)
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
        checkpoints=opened.checkpoints,
        saver=Saver(
            opened.checkpoints,
            engine,
            ema_state=ema_state,
            config=to_yaml(config),
            max_failed=config.checkpoint.max_failed_saves,
            staging=opened.directory / CHECKPOINTS if config.run.remote else None,
            deadline_s=config.run.deadline_s,
            on_checkpoint=on_checkpoint,
            # Who resumes from a checkpoint finds the metrics up to there.
            before_marker=opened.reports.put if opened.reports else lambda: None,
            on_whole=mirror.copy if mirror else lambda path: None,
        ),
        evaluate=build_evaluator(config, opened.directory, reader, device)
        # A mixture is not evaluated, and what is evaluated asynchronously not here.
        if config.evaluation.every and isinstance(reader, ShardReader) and not config.evaluation.asynchronous
        else None,
        evaluations=opened.evaluations,
        tracker=_begin_record(opened, state.step, engine.name) if rank() == 0 else None,
        ema_state=ema_state,
        steps=config.train.steps,
        global_batch=config.train.global_batch,
        grad_accum=grad_accum,
        log_every=config.train.log_every,
        save_every=config.checkpoint.every,
        grad_norms=GradientNorms(engine) if config.train.log_grad_norms else None,
        guard=_build_guard(config.train.guard),
        flops_per_image=training_flops_per_image(forward_macs(**shape_arguments(config))),
        peak_flops=peak_flops(device, config.train.precision, world),
        mirror=mirror,
        state=state,
    )


def _compiles(config: Config, device: torch.device) -> bool:
    """Whether blocks and draws are compiled; the log says what a user could wonder about."""
    wish, obstacle = config.train.compile, config.stays_eager
    compiles = wish == "always" or (wish == "auto" and device.type == "cuda" and obstacle is None)
    if rank() == 0 and compiles:
        logger.info("compiling the blocks; the first step takes about a minute longer")
    elif rank() == 0 and wish == "auto" and device.type == "cuda":
        logger.info("the blocks are not compiled, for this run has %s", obstacle)
    return compiles


def build_data(config: Config) -> tuple[ShardReader | JoinedReader, SampleOrder | MixedOrder]:
    """What reads the samples, and the order in which they come."""
    data, seed = config.data, config.run.seed
    cache = FileCache(required(data.cache_dir), int(required(data.cache_gib) * 2**30)) if data.remote else None
    readers = [
        ShardReader(location, cache=cache, verify_checksums=data.verify_checksums, deadline_s=data.deadline_s)
        for location in data.locations()
    ]
    orders = [SampleOrder(reader.shard_sizes, seed, data.window_shards) for reader in readers]
    window_bytes = sum(reader.largest_bytes(2 * data.window_shards) for reader in readers if reader.remote)
    if data.cache_gib is not None and window_bytes > data.cache_gib * 2**30:
        raise ConfigError(
            f"The cache must hold two windows of {data.window_shards} shards, {window_bytes / 2**30:.3g} GiB here, and"
            f" data.cache_gib={data.cache_gib:g}; raise it or lower data.window_shards."
        )
    if not data.mix:
        return readers[0], orders[0]
    return JoinedReader(readers), MixedOrder(orders, [part.weight for part in data.mix], seed)


def build_model(config: Config) -> SiT:
    """The backbone with its initial weights, a function of the seed."""
    model = config.model
    return SiT(
        **shape_arguments(config),
        num_heads=required(model.num_heads),
        num_classes=config.data.num_classes,
        time_conditioned=config.objective.kind == "flow_matching",
        qk_norm=model.qk_norm,
        checkpoint_blocks=config.train.activation_checkpointing,
        zero_init=model.zero_init,
        seed=config.run.seed,
    )


def build_decay(decay: DecayConfig) -> Decay:
    """c(gamma) of the config."""
    match decay.family:
        case "constant":
            return ConstantDecay(decay.gradient_scale)
        case "linear":
            return LinearDecay(decay.gradient_scale)
        case "truncated":
            return TruncatedDecay(required(decay.decay_start), decay.gradient_scale)
        case "piecewise":
            return PiecewiseDecay(required(decay.decay_start), required(decay.decay_value), decay.gradient_scale)
        case _:
            assert_never(decay.family)


def build_sampling_method(sampler: SamplerConfig) -> SamplingMethod:
    """How samples are drawn, by the config."""
    return SamplingMethod(build_sampler(sampler), sampler.nfe, _build_stop(sampler))


def build_sampler(sampler: SamplerConfig) -> Sampler:
    """The method of the config."""
    match sampler.name:
        case "gd":
            return GradientDescent(required(sampler.step_size), _build_step_policy(sampler))
        case "nag":
            return NesterovGradientDescent(
                required(sampler.step_size), required(sampler.momentum), _build_step_policy(sampler)
            )
        case "adam":
            policy = _build_step_policy(sampler)
            assert not isinstance(policy, BacktrackingStep)  # the config refuses it
            return Adam(required(sampler.step_size), policy)
        case "euler":
            return Euler(required(sampler.horizon))
        case "heun":
            return Heun(required(sampler.horizon))
        case "dopri5":
            return Dopri5(required(sampler.horizon), required(sampler.rtol), required(sampler.atol))
        case _:
            assert_never(sampler.name)


def _build_step_policy(sampler: SamplerConfig) -> ConstantStep | DecayingStep | BacktrackingStep:
    policy = sampler.step_policy
    assert policy is not None  # descents have one
    match policy:
        case "constant":
            return ConstantStep()
        case "decay":
            return DecayingStep(required(sampler.final_step_size))
        case "backtracking":
            return BacktrackingStep()
        case _:
            assert_never(policy)


def _build_stop(sampler: SamplerConfig) -> GradientNormStop | None:
    if sampler.stop_norm is None and sampler.stop_ratio is None:
        return None
    return GradientNormStop(sampler.stop_norm, sampler.stop_ratio)


def build_field(config: Config, model: SiT, null_label: int, *, many: bool = False) -> TimedField:
    """What samplers follow: the model, or minus the gradient of its energy, guided if so configured.

    Args:
        config: of the model and the sampler.
        model: whose blocks may be compiled in place.
        null_label: of "no class".
        many: it will be asked for thousands of images, so that compiling is worth its minute.

    Raises:
        ConfigError: the sampler cannot follow a field of this objective, or not in its precision.
    """
    require_matching_sampler(config.objective, config.sampler)
    sampler = config.sampler
    energy = config.objective.energy
    device = next(model.parameters()).device
    precision = sampling_precision(config, device)
    if _compiles_sampling(config, device, many):
        require_compiler(device, "sampler.compile")
        compile_blocks(model.blocks, any_size=True)  # where samples leave, fewer are left
    # What is made of the model's values, such as an energy and what guidance adds up, stays in fp32.
    field = computed_in(precision, model)
    if energy != "none":
        field = ExplicitEnergy(field, energy)
    followed = guided(
        field if config.objective.kind == "flow_matching" else blind_to_time(field),
        cfg_scale=sampler.cfg_scale,
        null_label=null_label,
        guided_channels=sampler.guided_channels,
        interval=sampler.guidance_interval,
    )
    return with_products(precision, followed)


def _compiles_sampling(config: Config, device: torch.device, many: bool) -> bool:
    wish = config.sampler.compile
    worth_it = many and device.type == "cuda" and config.objective.energy == "none"
    return wish == "always" or (wish == "auto" and worth_it)


def sampling_precision(config: Config, device: torch.device) -> Precision:
    """The precision of a sampler's products on a device: what its numbers are published with.

    Raises:
        ConfigError: the device does not have it.
    """
    return in_effect(config.sampler.precision, device, "sampler.precision")


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
    if dispersive.group is not None and global_batch % (parts := world * grad_accum * dispersive.group):
        raise ConfigError(
            f"objective.dispersive compares groups of samples that no worker or micro-batch may cut, so"
            f" train.global_batch={global_batch} must be a multiple of {parts}: {world} workers x {grad_accum}"
            f" micro-batches x objective.dispersive.group={dispersive.group}; change one of them."
        )
    return grad_accum, math.ceil(largest / grad_accum)


def shape_arguments(config: Config) -> dict[str, Any]:
    """What the cost of the backbone depends on, as ``models.sizes`` takes it."""
    channels, side, _ = config.data.latent_shape
    return {
        "input_size": side,
        "patch_size": config.model.patch_size,
        "in_channels": channels,
        "hidden_size": required(config.model.hidden_size),
        "depth": required(config.model.depth),
        "learn_sigma": config.model.learn_sigma,
    }


def _build_loss(config: Config) -> Callable[..., torch.Tensor]:
    """(model, latents, labels, gamma=, noise=) -> loss [B]: the error of the field, weighted, then dispersed."""
    objective = config.objective
    decay, path = decay_and_path(objective)
    flow = objective.kind == "flow_matching"
    loss: Callable[..., torch.Tensor] = flow_matching_loss if flow else partial(eqm_loss, decay=decay, path=path)
    if objective.energy != "none":
        loss = of_energy(loss, objective.energy)
    if (weighting := _build_weighting(objective.weighting, decay, path)) is not None:
        loss = weighted(loss, weighting)
    dispersive = objective.dispersive
    if dispersive.weight:
        loss = Dispersed(loss, dispersive.weight, required(dispersive.temperature), required(dispersive.group))
    return loss


def decay_and_path(objective: ObjectiveConfig) -> tuple[Decay, GammaPath]:
    """c(gamma) of the target, and how gamma moves from noise to data."""
    match objective.kind:
        case "eqm":
            return build_decay(required(objective.decay)), constant_pace
        case "self_stopping":
            path = SelfStoppingPath(required(objective.braking_start))
            return path.pace, path
        case "flow_matching" | "time_free_flow_matching":
            return ConstantDecay(1.0), constant_pace
        case _:
            assert_never(objective.kind)


def _build_weighting(weighting: WeightingConfig, decay: Decay, path: GammaPath) -> Weighting | None:
    match weighting.kind:
        case "none":
            return None
        case "relative":
            return RelativeWeighting(decay, required(weighting.floor) * decay.gradient_scale)
        case "min_snr":
            return MinSnrWeighting(decay, required(weighting.snr_limit), path)
        case _:
            assert_never(weighting.kind)


def _build_guard(guard: GuardConfig) -> Guard | None:
    if guard.skip == "none":
        return None
    return Guard(
        spike_factor=guard.spike_factor,
        spike_window=required(guard.spike_window),
        max_skips=required(guard.max_skips),
        max_rollbacks=required(guard.max_rollbacks),
    )


def _build_engine(
    config: Config, module: ModelWithLoss, device: torch.device, micro_batch: int, grad_accum: int
) -> Engine:
    settings = config.optimizer
    optimizer = EmaAdamW(
        module.trained_parameters().values(),
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
    stage = config.engine.stage(world_size())
    if stage is None:
        # What an energy differentiates inside its loss, torch's own reduction does not promise to follow.
        return TorchEngine(module, optimizer, **common, overlap=config.objective.energy == "none")
    from eqm_dist.train.deepspeed_engine import DeepSpeedEngine  # seconds to import, and not needed above

    return DeepSpeedEngine(
        module,
        optimizer,
        **common,
        zero_stage=stage,
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
        field=build_field(config, model, config.data.num_classes, many=True),
        method=build_sampling_method(config.sampler),
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
        directory=directory / SAMPLES,
        cache=cache,
        rank=rank(),
        world=world_size(),
        all_reduce_sum=all_reduce_sum,
        precision=sampling_precision(config, device),
    )


def check_evaluated_samples(config: Config) -> None:
    """Whether ``evaluation.samples`` are enough for ``evaluation.metrics``, before anything is trained.

    Raises:
        DataError: they are too few.
    """
    for metric in config.evaluation.metrics:
        without = "" if metric == "fid" else f", or leave {metric} out of evaluation.metrics"
        remedy = f"raise evaluation.samples{without}"
        check_count([metric], DEFAULT_SETTINGS, config.evaluation.samples, side="generated images", remedy=remedy)


def build_mirror(opened: OpenRun) -> Mirror | None:
    """The mirror of a run, if it has one.

    Raises:
        DataError: it is neither a directory nor on s3://.
    """
    config = opened.config
    if config.checkpoint.mirror is None:
        return None
    location = f"{config.checkpoint.mirror.rstrip('/')}/{config.run.name}"
    return Mirror(location, opened.directory, opened.checkpoints, config.checkpoint.mirror_deadline_s)


def _begin_record(opened: OpenRun, step: int, engine: str) -> CountingTracker:
    """The record of an attempt; what the one before did beyond ``step`` is counted, then dropped."""
    attempts = Attempts(
        opened.directory / ATTEMPTS_FILE, read_metrics(opened.directory / METRICS_FILE), step, world_size()
    )
    return CountingTracker(open_tracker(opened, step, engine), attempts)


def open_tracker(opened: OpenRun, resume_step: int, engine: str | None = None) -> CompositeTracker:
    """The record of a run that starts or resumes at a step; what it knows of the evaluations already is no news.

    ``engine``: the one in effect from here on, if anything is trained.
    """
    file = opened.directory / METRICS_FILE
    trackers: list[Any] = [JsonlTracker(file, resume_step)]  # first: it drops the steps that are done again
    if opened.mlflow is not None:
        tags = {"eqm_dist.engine": engine} if engine else {}
        trackers.append(MlflowTracker(opened.mlflow, read_metrics(file), tags))
    opened.evaluations.seen(line["step"] for line in read_metrics(file) if SCORE in line)
    return CompositeTracker(trackers)
