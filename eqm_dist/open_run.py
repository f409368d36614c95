"""What the driver of a training run does before anything is computed: check, settle, open the record.

Workers start from the ``OpenRun`` that comes out; nothing here is done twice.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from eqm_dist.build import (
    CONFIG_FILE,
    METRICS_FILE,
    OpenRun,
    build_autoencoder,
    build_checkpoints,
    build_mirror,
    runs_root,
)
from eqm_dist.config import RESUMABLE_KEYS, Config, dump, flatten, parse, to_yaml, with_overrides
from eqm_dist.data.manifest import Manifest, read_manifest
from eqm_dist.data.shards import digits_shards
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.extractors import is_file_name, load_extractor
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.location import is_remote, local_path
from eqm_dist.storage.open import DEADLINE_S, open_folder
from eqm_dist.track.mlflow import ID_FILE, MlflowRun, default_uri
from eqm_dist.track.mlflow import open_run as open_mlflow_run
from eqm_dist.train.checkpoint import step_of
from eqm_dist.train.mirror import Mirror

MANIFEST_COPY = "manifest.json"


def open_run(config: Config) -> OpenRun:
    """Check the data and the run directory, and open the record; called once, by the driver.

    Raises:
        ConfigError: the config contradicts the run of that name, or the shards.
        DataError: there are no such shards.
        StorageError: the run directory cannot be written.
        TrackingError: the tracking server does not answer.
    """
    root = runs_root(config.run.root)
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
    opened = OpenRun(config, directory, None)
    latest = build_checkpoints(opened)[0].latest()
    _check_same_run(config, open_folder(directory), step_of(latest.name) if latest else 0, copies)
    if mirror := build_mirror(opened):
        _restore(opened, mirror, copies)
    with storage_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    atomic_write(directory / CONFIG_FILE, to_yaml(config).encode())
    for name, manifest in copies.items():
        atomic_write(directory / name, manifest.model_dump_json(indent=1).encode())
    return OpenRun(config, directory, _open_mlflow(config, root, directory) if config.track.mlflow else None)


def _with_absolute_locations(config: Config, root: Path, embedded: Path) -> Config:
    def absolute(location: str) -> str:
        return location if is_remote(location) else str(local_path(location))

    overrides: dict[str, Any] = {"run.root": str(root)}
    if config.data.mix:
        overrides["data.mix"] = [{"shards": absolute(part.shards), "weight": part.weight} for part in config.data.mix]
    else:
        overrides["data.shards"] = absolute(config.data.shards or str(embedded))
    if config.checkpoint.mirror is not None:
        overrides["checkpoint.mirror"] = absolute(config.checkpoint.mirror)
    if config.data.cache_dir is not None:
        overrides["data.cache_dir"] = str(local_path(config.data.cache_dir))
    if is_file_name(config.evaluation.extractor):
        overrides["evaluation.extractor"] = str(local_path(config.evaluation.extractor))
    if config.evaluation.extractor_weights is not None:
        overrides["evaluation.extractor_weights"] = str(local_path(config.evaluation.extractor_weights))
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
        load_extractor(config.evaluation.extractor, config.evaluation.extractor_weights)(image)


def _restore(opened: OpenRun, mirror: Mirror, manifests: Mapping[str, Manifest]) -> None:
    """Fetch the run from its mirror where that is ahead of the run directory, as on a new machine."""
    newer = mirror.newer()
    if not newer:
        return
    _check_same_run(opened.config, mirror.reports, step_of(newer[0]), manifests)
    record = opened.directory / ID_FILE
    if not record.exists() and mirror.reports.size(ID_FILE) is not None:
        content = mirror.reports.read(ID_FILE)
        # An MLflow store in a file is lost with its machine; a server goes on with the same MLflow run.
        if not json.loads(content)["tracking_uri"].startswith("sqlite:"):
            LocalFolder(opened.directory).write(ID_FILE, content)
    mirror.fetch(newer)


def _check_same_run(config: Config, place: Folder, step: int, manifests: Mapping[str, Manifest]) -> None:
    """A run that has begun goes on only as what it was: that of ``place``, which has made ``step`` steps."""
    begun = step > 0 or place.size(METRICS_FILE) is not None
    if not begun or place.size(CONFIG_FILE) is None:  # an attempt that failed before its first step binds nobody
        return
    before = _deciding(parse(Config, yaml.safe_load(place.read(CONFIG_FILE)), f"{place.url}/{CONFIG_FILE}"))
    for key, value in _deciding(config).items():
        if before[key] != value and not key.startswith(RESUMABLE_KEYS):
            raise ConfigError(
                f"{key} was {before[key]} when the run {config.run.name} started and is now {value};"
                f" start another run with --run.name, or delete {place.url} to start this one over."
            )
    if before["train.steps"] != config.train.steps and config.optimizer.schedule != "constant":
        raise ConfigError(
            f"train.steps was {before['train.steps']} when the run {config.run.name} started and is now"
            f" {config.train.steps}, which would change the learning rates of its {config.optimizer.schedule} schedule;"
            " keep it, or start another run with --run.name."
        )
    if config.train.steps < step:
        raise ConfigError(
            f"train.steps={config.train.steps} must be at least the {step} steps that the run {config.run.name} has"
            " made already; raise it, or start another run with --run.name."
        )
    for location, (name, manifest) in zip(config.data.locations(), manifests.items(), strict=True):
        if place.size(name) is not None and Manifest.model_validate_json(place.read(name)) != manifest:
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
