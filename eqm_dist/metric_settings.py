"""The metrics by their names, and what decides their figures besides the images. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Literal, get_args

MetricName = Literal["fid", "sfid", "kid", "is", "precision", "recall"]
METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)

SEED = 2020
"""torch-fidelity's seed of subsets and splits."""


@dataclass(frozen=True)
class MetricSettings:
    """What decides a figure besides the images; the defaults are torch-fidelity's.

    Attributes:
        kid_subsets, kid_subset_size: of the KID.
        is_splits: parts of the inception score.
        neighbours: k of precision and recall.
        seed: of subsets and shuffles.
    """

    kid_subsets: int = 100
    kid_subset_size: int = 1000
    is_splits: int = 10
    neighbours: int = 3
    seed: int = SEED


DEFAULT_SETTINGS = MetricSettings()
