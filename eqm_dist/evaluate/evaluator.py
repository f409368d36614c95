"""What is measured and drawn while a run trains: FID against the training images, its yardstick, a grid of samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from eqm_dist.core.guidance import TimedField
from eqm_dist.core.sampling import SamplingMethod
from eqm_dist.data.order import rank_range
from eqm_dist.evaluate.figures import nfe_histogram
from eqm_dist.evaluate.generate import Generated, generate, warn_of_failures
from eqm_dist.evaluate.grid import sample_grid
from eqm_dist.evaluate.images import TrainingImages
from eqm_dist.evaluate.labels import balanced_labels
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance, half_split_fid
from eqm_dist.evaluate.references import cached_statistics
from eqm_dist.evaluate.statistics import FEATURES, MOMENTS, ImageStatistics, Rows, compute, image_statistics, parts_of
from eqm_dist.models.autoencoder import Autoencoder
from eqm_dist.run_directory import picture_name
from eqm_dist.storage.files import storage_errors

NARROW = 512
"""Features up to which the yardstick is the mean of several halvings; each of wider ones takes a minute."""


@dataclass(frozen=True)
class Evaluator:
    """Generates class-balanced images from given weights, on all ranks together, and measures them.

    Attributes:
        model: receives the weights; on the device of the work.
        field: the field to follow, built on ``model``.
        method: how to follow it.
        autoencoder: decodes latents.
        real: the real images.
        num_classes: labels are 0 .. num_classes - 1.
        latent_shape: (C, h, w).
        extractor: images -> features, on the same device.
        metrics: of ``MetricName``, the FID among them; others need ``world`` to be 1.
        samples: images to generate in all.
        batch: images generated at once on a rank.
        columns: images per class in the grid.
        seed: seed of the start noise and of the split of the yardstick.
        directory: where grids go.
        cache: directory that keeps the statistics of the real images for other processes; None keeps none.
        rank, world: this worker's number, and how many there are.
        all_reduce_sum: sums a tensor over ranks.
        precision: in which the field is computed, for the record.
    """

    model: nn.Module
    field: TimedField
    method: SamplingMethod
    autoencoder: Autoencoder
    real: TrainingImages
    num_classes: int
    latent_shape: tuple[int, int, int]
    extractor: nn.Module
    metrics: Sequence[str]
    samples: int
    batch: int
    columns: int
    seed: int
    directory: Path
    cache: str | None
    rank: int
    world: int
    all_reduce_sum: Callable[[Tensor], Tensor]
    precision: str

    def __call__(self, weights: Mapping[str, Tensor], step: int) -> tuple[dict[str, float], list[Path]]:
        """Metrics ``eval/...``, and on rank 0 the pictures that were written. A collective."""
        self.model.load_state_dict(weights)
        generated = self._generate()
        nfe, cut_off, not_finite = self._of_all_ranks(generated)
        metrics = {
            **{f"eval/{name}": value for name, value in self._measure(generated.images).items()},
            "eval/fid_yardstick": self._yardstick,
            "eval/samples": float(self.samples),
            "eval/nfe": nfe.double().mean().item(),
        }
        grid = self._first_images(generated.images)
        if self.rank:
            return metrics, []
        warn_of_failures(self.samples, cut_off, not_finite, self.method.nfe)
        return metrics, self._draw(grid, nfe, step)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _part(self) -> tuple[int, int]:
        """This rank's part of the images [0, samples)."""
        return rank_range(0, self.samples, self.rank, self.world)

    def _generate(self) -> Generated:
        indices = torch.arange(*self._part, device=self._device)
        return generate(
            self.field,
            indices=indices,
            labels=balanced_labels(indices, self.num_classes),
            latent_shape=self.latent_shape,
            method=self.method,
            seed=self.seed,
            decode=self.autoencoder.decode,
            batch=self.batch,
        )

    def _of_all_ranks(self, generated: Generated) -> tuple[Tensor, int, int]:
        """The NFE of each sample [samples], how many samples were cut off, and how many are not finite."""
        figures = torch.zeros((3, self.samples), dtype=torch.int64, device=self._device)
        own = torch.stack([generated.nfe, (~generated.complete).long(), (~generated.finite).long()])
        figures[:, slice(*self._part)] = own
        nfe, cut_off, not_finite = self.all_reduce_sum(figures).cpu()
        return nfe, int(cut_off.sum()), int(not_finite.sum())

    def _draw(self, grid: Tensor, nfe: Tensor, step: int) -> list[Path]:
        """The grid of samples and, where samples differ in their NFE, the histogram of it."""
        samples, histogram = (self.directory / picture_name(kind, step) for kind in ("samples", "nfe"))
        labels = balanced_labels(torch.arange(len(grid)), self.num_classes)
        with storage_errors("write", samples):
            samples.parent.mkdir(parents=True, exist_ok=True)
            sample_grid(grid, labels, self.columns).save(samples)
            if nfe.min() == nfe.max():
                return [samples]
            nfe_histogram(nfe).savefig(histogram, dpi=150)
        return [samples, histogram]

    def _first_images(self, images: Tensor) -> Tensor:
        """The first images of all ranks' together, enough for the grid, on every rank."""
        wanted = min(self.samples, self.columns * self.num_classes)
        start, stop = self._part
        first = torch.zeros((wanted, *images.shape[1:]), dtype=torch.int32, device=images.device)
        stop = max(start, min(stop, wanted))
        first[start:stop] = images[: stop - start].int()
        return self.all_reduce_sum(first).to(torch.uint8).cpu()

    def _measure(self, images: Tensor) -> dict[str, float]:
        """The metrics by name. The FID needs sums, which add over ranks; others are for one process alone."""
        if self.world > 1:
            moments = feature_moments(self.extractor, images.split(self.batch), self._device)
            return {"fid": frechet_distance(self._real_moments, moments.merged(self.all_reduce_sum))}
        batches = images.split(self.batch)
        own = image_statistics(self.extractor, batches, parts=parts_of(self.metrics), device=self._device)
        return compute(self.metrics, own, self._reference)

    @cached_property
    def _reference(self) -> ImageStatistics:
        """Of this rank's part of the real images."""
        start, stop = rank_range(0, len(self.real), self.rank, self.world)
        parts = {FEATURES, *(parts_of(self.metrics) if self.world == 1 else {MOMENTS})}
        batches = self._in_step(self.real.read(start, stop, self.batch))
        measure = partial(image_statistics, self.extractor, batches, parts=parts, first=start, device=self._device)
        return cached_statistics(self.real, self.extractor, parts, measure, self.cache) if self.cache else measure()

    def _in_step(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Batches of real images, all ranks at the same one, so that none waits in a collective for longer than that.

        Decoding all of a large set takes longer than a collective may.
        """
        largest = -(-len(self.real) // self.world)
        for _ in range(0, largest, self.batch):
            yield from islice(batches, 1)
            if self.world > 1:
                self.all_reduce_sum(torch.zeros(1, device=self._device)).item()

    @cached_property
    def _real_moments(self) -> FeatureMoments:
        moments = self._reference.parts[MOMENTS]
        assert isinstance(moments, FeatureMoments)
        return moments.to(self._device).merged(self.all_reduce_sum)

    @cached_property
    def _yardstick(self) -> float:
        """On every rank, for they would only wait for the one that computes it."""
        rows = self._reference.parts[FEATURES]
        assert isinstance(rows, Rows)
        positions, count = rows.among(len(self.real))
        return half_split_fid(
            rows.values[positions >= 0].to(self._device),
            self.seed,
            16 if rows.values.shape[1] <= NARROW else 1,
            positions=positions[positions >= 0],
            count=count,
            all_reduce_sum=self.all_reduce_sum,
        )
