"""What is measured and drawn while a run trains: FID against the training images, its yardstick, a grid of samples."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eqm_dist.core.objective import ConditionalField
from eqm_dist.core.samplers import Sampler
from eqm_dist.data.loader import ShardReader
from eqm_dist.data.order import rank_range
from eqm_dist.data.storage import storage_errors
from eqm_dist.evaluate.generate import balanced_labels, generate
from eqm_dist.evaluate.grid import sample_grid
from eqm_dist.evaluate.metrics import FeatureMoments, feature_moments, frechet_distance, half_split_fid
from eqm_dist.models.autoencoder import Autoencoder, moments_to_latents


@dataclass(frozen=True)
class Evaluator:
    """Generates class-balanced images from given weights, on all ranks together, and measures them.

    Attributes:
        model: receives the weights; on the device of the work.
        field: the field to descend, built on ``model``.
        sampler, evaluations: how to descend it.
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
    field: ConditionalField
    sampler: Sampler[Any]
    evaluations: int
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
        """Metrics ``eval/...``, and on rank 0 the picture that was written. A collective."""
        self.model.load_state_dict(weights)
        images = self._generate()
        moments = feature_moments(self.extractor, images.split(self.batch), self._device)
        generated = moments.merged(self.all_reduce_sum)
        metrics = {
            "eval/fid": frechet_distance(self._reference, generated),
            "eval/fid_yardstick": self._yardstick,
            "eval/samples": float(self.samples),
            "eval/nfe": float(self.evaluations),
        }
        grid = self._first_images(images)
        if self.rank:
            return metrics, []
        path = self.directory / f"samples_step{step:08d}.png"
        picture = sample_grid(grid, balanced_labels(torch.arange(len(grid)), self.reader.num_classes), self.columns)
        with storage_errors("write", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        return metrics, [path]

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _generate(self) -> Tensor:
        """This rank's part of the images [0, samples)."""
        indices = torch.arange(*rank_range(0, self.samples, self.rank, self.world), device=self._device)
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
        ).images

    def _first_images(self, images: Tensor) -> Tensor:
        """The first images of all ranks' together, enough for the grid, on every rank."""
        wanted = min(self.samples, self.columns * self.reader.num_classes)
        start, stop = rank_range(0, self.samples, self.rank, self.world)
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
