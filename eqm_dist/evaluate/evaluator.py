"""What is measured and drawn while a run trains: FID against the training images, its yardstick, a grid of samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eqm_dist.core.guidance import TimedField
from eqm_dist.core.samplers import Sampler
from eqm_dist.core.sampling import GradientNormStop
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.order import rank_range
from eqm_dist.data.storage import storage_errors
from eqm_dist.evaluate.figures import nfe_histogram
from eqm_dist.evaluate.generate import Generated, balanced_labels, generate, warn_of_failures
from eqm_dist.evaluate.grid import sample_grid
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance, half_split_fid
from eqm_dist.models.autoencoder import Autoencoder, moments_to_latents


@dataclass(frozen=True)
class Evaluator:
    """Generates class-balanced images from given weights, on all ranks together, and measures them.

    Attributes:
        model: receives the weights; on the device of the work.
        field: the field to follow, built on ``model``.
        sampler, evaluations, stop: how to follow it.
        autoencoder: decodes latents.
        reader: the real images, as the shards of the training set.
        extractor: images -> features, on the same device.
        samples: images to generate in all.
        batch: images generated at once on a rank.
        columns: images per class in the grid.
        seed: seed of the start noise and of the split of the yardstick.
        directory: where grids go.
        rank, world: this worker's number, and how many there are.
        all_reduce_sum: sums a tensor over ranks.
    """

    model: nn.Module
    field: TimedField
    sampler: Sampler
    evaluations: int
    stop: GradientNormStop | None
    autoencoder: Autoencoder
    reader: ShardReader
    extractor: nn.Module
    samples: int
    batch: int
    columns: int
    seed: int
    directory: Path
    rank: int
    world: int
    all_reduce_sum: Callable[[Tensor], Tensor]

    def __call__(self, weights: Mapping[str, Tensor], step: int) -> tuple[dict[str, float], list[Path]]:
        """Metrics ``eval/...``, and on rank 0 the pictures that were written. A collective."""
        self.model.load_state_dict(weights)
        generated = self._generate()
        moments = feature_moments(self.extractor, generated.images.split(self.batch), self._device)
        nfe, cut_off, not_finite = self._of_all_ranks(generated)
        metrics = {
            "eval/fid": frechet_distance(self._reference, moments.merged(self.all_reduce_sum)),
            "eval/fid_yardstick": self._yardstick,
            "eval/samples": float(self.samples),
            "eval/nfe": nfe.double().mean().item(),
        }
        grid = self._first_images(generated.images)
        if self.rank:
            return metrics, []
        warn_of_failures(self.samples, cut_off, not_finite, self.evaluations)
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
            labels=balanced_labels(indices, self.reader.num_classes),
            latent_shape=self.reader.latent_shape,
            sampler=self.sampler,
            evaluations=self.evaluations,
            seed=self.seed,
            decode=self.autoencoder.decode,
            batch=self.batch,
            stop=self.stop,
        )

    def _of_all_ranks(self, generated: Generated) -> tuple[Tensor, int, int]:
        """The counts of evaluations [samples], how many samples were cut off, and how many are not finite."""
        figures = torch.zeros((3, self.samples), dtype=torch.int64, device=self._device)
        own = torch.stack([generated.nfe, (~generated.complete).long(), (~generated.finite).long()])
        figures[:, slice(*self._part)] = own
        nfe, cut_off, not_finite = self.all_reduce_sum(figures).cpu()
        return nfe, int(cut_off.sum()), int(not_finite.sum())

    def _draw(self, grid: Tensor, nfe: Tensor, step: int) -> list[Path]:
        """The grid of samples and, where samples took different numbers of evaluations, the histogram of these."""
        samples, histogram = (self.directory / f"{name}_step{step:08d}.png" for name in ("samples", "nfe"))
        labels = balanced_labels(torch.arange(len(grid)), self.reader.num_classes)
        with storage_errors("write", samples):
            samples.parent.mkdir(parents=True, exist_ok=True)
            sample_grid(grid, labels, self.columns).save(samples)
            if nfe.min() == nfe.max():
                return [samples]
            nfe_histogram(nfe).savefig(histogram, dpi=150)
        return [samples, histogram]

    def _first_images(self, images: Tensor) -> Tensor:
        """The first images of all ranks' together, enough for the grid, on every rank."""
        wanted = min(self.samples, self.columns * self.reader.num_classes)
        start, stop = self._part
        first = torch.zeros((wanted, *images.shape[1:]), dtype=torch.int32, device=images.device)
        stop = max(start, min(stop, wanted))
        first[start:stop] = images[: stop - start].int()
        return self.all_reduce_sum(first).to(torch.uint8).cpu()

    def real_images(self, start: int, stop: int) -> Iterator[Tensor]:
        """The training images [start, stop) as the autoencoder gives them back from the means, batch by batch."""
        for first in range(start, stop, self.batch):
            moments, _ = self.reader.read(np.arange(first, min(stop, first + self.batch)))
            mean = moments[:, 0].to(self._device)
            nothing = torch.zeros_like(mean.chunk(2, dim=1)[0])
            latents = moments_to_latents(mean, nothing, self.autoencoder.latent_scale, self.autoencoder.latent_shift)
            yield self.autoencoder.decode(latents)

    @cached_property
    def _reference(self) -> FeatureMoments:
        part = rank_range(0, self.reader.manifest.num_samples, self.rank, self.world)
        return feature_moments(self.extractor, self.real_images(*part), self._device).merged(self.all_reduce_sum)

    @cached_property
    def _yardstick(self) -> float:
        if self.rank:  # only rank 0's figures are recorded
            return float("nan")
        images = torch.cat(list(self.real_images(0, self.reader.manifest.num_samples)))
        return half_split_fid(images, self.extractor, self.seed)
