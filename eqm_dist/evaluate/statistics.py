"""What a set of images contributes to its figures: one object that workers fill, send and add.

Nothing keeps an image. The Frechet distances need moments of features, in float64; KID, precision and recall need the
features themselves, and the inception score the class scores: rows, one for each image, of which at most ``MOST_ROWS``
are kept (for Inception 410 MB of features and 200 MB of scores, beside 34 MB of moments). Of a larger set a random
choice is kept, a function of the images' indices alone, so that it does not matter how the set was divided.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Self

import torch
from torch import Tensor, nn

from eqm_dist import rng
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.evaluate.metrics import (
    FeatureMoments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from eqm_dist.metric_settings import DEFAULT_SETTINGS, SEED, MetricName, MetricSettings
from eqm_dist.precision import products

MOST_ROWS = 50_000
"""Images whose features are kept: the size at which the literature compares."""

MOMENTS, SPATIAL_MOMENTS = "features.moments", "spatial.moments"
FEATURES, LOGITS = "features.rows", "logits.rows"
PARTS = (MOMENTS, SPATIAL_MOMENTS, FEATURES, LOGITS)
"""What statistics may hold: an output of an extractor, and what is kept of it."""


@dataclass(frozen=True)
class Rows:
    """One row for each of some images: their ``indices`` [n] int64, rising, and ``values`` [n, F]; on the CPU."""

    indices: Tensor
    values: Tensor

    def __add__(self, other: Self) -> Self:
        indices = torch.cat([self.indices, other.indices])
        kept = indices.argsort(stable=True)
        if len(indices) > MOST_ROWS:
            kept = kept[_chosen(indices)[kept]]
        return type(self)(indices[kept], torch.cat([self.values, other.values])[kept])

    def among(self, count: int) -> tuple[Tensor, int]:
        """Where these rows lie among those that are kept of all images [0, count), and how many those are.

        Returns:
            [n] int64 positions, -1 for a row that is not kept; and their number.
        """
        kept = torch.arange(count)
        if count > MOST_ROWS:
            kept = kept[_chosen(kept)]
        places = torch.searchsorted(kept, self.indices).clamp(max=len(kept) - 1)
        return torch.where(kept[places] == self.indices, places, -1), len(kept)


def _chosen(indices: Tensor) -> Tensor:
    """Which of too many images [n] are kept: those with the smallest keys, whoever saw them, added in any order."""
    keys = rng.uniform(SEED, rng.Stream.SPLIT, indices, (), dtype=torch.float64)
    chosen = torch.zeros(len(indices), dtype=torch.bool)
    chosen[keys.argsort(stable=True)[:MOST_ROWS]] = True
    return chosen


@dataclass(frozen=True)
class ImageStatistics:
    """Everything that is kept of a set of images. Pickles; ``+`` joins the statistics of two parts of a set.

    Attributes:
        extractor: id of what made the features; statistics of different extractors are not compared.
        count: images; None where nothing tells.
        parts: by name, of ``PARTS``.
    """

    extractor: str
    count: int | None
    parts: Mapping[str, FeatureMoments | Rows]

    def __add__(self, other: Self) -> Self:
        assert self.extractor == other.extractor
        assert self.parts.keys() == other.parts.keys()
        assert self.count is not None
        assert other.count is not None
        others: Mapping[str, Any] = other.parts
        parts = {name: part + others[name] for name, part in self.parts.items()}
        return type(self)(self.extractor, self.count + other.count, parts)


def parts_of(metrics: Iterable[str]) -> frozenset[str]:
    """The parts that these metrics need.

    Raises:
        ConfigError: no such metric.
    """
    return frozenset(metric_of(name).part for name in metrics)


@torch.no_grad()
def image_statistics(
    extractor: nn.Module,
    batches: Iterable[Tensor],
    *,
    parts: Collection[str],
    first: int = 0,
    device: torch.device | str = "cpu",
) -> ImageStatistics:
    """The statistics of the images [first, first + n) of a set.

    Args:
        extractor: see ``eqm_dist.evaluate.extractors``; on ``device``.
        batches: images [B, H, W, C] uint8, in the order of their indices; without any, the statistics of none.
        parts: of ``PARTS``.
        first: index of the first image.
        device: where to compute.

    Raises:
        ConfigError: the extractor does not offer an output that a part needs.
        DataError: it gives something else than it promises.
    """
    outputs = {part.split(".")[0] for part in parts}
    found: dict[str, list[Any]] = {part: [] for part in parts}
    count = 0
    for images in batches:
        extracted = extract(extractor, images.to(device), outputs)
        indices = torch.arange(first + count, first + count + len(images))
        for part, pieces in found.items():
            output, kept = part.split(".")
            if kept == "rows":
                pieces.append(Rows(indices, extracted[output].cpu()))
            else:
                moments = FeatureMoments.of(extracted[output])
                pieces[:] = [pieces[0] + moments if pieces else moments]
        count += len(images)
    if not count:
        return _of_none(extractor, parts)
    joined: dict[str, Any] = {}
    for part, pieces in found.items():
        joined[part] = pieces[0].to("cpu") if part.endswith("moments") else _joined(pieces)
    return ImageStatistics(name_of(extractor), count, joined)


def _of_none(extractor: nn.Module, parts: Collection[str]) -> ImageStatistics:
    """Of a worker without images, as far as the extractor says how wide its outputs are."""
    assert all(part.startswith("features.") for part in parts)
    none = torch.zeros(0, extractor.num_features)  # pyright: ignore[reportArgumentType]
    empty = {part: FeatureMoments.of(none) if part == MOMENTS else Rows(torch.arange(0), none) for part in parts}
    return ImageStatistics(name_of(extractor), 0, empty)


def _joined(pieces: list[Rows]) -> Rows:
    whole = Rows(torch.cat([rows.indices for rows in pieces]), torch.cat([rows.values for rows in pieces]))
    return Rows(whole.indices[:0], whole.values[:0]) + whole


def extract(extractor: nn.Module, images: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
    """Outputs [B, ...] of an extractor for images [B, H, W, C] uint8: ``features``, ``spatial``, ``logits``; in fp32.

    Raises:
        ConfigError: the extractor does not offer one.
        DataError: an output is not [B, F], or not finite.
    """
    together: Callable[..., Mapping[str, Tensor]] | None = getattr(extractor, "outputs", None)
    with products("fp32"):  # as all published figures
        if together is not None:
            extracted = dict(together(images, outputs))
        else:
            others = {name: getattr(extractor, name, None) for name in ("spatial", "logits")}
            methods = {"features": extractor, **others}
            extracted = {name: method(images) for name in outputs if (method := methods[name]) is not None}
    for name in sorted(outputs):
        if name not in extracted:
            metrics = [metric for metric, how in METRICS.items() if how.part.startswith(name)]
            raise ConfigError(
                f"The metrics {', '.join(metrics)} need {name} of the extractor, and"
                f" {name_of(extractor)} has none; leave them out or use inception."
            )
        width = getattr(extractor, "num_features", None) if name == "features" else None
        shape = list(extracted[name].shape)
        if len(shape) != 2 or shape[0] != len(images) or (width is not None and shape[1] != width):
            raise DataError(
                f"An extractor must give {name} of shape [{len(images)}, {width or 'F'}] for {len(images)} images,"
                f" and {name_of(extractor)} gave {shape}; correct it."
            )
        if not extracted[name].isfinite().all():
            raise DataError(
                f"An extractor must give finite numbers, and {name_of(extractor)} gave {name} that are infinite or"
                " none; correct it, or use another one."
            )
    return extracted


def extractor_id(extractor: nn.Module) -> str | None:
    """The name that an extractor answers for, weights included; None if it gives itself none."""
    found = getattr(extractor, "id", None)
    return found if isinstance(found, str) else None


def name_of(extractor: nn.Module) -> str:
    """Its id, or else the name of its class."""
    return extractor_id(extractor) or type(extractor).__name__


def merged(statistics: Iterable[ImageStatistics]) -> ImageStatistics:
    """The statistics of all parts of a set together; at least one."""
    return reduce(add, statistics)


@dataclass(frozen=True)
class Metric:
    """How the figures of a metric come about.

    Attributes:
        part: what they are computed from.
        figures: (that part of the generated images, that of the reference, settings) -> figures by name.
        fewest: images that it needs, by the settings.
        settings: names of those that decide them.
        compares: whether it needs a reference.
    """

    part: str
    figures: Callable[[Any, Any, MetricSettings], dict[str, float]]
    fewest: Callable[[MetricSettings], int] = lambda settings: 2
    settings: tuple[str, ...] = ()
    compares: bool = True


def _kid(generated: Rows, reference: Rows, settings: MetricSettings) -> dict[str, float]:
    mean, deviation = kernel_distance(
        generated.values,
        reference.values,
        subsets=settings.kid_subsets,
        subset_size=settings.kid_subset_size,
        seed=settings.seed,
    )
    return {"kid": mean, "kid_std": deviation}


def _inception_score(generated: Rows, reference: None, settings: MetricSettings) -> dict[str, float]:
    mean, deviation = inception_score(generated.values, splits=settings.is_splits, seed=settings.seed)
    return {"is": mean, "is_std": deviation}


def _precision_recall(generated: Rows, reference: Rows, settings: MetricSettings) -> dict[str, float]:
    precision, recall = precision_recall(generated.values, reference.values, neighbours=settings.neighbours)
    return {"precision": precision, "recall": recall}


_KID = ("kid_subsets", "kid_subset_size", "seed")
METRICS: dict[MetricName, Metric] = {
    "fid": Metric(MOMENTS, lambda generated, reference, _: {"fid": frechet_distance(reference, generated)}),
    "sfid": Metric(SPATIAL_MOMENTS, lambda generated, reference, _: {"sfid": frechet_distance(reference, generated)}),
    "kid": Metric(FEATURES, _kid, lambda chosen: chosen.kid_subset_size, _KID),
    "is": Metric(LOGITS, _inception_score, lambda chosen: chosen.is_splits, ("is_splits", "seed"), compares=False),
    "precision": Metric(FEATURES, _precision_recall, lambda chosen: chosen.neighbours + 1, ("neighbours",)),
    "recall": Metric(FEATURES, _precision_recall, lambda chosen: chosen.neighbours + 1, ("neighbours",)),
}
"""How each metric is computed."""


def metric_of(name: str) -> Metric:
    """How a metric is computed.

    Raises:
        ConfigError: there is none of that name.
    """
    known: Mapping[str, Metric] = {**METRICS}
    if name not in known:
        raise ConfigError(f"A metric must be one of {', '.join(known)}, received {name!r}; correct it.")
    return known[name]


def check_count(
    metrics: Collection[str], settings: MetricSettings, count: int, *, side: str = "images", remedy: str = "bring more"
) -> None:
    """Whether so many images are enough for these metrics, before hours are spent on measuring them.

    Args:
        metrics: of ``METRICS``.
        settings: of the metrics.
        count: images there are, or will be.
        side: what they are called.
        remedy: what helps, in the words of the command.

    Raises:
        DataError: they are too few.
    """
    for name in metrics:
        needed = metric_of(name).fewest(settings)
        if count < needed:
            raise DataError(f"The metric {name} needs at least {needed} {side}, got {count}; {remedy}.")


def check_reference(metrics: Collection[str], extractor: str, reference: ImageStatistics | None) -> None:
    """Whether these metrics can be computed against a reference.

    Raises:
        DataError: it lacks a part, or was measured with another extractor.
    """
    for name in metrics:
        metric = metric_of(name)
        if metric.compares and (reference is None or metric.part not in reference.parts):
            held = "there is none" if reference is None else f"it holds {', '.join(sorted(reference.parts))}"
            raise DataError(f"The metric {name} needs {metric.part} of the reference, and {held}.")
    if reference is not None and reference.extractor != extractor:
        raise DataError(
            f"One extractor must have made the statistics of both sides, and the reference is of {reference.extractor}"
            f" and the images of {extractor}; measure the reference again."
        )


def compute(
    metrics: Collection[str],
    generated: ImageStatistics,
    reference: ImageStatistics | None,
    settings: MetricSettings = DEFAULT_SETTINGS,
) -> dict[str, float]:
    """The figures by name: those of ``metrics``; ``kid_std`` and ``is_std`` come with theirs, precision with recall.

    Args:
        metrics: of ``METRICS``.
        generated: what is judged.
        reference: what it is compared with; the inception score needs none.
        settings: see there.

    Raises:
        DataError: the sides were measured with different extractors, have too few images, or one lacks a part.
    """
    check_reference(metrics, generated.extractor, reference)

    figures: dict[str, float] = {}
    for name in metrics:
        metric = metric_of(name)
        if name not in figures:  # recall comes with precision
            compared = reference.parts[metric.part] if reference is not None and metric.compares else None
            figures |= metric.figures(generated.parts[metric.part], compared, settings)
    for name, figure in figures.items():
        if not math.isfinite(figure):
            raise DataError(f"The figure {name} must be a number, and is {figure}; measure the reference again.")
    return figures
