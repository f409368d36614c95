"""Distances between two sets of images, as features: FID, KID, inception score, precision and recall.

Every figure is what torch-fidelity computes from the same features with the same settings, its seed of the random
subsets included; FID and KID are torchmetrics' code. Nothing here knows images or extractors.

To the Frechet distance (FID; Heusel et al., arXiv 1706.08500) a set of images enters only through the moments of its
features. Moments are sums, so those of parts of a set are added to give those of the whole: over batches, over
workers, over several generations.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor, nn

from eqm_dist import rng
from eqm_dist.errors import DataError
from eqm_dist.hidden import hidden
from eqm_dist.metric_settings import SEED
from eqm_dist.precision import products

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

FEWEST_HALVED = 4
"""Images of which two halves have a covariance each."""
POINTS_AT_ONCE, OTHERS_AT_ONCE = 2_500, 10_000
"""Points whose distances to all others are held at once, 0.5 GB for 50,000 others, and those of one multiplication."""


@dataclass(frozen=True)
class FeatureMoments:
    """Count [], sum [F] and sum of outer products [F, F] of features, all float64."""

    count: Tensor
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """The moments of features [n, F]."""
        features = features.double()
        return cls(features.new_full((), len(features)), features.sum(0), features.T @ features)

    @classmethod
    def of_gaussian(cls, mean: Tensor, covariance: Tensor, count: int = 2) -> Self:
        """The moments of ``count`` features whose sample mean [F] and covariance [F, F] (over n - 1) are these."""
        mean, covariance = mean.double(), covariance.double()
        outer = (count - 1) * covariance + count * mean.outer(mean)
        return cls(torch.tensor(float(count)).to(mean), count * mean, outer)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return type(self)(self.count.to(device), self.total.to(device), self.outer.to(device))

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
        with products("fp32"):
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
        side = "the reference" if reference.count < generated.count else "the generated images"
        raise DataError(f"The FID needs at least two images on either side, and {side} are {fewest}; bring more.")
    if not all(part.isfinite().all() for side in (reference, generated) for part in vars(side).values()):
        raise DataError("The FID needs finite features, and some are infinite or none; correct the extractor.")
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


def kernel_distance(
    generated: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> tuple[float, float]:
    """KID: the unbiased squared MMD of the kernel (x.y / F + 1)^3, over random subsets (arXiv 1801.01401).

    Args:
        generated: features [N, F].
        reference: features [M, F].
        subsets: number of subsets, each drawn without replacement from either side.
        subset_size: features of a subset.
        seed: of numpy's RandomState, which draws the subsets as torch-fidelity does.

    Returns:
        Mean and standard deviation over the subsets. Computed in float64.

    Raises:
        DataError: a side is smaller than a subset.
    """
    fewest = min(len(generated), len(reference))
    if fewest < subset_size:
        raise DataError(
            f"The KID draws subsets of {subset_size} images, and a side has {fewest}; bring more images, or lower"
            " --kid-subset-size."
        )
    with hidden("torchvision", "torch_fidelity"):
        from torchmetrics.image.kid import poly_mmd

    generated, reference = generated.double(), reference.double()
    draw = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        chosen, others = (draw.choice(len(side), subset_size, replace=False) for side in (generated, reference))
        distances.append(poly_mmd(reference[others], generated[chosen]).item())
    return float(np.mean(distances)), float(np.std(distances))


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = SEED) -> tuple[float, float]:
    """IS: exp E[KL(p(y|x) | p(y))], over parts of the shuffled images (arXiv 1606.03498).

    Args:
        logits: class scores [N, K].
        splits: number of parts.
        seed: of numpy's RandomState, which shuffles as torch-fidelity does.

    Returns:
        Mean and standard deviation over the parts. Computed in float64.

    Raises:
        DataError: fewer images than parts.
    """
    if len(logits) < splits:
        raise DataError(f"The inception score needs at least {splits} images, got {len(logits)}; bring more.")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    shuffled = logits[order].double()
    bounds = [split * len(logits) // splits for split in range(splits + 1)]
    scores = []
    for start, stop in pairwise(bounds):
        log_p = shuffled[start:stop].log_softmax(1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision is the fraction of generated features in the manifold of the reference: no farther from one of its
    features than that one's k-th nearest neighbour. Recall is the same with the sides exchanged.

    Args:
        generated: [N, F].
        reference: [M, F]; the distances are computed in the features' own precision, as torch-fidelity does.
        neighbours: k.

    Raises:
        DataError: a side has no k-th neighbour.
    """
    fewest = min(len(generated), len(reference))
    if fewest <= neighbours:
        raise DataError(f"Precision and recall need at least {neighbours + 1} images on either side, got {fewest}.")
    return _within(generated, reference, neighbours), _within(reference, generated, neighbours)


def _within(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Fraction of the points [N, F] in the manifold around features [M, F]."""
    nearest = [block.kthvalue(neighbours + 1).values for block in _distances(manifold, manifold)]  # itself is one
    radii = torch.cat(nearest)
    inside = [(block <= radii).any(1) for block in _distances(points, manifold)]
    return torch.cat(inside).double().mean().item()


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances [n, M] of the points [N, F] to all others [M, F], block by block."""
    for block in points.split(POINTS_AT_ONCE):
        yield torch.cat([torch.cdist(block, part) for part in others.split(OTHERS_AT_ONCE)], dim=1)


def half_split_fid(
    features: Tensor,
    seed: int,
    splits: int = 16,
    *,
    positions: Tensor | None = None,
    count: int | None = None,
    all_reduce_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """FID between two random halves of the same images' features, the yardstick of a generated set's FID.

    It is what sampling alone costs: the FID of a perfect generator is not zero but falls with the number of images.
    One split is a noisy measure (a third of its value on the digits), so this is the mean over several.

    Of images that are divided over workers each gives its own, and all get the whole's: moments of halves are sums too.

    Args:
        features: [n, F]; on the device of the computation. At least four over all workers.
        seed: seed of the splits, drawn from ``Stream.SPLIT``.
        splits: number of splits.
        positions: [n] int64 on the CPU, where each of these lies among all; None if they are all, in their order.
        count: how many there are in all; with ``positions``.
        all_reduce_sum: gives the sum of a tensor over workers.

    Raises:
        DataError: fewer than four images.
    """
    features = features.double()
    count = len(features) if count is None else count
    rows = torch.arange(count)  # of each image here, -1 where it is another worker's
    if positions is not None:
        rows = torch.full((count,), -1).scatter(0, positions, torch.arange(len(features)))
    keys = rng.uniform(seed, rng.Stream.SPLIT, torch.arange(count), (splits,), dtype=torch.float64)
    identity = _Features(features.shape[1])
    distances = []
    for order in keys.argsort(dim=0).T:
        halves = (rows[half] for half in order.tensor_split(2))
        own = (features[half[half >= 0].to(features.device)] for half in halves)
        moments = (feature_moments(identity, [half], features.device).merged(all_reduce_sum) for half in own)
        distances.append(frechet_distance(*moments))
    return sum(distances) / splits


class _Features(nn.Module):
    """An extractor for what are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _metric(extractor: nn.Module, device: torch.device | str) -> "FrechetInceptionDistance":
    # Seconds to import, with scipy and matplotlib: no run waits for it before its first step.
    with hidden("torchvision", "torch_fidelity"):
        from torchmetrics.image.fid import FrechetInceptionDistance

    # Without sync: workers are merged by us, once, and torchmetrics' own way hangs when they hold unequal parts.
    return FrechetInceptionDistance(feature=extractor, sync_on_compute=False).to(device)
