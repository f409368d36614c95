"""Many samplers of one model, measured by all actors of a cluster: the trials of ``tuning/sweep_stepsize.py``.

Each actor loads the model and the extractor once. Samplers that differ in their NFE alone, and step without
looking at how many are to come, are points of one trajectory: one descent measures them all.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from eqm_dist.build import build_sampler
from eqm_dist.config import DESCENTS, SamplerConfig
from eqm_dist.errors import EqmDistError
from eqm_dist.evaluate.generate import Generated, generate_along
from eqm_dist.evaluate.labels import labels_of
from eqm_dist.evaluate.statistics import MOMENTS, ImageStatistics, image_statistics
from eqm_dist.launch.evaluation import loaded_extractor
from eqm_dist.pretrained import Pretrained

UNIT = 256
"""Most images of a task, which is what a kill can cost an actor."""


@dataclass(frozen=True)
class Descent:
    """A task: some images of samplers that are points of one trajectory.

    Attributes:
        trials: the samplers' names.
        sampler: keys of ``sampler``, without ``nfe``.
        nfe: of each of the samplers, rising.
        seed: image i depends on (weights, sampler, seed, i) alone: all samplers start from the same noise.
        start, stop: the images [start, stop).
    """

    trials: tuple[str, ...]
    sampler: dict[str, Any]
    nfe: tuple[int, ...]
    seed: int
    start: int
    stop: int


@dataclass(frozen=True)
class Measured:
    """What one sampler gave for the images of a task.

    Attributes:
        statistics: moments of the features.
        nfe: summed over images.
        diverged: images whose latents are not numbers.
        seconds: what the task took, shared evenly between its samplers.
    """

    statistics: ImageStatistics
    nfe: int
    diverged: int
    seconds: float

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.statistics + other.statistics,
            self.nfe + other.nfe,
            self.diverged + other.diverged,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class MeasureDescent:
    """What an actor does. Pickles, weights included.

    Attributes:
        model: what draws the images.
        labels: as ``evaluate.labels`` takes them.
        extractor, weights: as ``load_extractor`` takes them.
        batch: images drawn at once.
    """

    model: Pretrained
    labels: str
    extractor: str
    weights: str | None
    batch: int

    def __call__(self, task: Descent, device: torch.device) -> list[Measured] | str:
        """What each sampler gave, or why there is nothing."""
        self.model.model  # noqa: B018 (made once, here, and handed on to every sampler)
        model = self.model.with_sampler(**task.sampler, nfe=task.nfe[-1])
        started = time.perf_counter()
        sums: list[Measured | None] = [None] * len(task.nfe)
        try:
            for first in range(task.start, task.stop, self.batch):
                indices = torch.arange(first, min(task.stop, first + self.batch))
                for at, generated in enumerate(self._generate(model, indices, task, device)):
                    part = self._measure(generated, first, device)
                    before = sums[at]
                    sums[at] = part if before is None else before + part
        except EqmDistError as error:
            return str(error)
        except Exception as error:  # one trial's failure is not the sweep's
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        share = (time.perf_counter() - started) / len(sums)
        return [replace(measured, seconds=share) for measured in sums if measured is not None]

    def _generate(
        self, model: Pretrained, indices: torch.Tensor, task: Descent, device: torch.device
    ) -> Iterable[Generated]:
        classes, sampler = model.config.data.num_classes, model.config.sampler
        labels = labels_of(self.labels, indices, classes, task.seed)
        if len(task.nfe) == 1:
            return [model.generate(indices, labels, task.seed, self.batch, device, many=True)]
        return generate_along(
            model.field(device, many=True),
            indices=indices.to(device),
            labels=labels.to(device),
            latent_shape=model.config.data.latent_shape,
            sampler=build_sampler(sampler),
            nfe=task.nfe,
            seed=task.seed,
            decode=model.autoencoder.decode,
        )

    def _measure(self, generated: Generated, first: int, device: torch.device) -> Measured:
        extractor = loaded_extractor(self.extractor, self.weights, device)
        statistics = image_statistics(extractor, [generated.images], parts=[MOMENTS], first=first, device=device)
        diverged = int((~generated.finite).sum())
        return Measured(statistics, int(generated.nfe.sum()), diverged, 0.0)


def shares_descent(sampler: SamplerConfig) -> bool:
    """Whether each step of a sampler is the same, whatever the NFE to come."""
    stops = sampler.stop_norm is not None or sampler.stop_ratio is not None
    looks_ahead = sampler.step_policy == "decay" or sampler.guidance_interval is not None
    return sampler.name in DESCENTS and not stops and not looks_ahead


def units(samples: int, known: int) -> Iterator[tuple[int, int]]:
    """The images from ``known`` to ``samples`` in parts."""
    for start in range(known, samples, UNIT):
        yield start, min(samples, start + UNIT)
