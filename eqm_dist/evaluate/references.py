"""Statistics on disk: saved by name, cached by content, or published by others. Nothing is unpickled.

A file of ours is a safetensors file with every part of ``ImageStatistics``. The cache names its files after everything
that decides their content, so one that is old is never found.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from eqm_dist.data.bounds import MAX_STATISTICS_BYTES
from eqm_dist.data.npy import read_array
from eqm_dist.errors import DataError
from eqm_dist.evaluate.images import ARCHIVE_ERRORS, Images
from eqm_dist.evaluate.metrics import FeatureMoments
from eqm_dist.evaluate.statistics import (
    MOMENTS,
    MOST_ROWS,
    PARTS,
    SPATIAL_MOMENTS,
    ImageStatistics,
    Rows,
    extractor_id,
    name_of,
)
from eqm_dist.storage.files import atomic_write, make_writable, storage_errors
from eqm_dist.storage.location import local_path

FORMAT = "eqm-dist image statistics 1"
CACHE_DIR = "~/.cache/eqm-dist/statistics"
PUBLISHED = {MOMENTS: ("mu", "sigma"), SPATIAL_MOMENTS: ("mu_s", "sigma_s")}
"""Names of mean and covariance in the .npz files of pytorch-fid and, with the spatial ones, of ADM."""


def save_statistics(path: Path, statistics: ImageStatistics, source: str) -> None:
    """Write statistics; ``source`` says what the images were.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors = {
        f"{name}.{field}": tensor.contiguous()
        for name, part in statistics.parts.items()
        for field, tensor in vars(part).items()
    }
    metadata = {"format": FORMAT, "extractor": statistics.extractor, "source": source, "count": str(statistics.count)}
    with storage_errors("create", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors, metadata))


def load_statistics(path: Path) -> tuple[ImageStatistics, str]:
    """What ``save_statistics`` wrote, and the source.

    Raises:
        DataError: no such file, or another kind of file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is {metadata.get('format')}, not {FORMAT}")
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts: dict[str, Any] = {}
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            kind = FeatureMoments if name.endswith("moments") else Rows
            parts[name] = kind(**{field.name: tensors[f"{name}.{field.name}"] for field in fields(kind)})
            _check_part(name, parts[name])
        count = None if metadata["count"] == "None" else int(metadata["count"])
        return ImageStatistics(metadata["extractor"], count, parts), metadata["source"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"Saved statistics must be a file that pipelines/evaluate.py wrote, and {path} cannot be read as one"
            f" ({' '.join(str(error).split())[:200]}); compute them again."
        ) from error


def _check_part(name: str, part: FeatureMoments | Rows) -> None:
    """Whether a part is what ``save_statistics`` writes.

    Raises:
        ValueError: it is not.
    """
    if isinstance(part, FeatureMoments):
        fits = part.count.ndim == 0 and part.total.ndim == 1 and part.outer.shape == 2 * part.total.shape
        numbers = [part.count, part.total, part.outer]
    else:
        fits = part.values.ndim == 2 and part.indices.shape == part.values.shape[:1]
        numbers = [part.values]
    if name not in PARTS or not fits:
        raise ValueError(f"its part {name} has other shapes")
    if not all(each.is_floating_point() and each.isfinite().all() for each in numbers):
        raise ValueError(f"its part {name} is not finite")


def cached_statistics(
    images: Images,
    extractor: nn.Module,
    parts: Collection[str],
    measure: Callable[[], ImageStatistics],
    directory: str | Path = CACHE_DIR,
) -> ImageStatistics:
    """The statistics of a set, measured at most once.

    Args:
        images: the set; all its bytes are read to name it.
        extractor: without an ``id`` nothing is cached, for nothing says when it changes.
        parts: which statistics.
        measure: computes them.
        directory: of the cache.

    Raises:
        DataError: the file in the cache is damaged.
        StorageError: the cache cannot be written.
    """
    name = extractor_id(extractor)
    if name is None:
        return measure()
    decides = [FORMAT, images.content_id(), len(images), name, sorted(parts), MOST_ROWS]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    path = local_path(directory) / f"{key[:40]}.safetensors"
    if path.exists():
        return load_statistics(path)[0]
    make_writable(path.parent)
    measured = measure()
    save_statistics(path, measured, images.location)
    return measured


def published_moments(path: Path, extractor: nn.Module) -> dict[str, FeatureMoments]:
    """The moments that an .npz of ADM or pytorch-fid holds; none if it has none or they are not of this extractor.

    They are of Inception: only an extractor with ``adm_statistics`` takes them.

    Raises:
        DataError: the file is damaged, or its sizes are not Inception's.
    """
    found = {}
    try:
        with storage_errors("read", path), zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if not getattr(extractor, "adm_statistics", False):
                if {"mu.npy", "sigma.npy"} <= set(members) and "arr_0.npy" not in members:
                    raise DataError(
                        f"{path} holds statistics of Inception alone, and the extractor is {name_of(extractor)}; use"
                        " the extractor inception, or name images as the reference."
                    )
                return {}
            for part, names in PUBLISHED.items():
                if all(f"{name}.npy" in members for name in names):
                    found[part] = _moments(*(_array(archive, name) for name in names))
    except (*ARCHIVE_ERRORS, ValueError) as error:
        raise DataError(
            f"{path} must be an .npz with mu [F] and sigma [F, F] ({' '.join(str(error).split())}); fetch it again."
        ) from error
    width = len(found[MOMENTS].total) if MOMENTS in found else extractor.num_features
    if width != extractor.num_features:
        raise DataError(
            f"{path} has a mean of {width} features, and {name_of(extractor)} has {extractor.num_features}; use"
            " the statistics of the same extractor."
        )
    return found


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return read_array(file, MAX_STATISTICS_BYTES)


def _moments(mean: np.ndarray, covariance: np.ndarray) -> FeatureMoments:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"mean {list(mean.shape)} and covariance {list(covariance.shape)} do not fit")
    for name, array in (("mean", mean), ("covariance", covariance)):
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(f"{name} of {array.dtype} is not all finite numbers")
    return FeatureMoments.of_gaussian(torch.from_numpy(mean), torch.from_numpy(covariance))
