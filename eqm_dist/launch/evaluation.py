"""Figures of images, or of a model whose images nobody keeps, by all actors of a cluster: ``pipelines/evaluate.py``."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eqm_dist.data.bounds import MAX_IMAGE_PIXELS
from eqm_dist.data.image_set import RECORD_FILE, Unit
from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.extractors import INCEPTION, is_file_name, load_extractor
from eqm_dist.evaluate.images import DecodedImages, Images, open_images
from eqm_dist.evaluate.labels import labels_of
from eqm_dist.evaluate.record import records_of
from eqm_dist.evaluate.references import cached_statistics, load_statistics, published_moments, save_statistics
from eqm_dist.evaluate.statistics import (
    ImageStatistics,
    check_count,
    check_reference,
    compute,
    image_statistics,
    metric_of,
    name_of,
    parts_of,
)
from eqm_dist.launch.actors import run_units
from eqm_dist.logs import Progress
from eqm_dist.metric_settings import MetricSettings
from eqm_dist.options import dump
from eqm_dist.pretrained import Pretrained
from eqm_dist.provenance import provenance
from eqm_dist.storage.location import local_path

UNIT, MOST_UNITS = 1024, 256
"""Images of a unit, after which its statistics travel back: more where there would be too many units to add."""
STATISTICS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Reference:
    """What images are compared with.

    Attributes:
        location: where it came from.
        statistics: of its images.
    """

    location: str
    statistics: ImageStatistics

    def save(self, path: Path) -> None:
        """Keep the statistics under a name, for a later ``reference``.

        Raises:
            StorageError: the file cannot be written.
        """
        save_statistics(path.absolute(), self.statistics, self.location)


def extractor_of(model: Pretrained | None, name: str | None, weights: str | None) -> tuple[str, str | None]:
    """Extractor and weights: those named, or else those of the model's training, or else inception.

    Files by absolute paths, so that every process finds them, whatever directory it works in.
    """
    if name is None and model is not None:
        name, own = model.extractor("--extractor")
        weights = weights or own
    name = name or INCEPTION
    name = str(local_path(name)) if is_file_name(name) else name
    return name, str(local_path(weights)) if weights is not None else None


@dataclass(frozen=True)
class Judge:
    """How sets of images are measured.

    Attributes:
        extractor, weights: as ``load_extractor`` takes them.
        metrics: of ``MetricName``.
        settings: of the metrics.
        batch: images that an actor looks at, or draws, at once.
        launcher: ``ray``, or ``local`` for this process alone.
        actors: most actors; None for all that there is room for.
        cache: directory of the statistics of references; None or nothing keeps none.
        resolution, channels, max_pixels: how files and tars are read, see ``open_images``; channels None are the
            extractor's.
    """

    extractor: str
    weights: str | None
    metrics: Sequence[str]
    settings: MetricSettings = field(default_factory=MetricSettings)
    batch: int = 64
    launcher: str = "ray"
    actors: int | None = None
    cache: str | None = None
    resolution: int | None = None
    channels: int | None = None
    max_pixels: int = MAX_IMAGE_PIXELS

    def images(self, location: str, reference: "Reference | None") -> list[dict[str, Any]]:
        """Records of the metrics of images made by anybody.

        Raises:
            EqmDistError: one sentence for the user.
        """
        images = self._open(location)
        self._check_count(len(images), f"images in {location}")
        statistics = self._measure(images, parts_of(self.metrics))
        return self._records(statistics, reference, images=location, **_written_beside(location))

    def model(
        self, model: Pretrained, reference: "Reference | None", *, samples: int, labels: str, seed: int
    ) -> list[dict[str, Any]]:
        """Records of the metrics of a model; its images are drawn, measured and forgotten, each on its actor.

        Args:
            model: what draws them.
            reference: what they are compared with.
            samples: images in all.
            labels: rule for the class of each (``evaluate.labels``).
            seed: image i depends on (weights, sampler, seed, i) alone.

        Raises:
            EqmDistError: one sentence for the user.
        """
        self.check_samples(samples)
        labels_of(labels, torch.arange(1), model.config.data.num_classes, seed)
        model.autoencoder  # noqa: B018 (fails here, in one sentence, and not on every actor)
        self._loaded()
        work = MeasureDrawn(model, labels, seed, self.extractor, self.weights, parts_of(self.metrics), self.batch)
        statistics, nfe, precisions = None, [], set[str]()
        progress = Progress("measured", samples)
        for unit, (part, spent, precision) in run_units(work, self._units(samples), self.launcher, self.actors):
            statistics = part if statistics is None else statistics + part
            nfe += spent
            precisions.add(precision)
            progress.add(unit.stop - unit.start)
        assert statistics is not None
        return self._records(
            statistics,
            reference,
            images=model.source,
            step=model.step,
            weights_sha256=model.sha256,
            labels=labels,
            sampler=dump(model.config.sampler),
            precision=" and ".join(sorted(precisions)),
            nfe={"mean": sum(nfe) / len(nfe), "min": min(nfe), "max": max(nfe)},
            seed=seed,
        )

    def reference(self, location: str | None) -> "Reference | None":
        """Statistics that were saved or published, or are measured now and cached; None where no metric needs them.

        Raises:
            EqmDistError: one sentence for the user.
        """
        parts_of(self.metrics)
        compared = [metric for metric in self.metrics if metric_of(metric).compares]
        if not compared:
            return None
        parts = parts_of(compared)
        if location is None:
            raise ConfigError(f"The metrics {', '.join(self.metrics)} compare with a reference; add --reference.")
        extractor = self._loaded()
        if location.endswith(STATISTICS_SUFFIX):
            statistics, source = load_statistics(local_path(location))
            check_reference(self.metrics, name_of(extractor), statistics)
            return Reference(f"{location} ({source})", statistics)
        given: dict[str, Any] = {}
        if location.endswith(".npz"):
            published = published_moments(local_path(location), extractor)
            given = {name: part for name, part in published.items() if name in parts}
        missing = parts - given.keys()
        if not missing:
            return Reference(location, ImageStatistics(name_of(extractor), None, given))
        images = self._open(location)
        self._check_count(len(images), f"images in the reference {location}", compared)
        measure = partial(self._measure, images, missing)
        measured = cached_statistics(images, extractor, missing, measure, self.cache) if self.cache else measure()
        # How many images published moments are of, no file says; it is not the number beside them.
        count = None if given else measured.count
        return Reference(location, replace(measured, count=count, parts={**measured.parts, **given}))

    def check_images(self, location: str) -> None:
        """Fail before anything is measured where there are not enough images.

        Raises:
            EqmDistError: one sentence for the user.
        """
        self._check_count(len(self._open(location)), f"images in {location}")

    def decodes(self, location: str) -> bool:
        """Whether there are image files or tars at a location, and no arrays or statistics.

        Raises:
            EqmDistError: one sentence for the user.
        """
        of_arrays = location.endswith((STATISTICS_SUFFIX, ".npz"))
        return not of_arrays and isinstance(self._open(location), DecodedImages)

    def check_samples(self, samples: int, flag: str = "--samples") -> None:
        """Fail before anything is measured where a flag says that too few images are drawn.

        Raises:
            DataError: they are too few.
        """
        self._check_count(samples, "drawn images", remedy=f"raise {flag}")

    def _check_count(self, count: int, side: str, metrics: Sequence[str] = (), remedy: str = "bring more") -> None:
        for metric in metrics or self.metrics:
            lower = " or lower --kid-subset-size" if metric == "kid" else ""
            check_count([metric], self.settings, count, side=side, remedy=f"{remedy}{lower}")

    def _open(self, location: str) -> Images:
        shape = getattr(self._loaded(), "image_shape", None)
        channels = self.channels or (shape[2] if shape else 3)
        images = open_images(location, resolution=self.resolution, channels=channels, max_pixels=self.max_pixels)
        found = next(images.read(0, 1, 1)).shape[3] if self.channels and len(images) else self.channels
        if found != self.channels:
            raise ConfigError(
                f"--channels={self.channels} says how to read files and tars, and {location} holds arrays of {found}"
                " channels; leave it out."
            )
        return images

    def _measure(self, images: Images, parts: Collection[str]) -> ImageStatistics:
        work = MeasureImages(images, self.extractor, self.weights, frozenset(parts), self.batch)
        progress = Progress("measured", len(images))
        statistics = None
        for unit, part in run_units(work, self._units(len(images)), self.launcher, self.actors):
            statistics = part if statistics is None else statistics + part
            progress.add(unit.stop - unit.start)
        if statistics is None:
            raise DataError(f"{images.location} holds no images; correct the path.")
        return statistics

    def _units(self, count: int) -> list[Unit]:
        size = max(1, min(max(UNIT, count // MOST_UNITS), math.ceil(count / (4 * (self.actors or 2)))))
        starts = range(0, count, size)
        return [Unit(number, start, min(start + size, count)) for number, start in enumerate(starts)]

    def _loaded(self) -> nn.Module:
        return loaded_extractor(self.extractor, self.weights, torch.device("cpu"))

    def _records(
        self,
        statistics: ImageStatistics,
        reference: "Reference | None",
        **circumstances: Any,
    ) -> list[dict[str, Any]]:
        compared = reference.statistics if reference else None
        figures = compute(self.metrics, statistics, compared, self.settings)
        common = {
            "samples": statistics.count,
            "labels": None,
            "sampler": None,
            "precision": None,
            "nfe": None,
            "seed": None,
            "reference": reference.location if reference else None,
            "reference_samples": compared.count if compared else None,
            "extractor": statistics.extractor,
        }
        return records_of(figures, self.settings, {**common, **circumstances, **provenance()})


@dataclass(frozen=True)
class MeasureImages:
    """What an actor does with images that there are: it measures those of a unit."""

    images: Images
    extractor: str
    weights: str | None
    parts: frozenset[str]
    batch: int

    def __call__(self, unit: Unit, device: torch.device) -> ImageStatistics:
        return image_statistics(
            loaded_extractor(self.extractor, self.weights, device),
            self.images.read(unit.start, unit.stop, self.batch),
            parts=self.parts,
            first=unit.start,
            device=device,
        )


@dataclass(frozen=True)
class MeasureDrawn:
    """What an actor does with a model: it draws the images of a unit and measures them. Pickles, weights included."""

    model: Pretrained
    labels: str
    seed: int
    extractor: str
    weights: str | None
    parts: frozenset[str]
    batch: int

    def __call__(self, unit: Unit, device: torch.device) -> tuple[ImageStatistics, list[int], str]:
        """Their statistics, the NFE of each, and in what precision they were drawn."""
        indices = torch.arange(unit.start, unit.stop)
        labels = labels_of(self.labels, indices, self.model.config.data.num_classes, self.seed)
        drawn = self.model.generate(indices, labels, self.seed, self.batch, device, many=True)
        statistics = image_statistics(
            loaded_extractor(self.extractor, self.weights, device),
            drawn.images.split(self.batch),
            parts=self.parts,
            first=unit.start,
            device=device,
        )
        return statistics, drawn.nfe.tolist(), self.model.precision(device)


@lru_cache(maxsize=2)
def loaded_extractor(name: str, weights: str | None, device: torch.device) -> nn.Module:
    """An extractor on a device, loaded once in a process."""
    return load_extractor(name, weights).to(device)


def _written_beside(location: str) -> dict[str, Any]:
    """What ``pipelines/sample.py`` wrote beside its images, as far as it belongs into a record."""
    path = Path(location) / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        written = mapping_from_json(read_bounded(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be what pipelines/sample.py wrote ({error}); restore or remove it.") from None
    kept = ("model", "step", "weights_sha256", "labels", "sampler", "precision", "nfe", "seed")
    return {name: written[name] for name in kept if name in written}
