"""The composition root: the only reader of the config, the only maker of objects.

``open_run`` is what the driver does before anything is computed, ``build_run`` what each worker does; who wants to
know what a run is made of reads this file.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from eqm_dist.config import (
    RESUMABLE_KEYS,
    Config,
    DecayConfig,
    SamplerConfig,
    dump,
    flatten,
    parse,
    to_yaml,
    with_overrides,
)
from eqm_dist.core.decay import ConstantDecay, Decay, LinearDecay, PiecewiseDecay, TruncatedDecay, divergence_bound
from eqm_dist.core.energy import ExplicitEnergy
from eqm_dist.core.guidance import guided
from eqm_dist.core.objective import ConditionalField, eqm_loss, flow_matching_loss
from eqm_dist.core.samplers import GradientDescent, NesterovGradientDescent, Sampler
from eqm_dist.data.cache import FileCache
from eqm_dist.data.loader import JoinedReader, Loader, ShardReader
from eqm_dist.data.manifest import Manifest, read_manifest
from eqm_dist.data.order import MixedOrder, SampleOrder
from eqm_dist.data.shards import digits_shards
from eqm_dist.data.storage import DEADLINE_S, atomic_write, is_remote, local_path, open_folder, storage_errors
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.evaluator import Evaluator
from eqm_dist.evaluate.features import ImageClassifier, load_classifier, load_digit_classifier
from eqm_dist.models.autoencoder import Autoencoder, IdentityAutoencoder, load_autoencoder
from eqm_dist.models.sit import SiT
from eqm_dist.models.sizes import SIZES, forward_macs, parameter_count, training_flops_per_image
from eqm_dist.track.composite import CompositeTracker
from eqm_dist.track.jsonl import JsonlTracker, read_metrics
from eqm_dist.track.mlflow import MlflowRun, MlflowTracker, default_uri
from eqm_dist.track.mlflow import open_run as open_mlflow_run
from eqm_dist.train.checkpoint import Checkpoints, read_marker
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero, rank, world_size
from eqm_dist.train.engine import Engine, TorchEngine
from eqm_dist.train.loop import Run
from eqm_dist.train.meters import peak_flops
from eqm_dist.train.optimizer import EmaAdamW, ema_key
from eqm_dist.train.schedule import LearningRateSchedule
from eqm_dist.train.state import TrainState
from eqm_dist.train.step import Objective, TrainingStep

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
MANIFEST_COPY = "manifest.json"
CHECKPOINTS = "checkpoints"


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


def open_run(config: Config) -> OpenRun:
    """Check the data and the run directory, and open the record; called once, by the driver.

    Raises:
        ConfigError: the config contradicts the run of that name, or the shards.
        DataError: there are no such shards.
        StorageError: the run directory cannot be written.
        TrackingError: the tracking server does not answer.
    """
    root = _root(config)
    directory = root / config.run.name
    embedded = root / "data" / "digits"
    config = _with_absolute_locations(config, root, embedded)
    if config.data.shards == str(embedded):
        digits_shards(embedded)
    deadline_s = config.data.deadline_s or DEADLINE_S
    manifests = [read_manifest(open_folder(place, deadline_s=deadline_s)) for place in config.data.locations()]
    for location, manifest in zip(config.data.locations(), manifests, strict=True):
        _check_data(config, manifest, location)
    copies = {_manifest_copy(number): manifest for number, manifest in enumerate(manifests)}
    _check_same_run(config, directory, copies)
    with storage_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / CONFIG_FILE, to_yaml(config).encode())
    for name, manifest in copies.items():
        atomic_write(directory / name, manifest.model_dump_json(indent=1).encode())
    return OpenRun(config, directory, _open_mlflow(config, root, directory) if config.track.mlflow else None)


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
        CheckpointError: the newest checkpoint cannot be read.
        DataError: the shards are damaged.
    """
    config, world = opened.config, world_size()
    if config.train.precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"train.precision=tf32 needs a GPU, and this worker has {device.type}; use fp32.")
    torch.set_float32_matmul_precision("high" if config.train.precision == "tf32" else "highest")
    grad_accum, micro_batch = plan_batch(config, world)

    reader, order = _build_data(config)
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

    checkpoints = Checkpoints(opened.directory / CHECKPOINTS, config.checkpoint.keep)
    latest = from_rank_zero(checkpoints.latest())
    state = TrainState(checkpoints.load(latest, engine, shapes) if latest else 0)

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
        evaluate=build_evaluator(config, opened.directory, reader, build_autoencoder(reader.manifest), device)
        if config.evaluation.every and isinstance(reader, ShardReader)  # a mixture is not evaluated
        else None,
        tracker=_build_tracker(opened, state.step) if rank() == 0 else None,
        shapes=shapes,
        frozen=frozen,
        ema_state=ema_key(config.optimizer.ema_decays[0]),
        config_yaml=to_yaml(config),
        steps=config.train.steps,
        global_batch=config.train.global_batch,
        grad_accum=grad_accum,
        log_every=config.train.log_every,
        save_every=config.checkpoint.every,
        evaluate_every=config.evaluation.every,
        flops_per_image=training_flops_per_image(forward_macs(**_shape_arguments(config))),
        peak_flops=peak_flops(device, config.train.precision, world),
        on_checkpoint=on_checkpoint,
        state=state,
    )


def _build_data(config: Config) -> tuple[ShardReader | JoinedReader, SampleOrder | MixedOrder]:
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


def build_sampler(sampler: SamplerConfig) -> Sampler[Any]:
    """The descent method of the config."""
    if sampler.name == "gd":
        return GradientDescent(sampler.step_size)
    return NesterovGradientDescent(sampler.step_size, 0.3 if sampler.momentum is None else sampler.momentum)


def build_field(config: Config, model: nn.Module, null_label: int) -> ConditionalField:
    """The field that samplers descend: the model, or minus the gradient of its energy, guided if so configured."""
    sampler = config.evaluation.sampler
    field = model if config.objective.energy == "none" else ExplicitEnergy(model, config.objective.energy)
    return guided(field, cfg_scale=sampler.cfg_scale, null_label=null_label, guided_channels=sampler.guided_channels)


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
        ConfigError: a rank or a micro-batch would be empty.
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
    return grad_accum, math.ceil(largest / grad_accum)


def derived_numbers(config: Config) -> dict[str, str]:
    """What a config amounts to, for ``--dry-run``: label -> figure with its unit."""
    shape = _shape_arguments(config)
    classes = config.data.num_classes
    parameters = parameter_count(**shape, num_classes=classes)
    trained = parameter_count(**shape, num_classes=classes, trainable_only=True)
    macs = forward_macs(**shape)
    states = 3 + len(config.optimizer.ema_decays)  # fp32 weight, two moments, the averages
    checkpoint = 4 * (states * trained + parameters)  # and the first average whole
    numbers = {
        "parameters": f"{parameters:,} ({trained:,} trained)",
        "global batch": f"{config.train.global_batch:,} images",
        "steps": f"{config.train.steps:,}",
        "images": f"{config.train.steps * config.train.global_batch:,}",
        "checkpoint": f"{checkpoint:,} bytes ({checkpoint / 2**30:.2f} GiB), {config.checkpoint.keep} kept",
        "training cost": f"{training_flops_per_image(macs) / 1e9:.3f} GFLOP per image ({macs / 1e9:.3f} GMAC forward)",
        "run directory": str(_root(config) / config.run.name),
    }
    bound = divergence_bound(build_decay(config.objective.decay)) if config.objective.kind == "eqm" else None
    if bound is not None:
        numbers["largest stable step"] = f"{bound:.4g} (plain descent near data; evaluation.sampler.step_size)"
    return numbers


def step_size_warning(config: Config) -> str | None:
    """A sentence if the configured descent diverges near data, else None (docs/decisions/0001)."""
    bound = divergence_bound(build_decay(config.objective.decay)) if config.objective.kind == "eqm" else None
    step_size = config.evaluation.sampler.step_size
    if not config.evaluation.every or bound is None or step_size <= bound:
        return None
    return (
        f"evaluation.sampler.step_size={step_size:g} is above {bound:.4g}, where descent near data diverges for this"
        " c(gamma); expect broken samples, or lower it."
    )


def _root(config: Config) -> Path:
    if config.run.root is not None:
        return local_path(config.run.root)
    # Ray unpacks a submitted working directory into a copy that it throws away: runs there would be lost.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return Path.home() / "eqm-dist-runs" if in_job else Path.cwd() / "runs"


def _with_absolute_locations(config: Config, root: Path, embedded: Path) -> Config:
    def absolute(location: str) -> str:
        return location if is_remote(location) else str(local_path(location))

    overrides: dict[str, Any] = {"run.root": str(root)}
    if config.data.mix:
        overrides["data.mix"] = [{"shards": absolute(part.shards), "weight": part.weight} for part in config.data.mix]
    else:
        overrides["data.shards"] = absolute(config.data.shards or str(embedded))
    if config.data.cache_dir is not None:
        overrides["data.cache_dir"] = str(local_path(config.data.cache_dir))
    if config.evaluation.extractor != "digits":
        overrides["evaluation.extractor"] = str(local_path(config.evaluation.extractor))
    return with_overrides(config, overrides)


def _manifest_copy(number: int) -> str:
    return f"manifest-{number}.json" if number else MANIFEST_COPY


def _check_data(config: Config, manifest: Manifest, location: str) -> None:
    if manifest.latent_shape != config.data.latent_shape:
        raise DataError(
            f"data.latent_shape={list(config.data.latent_shape)} must be that of the shards in {location},"
            f" {list(manifest.latent_shape)}; correct one of them."
        )
    if manifest.num_classes != config.data.num_classes:
        raise DataError(
            f"data.num_classes={config.data.num_classes} must be that of the shards in {location},"
            f" {manifest.num_classes}; correct one of them."
        )
    if config.data.flip and manifest.moments_shape[0] == 1:
        raise DataError(
            f"data.flip=true needs shards that hold mirrored images, and those in {location} do not;"
            " set data.flip=false or prepare them with --mirror."
        )
    if config.evaluation.every:
        # A decoder that is gone, or an extractor of other images, fails now and not at the first evaluation.
        image = build_autoencoder(manifest).decode(torch.zeros(1, *manifest.latent_shape))
        _load_extractor(config.evaluation.extractor)(image)


def _check_same_run(config: Config, directory: Path, manifests: Mapping[str, Manifest]) -> None:
    """A run that has begun goes on only as what it was."""
    file = directory / CONFIG_FILE
    begun = (directory / METRICS_FILE).exists() or (directory / CHECKPOINTS).exists()
    if not begun or not file.exists():  # an attempt that failed before its first step binds nobody
        return
    before = _deciding(parse(Config, yaml.safe_load(file.read_text(encoding="utf-8")), str(file)))
    for key, value in _deciding(config).items():
        if before[key] != value and not key.startswith(RESUMABLE_KEYS):
            raise ConfigError(
                f"{key} was {before[key]} when the run {config.run.name} started and is now {value};"
                f" start another run with --run.name, or delete {directory} to start this one over."
            )
    if before["train.steps"] != config.train.steps and config.optimizer.schedule != "constant":
        raise ConfigError(
            f"train.steps was {before['train.steps']} when the run {config.run.name} started and is now"
            f" {config.train.steps}, which would change the learning rates of its {config.optimizer.schedule} schedule;"
            " keep it, or start another run with --run.name."
        )
    latest = Checkpoints(directory / CHECKPOINTS, config.checkpoint.keep).latest()
    step = read_marker(latest)["step"] if latest else 0
    if config.train.steps < step:
        raise ConfigError(
            f"train.steps={config.train.steps} must be at least the {step} steps that the run {config.run.name} has"
            " made already; raise it, or start another run with --run.name."
        )
    for location, (name, manifest) in zip(config.data.locations(), manifests.items(), strict=True):
        copy = directory / name
        if copy.exists() and Manifest.model_validate_json(copy.read_bytes()) != manifest:
            raise DataError(
                f"The shards in {location} are not those that the run {config.run.name} started with; restore"
                " them, or start another run with --run.name."
            )


def _deciding(config: Config) -> dict[str, Any]:
    """The config by dotted keys; of a mixture only the weights, for its data sets may move as a single one may."""
    values = flatten(dump(config))
    return {**values, "data.mix": [part.weight for part in config.data.mix]}


def _open_mlflow(config: Config, root: Path, directory: Path) -> MlflowRun:
    return open_mlflow_run(
        directory,
        name=config.run.name,
        tracking_uri=config.track.mlflow_uri or default_uri(root),
        experiment=config.track.experiment or "eqm-dist",
        params=flatten(dump(config)),
        config_yaml=to_yaml(config),
        timeout_s=config.track.timeout_s or 20,
    )


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
    objective = config.objective
    if objective.kind == "flow_matching":
        return flow_matching_loss
    decay = build_decay(objective.decay) if objective.kind == "eqm" else ConstantDecay(1.0)
    if objective.energy == "none":
        return partial(eqm_loss, decay=decay)
    kind = objective.energy
    return lambda model, *inputs, **draws: eqm_loss(ExplicitEnergy(model, kind), *inputs, **draws, decay=decay)


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

    stage = 2 if config.engine.zero_stage is None else config.engine.zero_stage
    return DeepSpeedEngine(
        objective, optimizer, **common, zero_stage=stage, micro_batch=micro_batch, grad_accum=grad_accum
    )


def build_evaluator(
    config: Config, directory: Path, reader: ShardReader, autoencoder: Autoencoder, device: torch.device
) -> Evaluator:
    """What measures a run while it trains. A collective when called, so every rank builds one."""
    model = build_model(config).to(device).eval()
    evaluation = config.evaluation
    return Evaluator(
        model=model,
        field=build_field(config, model, config.data.num_classes),
        sampler=build_sampler(evaluation.sampler),
        evaluations=evaluation.sampler.evaluations,
        autoencoder=autoencoder,
        reader=reader,
        extractor=_load_extractor(evaluation.extractor).to(device),
        samples=evaluation.samples,
        batch=evaluation.batch,
        columns=evaluation.grid_columns,
        seed=config.run.seed,
        directory=directory / "samples",
        rank=rank(),
        world=world_size(),
        all_reduce_sum=all_reduce_sum,
    )


def _load_extractor(name: str) -> ImageClassifier:
    return load_digit_classifier() if name == "digits" else load_classifier(name)


def _build_tracker(opened: OpenRun, resume_step: int) -> CompositeTracker:
    file = opened.directory / METRICS_FILE
    trackers: list[Any] = [JsonlTracker(file, resume_step)]  # first: it drops the steps that are done again
    if opened.mlflow is not None:
        trackers.append(MlflowTracker(opened.mlflow, read_metrics(file)))
    return CompositeTracker(trackers)
