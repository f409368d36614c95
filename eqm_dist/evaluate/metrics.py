"""The Frechet distance between two sets of images (FID; Heusel et al., arXiv 1706.08500), computed by torchmetrics.

A set of images enters only through the moments of its features. Moments are sums, so those of parts of a set are
added to give those of the whole: over batches, over workers, over several generations.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from eqm_dist import rng
from eqm_dist.errors import DataError
from eqm_dist.hidden import hidden

with hidden("torchvision", "torch_fidelity"):
    from torchmetrics.image.fid import FrechetInceptionDistance


@dataclass(frozen=True)
class FeatureMoments:
    """Count [], sum [F] and sum of outer products [F, F] of features, all float64."""

    count: Tensor
    total: Tensor
    outer: Tensor

    def __add__(self, other: Self) -> Self:
        return type(self)(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def merged(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> Self:
        """The moments of all workers' images together; ``all_reduce_sum`` gives the sum of a tensor over workers."""
        parts = (self.count, self.total, self.outer)
        summed = all_reduce_sum(torch.cat([part.flatten() for part in parts]))
        pieces = summed.split([part.numel() for part in parts])
        return type(self)(*(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)))


def feature_moments(
    extractor: nn.Module, batches: Iterable[Tensor], device: torch.device | str = "cpu"
) -> FeatureMoments:
    """Moments of the features of all images.

    Args:
        extractor: images [B, H, W, C] uint8 -> features [B, F], on ``device``; ``num_features`` is F.
        batches: images [B, H, W, C] uint8, on any device; a worker without images gives none.
        device: where to compute.
    """
    metric = _metric(extractor, device)
    for images in batches:
        metric.update(images.to(device), real=True)
    count = metric.real_features_num_samples.double()
    return FeatureMoments(count, metric.real_features_sum, metric.real_features_cov_sum)


def frechet_distance(reference: FeatureMoments, generated: FeatureMoments) -> float:
    """FID of the generated images against the reference: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), S over n - 1.

    Raises:
        DataError: fewer than two images on a side.
    """
    fewest = int(min(reference.count, generated.count))
    if fewest < 2:
        raise DataError(f"The FID needs at least two images on either side, got {fewest}; generate more.")
    metric = _metric(_Features(len(reference.total)), reference.total.device)
    # torchmetrics insists on having seen a batch before it computes, so it sees one of no images.
    metric.update(reference.total.new_zeros(0, len(reference.total)), real=True)
    metric.merge_state(
        {
            "real_features_num_samples": reference.count,
            "real_features_sum": reference.total,
            "real_features_cov_sum": reference.outer,
            "fake_features_num_samples": generated.count,
            "fake_features_sum": generated.total,
            "fake_features_cov_sum": generated.outer,
        }
    )
    return metric.compute().item()


def half_split_fid(images: Tensor, extractor: nn.Module, seed: int, splits: int = 16) -> float:
    """FID between two random halves of the same images, the yardstick of a generated set's FID.

    It is what sampling alone costs: the FID of a perfect generator is not zero but falls with the number of images.
    One split is a noisy measure (a third of its value on the digits), so this is the mean over several.

    Args:
        images: [N, H, W, C] uint8, N >= 4; the device of the computation.
        extractor: see ``feature_moments``.
        seed: seed of the splits, drawn from ``Stream.SPLIT``.
        splits: number of splits.

    Raises:
        DataError: fewer than four images.
    """
    with torch.no_grad():
        features = torch.cat([extractor(batch).double() for batch in images.split(256)])
    keys = rng.uniform(seed, rng.Stream.SPLIT, torch.arange(len(images)), (splits,), dtype=torch.float64)
    identity = _Features(features.shape[1])
    distances = []
    for order in keys.argsort(dim=0).T.to(features.device):
        halves = (features[half] for half in order.tensor_split(2))
        first, second = (feature_moments(identity, [half], features.device) for half in halves)
        distances.append(frechet_distance(first, second))
    return sum(distances) / splits


class _Features(nn.Module):
    """An extractor for what are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(extractor: nn.Module, device: torch.device | str) -> FrechetInceptionDistance:
    # Without sync: workers are merged by us, once, and torchmetrics' own way hangs when they hold unequal parts.
    return FrechetInceptionDistance(feature=extractor, sync_on_compute=False).to(device)
