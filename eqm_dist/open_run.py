"""What the driver of a training run does before anything is computed: check, settle, open the record.

Workers start from the ``OpenRun`` that comes out; nothing here is done twice.
"""

import logging
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eqm_dist.build import OpenRun, build_autoencoder, build_mirror, check_evaluated_samples
from eqm_dist.config import Config
from eqm_dist.data.manifest import Manifest, read_manifest
from eqm_dist.data.publish import publish_shards
from eqm_dist.data.shards import digits_shards
from eqm_dist.documents import mapping_from_json
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.extractors import is_file_name, load_extractor
from eqm_dist.evaluate.metrics import FEWEST_HALVED
from eqm_dist.evaluate.statistics import check_count, extract, parts_of
from eqm_dist.metric_settings import DEFAULT_SETTINGS
from eqm_dist.options import (
    Place,
    Resumable,
    dump,
    flatten,
    given,
    keys_with,
    layered,
    parse_document,
    required,
    shown,
    to_yaml,
    with_overrides,
)
from eqm_dist.run_directory import CONFIG_FILE, MANIFEST_FILE, METRICS_FILE, MLFLOW_FILE, manifest_file
from eqm_dist.runs import runs_location, scratch_of
from eqm_dist.storage.files import atomic_write, storage_errors
from eqm_dist.storage.folder import Folder, LocalFolder
from eqm_dist.storage.lease import hold
from eqm_dist.storage.location import Location, S3Path, is_remote, local_path
from eqm_dist.storage.open import open_folder
from eqm_dist.storage.remote_lease import hold_on_s3
from eqm_dist.track.mlflow import MlflowRun, default_uri
from eqm_dist.track.mlflow import open_run as open_mlflow_run
from eqm_dist.train.checkpoint import step_of
from eqm_dist.train.mirror import Mirror

logger = logging.getLogger(__name__)


def hold_run(config: Config) -> AbstractContextManager[None]:
    """Keep other processes from the run of that name for as long as this one works on it.

    Raises:
        BusyError: another process holds it.
        StorageError: the run directory cannot be written.
    """
    place = runs_location(config.run.root) / config.run.name
    what, remedy = f"The run {config.run.name}", "choose another --run.name"
    return hold_on_s3(place, what, remedy) if isinstance(place, S3Path) else hold(place, what, remedy)


def open_run(config: Config) -> OpenRun:
    """Check the data and the run directory, and open the record; called once, by the driver.

    Raises:
        EqmDistError: see ``check_run`` and ``open_record``.
    """
    return open_record(check_run(config))


def check_run(config: Config) -> OpenRun:
    """Check the data and the run directory, and write what the run is into it. Its record is still to be opened.

    A run that has begun goes on with its own values: what the command does not give is taken from its record, whatever
    the defaults are now.

    Raises:
        ConfigError: the config contradicts the run of that name, or the shards.
        DataError: there are no such shards.
        StorageError: the run directory cannot be written.
    """
    root = runs_location(config.run.root)
    place = root / config.run.name
    directory = scratch_of(place, required(config.run.scratch)) if isinstance(place, S3Path) else place
    opened = OpenRun(config, directory, None)
    latest = opened.checkpoints.latest()
    begun = [_Begun(open_folder(place), step_of(latest.name) if latest else 0)]
    mirror = build_mirror(opened)
    newer = mirror.newer() if mirror else []
    if mirror and newer:  # as on a new machine
        begun.append(_Begun(mirror.reports, step_of(newer[0])))
    for record in begun:
        config = record.go_on(config)
    embedded = root / "data" / "digits"
    config = _with_absolute_locations(config, root, embedded)
    if config.data.shards == str(embedded):
        _make_digits(embedded)
    locations, deadline_s = config.data.locations(), config.data.deadline_s
    manifests = [read_manifest(open_folder(location, deadline_s=deadline_s)) for location in locations]
    for number, (location, manifest) in enumerate(zip(locations, manifests, strict=True)):
        _check_data(config, manifest, location)
        for record in begun:
            record.check_data(config, number, manifest, location)
    opened = OpenRun(config, directory, None)
    if mirror and newer:
        _fetch(opened, mirror, newer)
    with storage_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    reports = opened.reports
    if reports is not None:
        reports.fetch()
    atomic_write(directory / CONFIG_FILE, to_yaml(config).encode())
    for number, manifest in enumerate(manifests):
        atomic_write(directory / manifest_file(number), manifest.model_dump_json(indent=1).encode())
    if reports is not None:
        reports.put()
    return opened


def open_record(opened: OpenRun) -> OpenRun:
    """The run with its MLflow run, if it has one.

    Raises:
        DataError: what the run directory says of its MLflow run is damaged.
        TrackingError: the tracking server does not answer, or no longer knows the run.
    """
    config = opened.config
    if not config.track.mlflow:
        return opened
    recorded = replace(opened, mlflow=_open_mlflow(config, opened.directory))
    if recorded.reports is not None:
        recorded.reports.put()
    return recorded


def _make_digits(embedded: Location) -> None:
    """Write the digits where there are none yet."""
    if isinstance(embedded, Path):
        digits_shards(embedded)
        return
    if open_folder(embedded).size(MANIFEST_FILE) is None:
        with tempfile.TemporaryDirectory() as directory:
            digits_shards(f"{directory}/digits")
            publish_shards(Path(directory) / "digits", str(embedded))


def _with_absolute_locations(config: Config, root: Location, embedded: Location) -> Config:
    def absolute(location: str) -> str:
        return location if is_remote(location) else str(local_path(location))

    overrides: dict[str, Any] = {"run.root": str(root)}
    if config.data.mix:
        overrides["data.mix"] = [{"shards": absolute(part.shards), "weight": part.weight} for part in config.data.mix]
    else:
        overrides["data.shards"] = absolute(config.data.shards or str(embedded))
    if config.checkpoint.mirror is not None:
        overrides["checkpoint.mirror"] = absolute(config.checkpoint.mirror)
    if config.run.scratch is not None:
        overrides["run.scratch"] = str(local_path(config.run.scratch))
    if config.data.cache_dir is not None:
        overrides["data.cache_dir"] = str(local_path(config.data.cache_dir))
    if is_file_name(config.evaluation.extractor):
        overrides["evaluation.extractor"] = str(local_path(config.evaluation.extractor))
    if config.track.mlflow and config.track.mlflow_uri is None:
        overrides["track.mlflow_uri"] = default_uri(_store(config, root))
    if config.evaluation.extractor_weights is not None:
        overrides["evaluation.extractor_weights"] = str(local_path(config.evaluation.extractor_weights))
    return with_overrides(config, overrides)


def _store(config: Config, root: Location) -> Path:
    """The directory of an MLflow store that nobody named."""
    if not isinstance(root, S3Path):
        return root
    if config.launch.launcher != "local":
        raise ConfigError(
            f"track.mlflow_uri must name a server that all hosts reach where run.root={root} is on s3://, for a file is"
            " of one host alone; give it, or set track.mlflow=false."
        )
    return scratch_of(root, required(config.run.scratch))


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
        check_evaluated_samples(config)
        _check_real_images(config, manifest, location)
        # A decoder that is gone, or an extractor of other images, fails now and not at the first evaluation.
        image = build_autoencoder(manifest).decode(torch.zeros(1, *manifest.latent_shape))
        extractor = load_extractor(config.evaluation.extractor, config.evaluation.extractor_weights)
        extract(extractor, image, {part.split(".")[0] for part in parts_of(config.evaluation.metrics)})


def _check_real_images(config: Config, manifest: Manifest, location: str) -> None:
    """Whether the data set has enough images for the metrics, and for the yardstick, which halves them.

    Raises:
        DataError: they are too few.
    """
    count, remedy = manifest.num_samples, f"train on more than {location}, or set evaluation.every=0"
    check_count(config.evaluation.metrics, DEFAULT_SETTINGS, count, side="real images", remedy=remedy)
    if count < FEWEST_HALVED:
        raise DataError(f"The yardstick of the FID needs at least {FEWEST_HALVED} real images, got {count}; {remedy}.")


def _fetch(opened: OpenRun, mirror: Mirror, newer: Sequence[str]) -> None:
    """Fetch the run from its mirror, which is ahead of the run directory."""
    record = opened.directory / MLFLOW_FILE
    if not record.exists() and mirror.reports.size(MLFLOW_FILE) is not None:
        content = mirror.reports.read(MLFLOW_FILE)
        # An MLflow store in a file is lost with its machine; a server goes on with the same MLflow run.
        try:
            recorded = str(mapping_from_json(content)["tracking_uri"])
        except (ValueError, KeyError) as error:
            where = f"{mirror.reports.url}/{MLFLOW_FILE}"
            raise DataError(f"{where} must say where the run is recorded ({error!r}); restore or delete it.") from None
        if not recorded.startswith("sqlite:"):
            LocalFolder(opened.directory).write(MLFLOW_FILE, content)
    mirror.fetch(newer)


@dataclass(frozen=True)
class _Begun:
    """What is recorded of a run, which goes on only as what it was.

    Attributes:
        place: its directory, or its mirror.
        step: how many steps it has made.
    """

    place: Folder
    step: int

    @cached_property
    def config(self) -> Config | None:
        """The values that it began with; None where it has not begun: an attempt without a step binds nobody."""
        begun = self.step > 0 or self.place.size(METRICS_FILE) is not None
        if not begun or self.place.size(CONFIG_FILE) is None:
            return None
        where = f"{self.place.url}/{CONFIG_FILE}"
        return parse_document(Config, self.place.read(CONFIG_FILE), where)

    def go_on(self, config: Config) -> Config:
        """The config with what nobody gives now as it was at the start.

        Raises:
            ConfigError: what is given decides the numbers and was another, or does not go with the rest.
        """
        if self.config is None:
            return config
        name, before = config.run.name, _deciding(self.config)
        resumable, places = (keys_with(Config, mark) for mark in (Resumable, Place))
        for key, value in _deciding(config).items():
            if value != before[key] and key not in resumable and (key in _given(config) or key in places):
                raise ConfigError(
                    f"{key} was {before[key]} when the run {name} started and is now {value};"
                    f" start another run with --run.name, or delete {self.place.url} to start this one over."
                )
        kept = {key: value for key, value in _given(self.config).items() if key not in places}
        merged = layered(Config, (kept, "its record"), (_given(config), f"what is given to go on with the run {name}"))
        self._check_steps(merged)
        self._say_what_is_kept(config, merged)
        return merged

    def check_data(self, config: Config, number: int, manifest: Manifest, location: str) -> None:
        """Refuse another data set than the one of that number at the start.

        Raises:
            DataError: it is another.
        """
        name = manifest_file(number)
        if self.config is None or self.place.size(name) is None:
            return
        try:
            before = Manifest.model_validate_json(self.place.read(name))
        except ValueError as error:
            raise DataError(
                f"{self.place.url}/{name} must be the manifest of the run's data, and is damaged"
                f" ({next(iter(str(error).splitlines()))}); restore it."
            ) from None
        if before != manifest:
            raise DataError(
                f"The shards in {location} are not those that the run {config.run.name} started with; restore"
                " them, or start another run with --run.name."
            )

    def _say_what_is_kept(self, config: Config, merged: Config) -> None:
        now, then = flatten(dump(config)), flatten(dump(merged))
        kept = [f"{key}={shown(then[key])}" for key in then if now.get(key) != then[key] is not None]
        if kept:
            logger.info("run %s goes on with the values of its start: %s", config.run.name, ", ".join(kept))

    def _check_steps(self, config: Config) -> None:
        assert self.config is not None
        name, steps, before = config.run.name, config.train.steps, self.config.train.steps
        if before != steps and config.optimizer.schedule != "constant":
            raise ConfigError(
                f"train.steps was {before} when the run {name} started and is now {steps}, which would change the"
                f" learning rates of its {config.optimizer.schedule} schedule; keep it, or start another run with"
                " --run.name."
            )
        if steps < self.step:
            raise ConfigError(
                f"train.steps={steps} must be at least the {self.step} steps that the run {name} has made already;"
                " raise it, or start another run with --run.name."
            )


def _deciding(config: Config) -> dict[str, Any]:
    """The config by dotted keys; of a mixture only the weights, for its data sets may move as a single one may."""
    return {**flatten(dump(config), Config), "data.mix": [part.weight for part in config.data.mix]}


def _given(config: Config) -> dict[str, Any]:
    """What somebody gave, by dotted keys."""
    return flatten(given(config), Config)


def _open_mlflow(config: Config, directory: Path) -> MlflowRun:
    return open_mlflow_run(
        directory,
        name=config.run.name,
        tracking_uri=required(config.track.mlflow_uri),
        experiment=required(config.track.experiment),
        params=flatten(dump(config)),
        config_yaml=to_yaml(config),
        timeout_s=required(config.track.timeout_s),
    )
