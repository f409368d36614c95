"""Writing shards: images in, a directory of plain WebDataset tars with index, report and manifest out.

Shard k holds the images [k * samples_per_shard, (k + 1) * samples_per_shard) of the source, less those that cannot be
decoded, and nothing else decides its bytes. So a shard is either there and whole or is written again, and a
preparation that was killed goes on where it was: the request comes first, then the tars, each whole at once, then the
report and the index, the manifest last. A shard whose images were changed or repaired since is written again too.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eqm_dist.data.assemble import assemble
from eqm_dist.data.encode import ShardTask, ShardWriter, check_shard
from eqm_dist.data.index import ShardIndex
from eqm_dist.data.manifest import (
    MANIFEST_NAME,
    VERSION,
    Description,
    Manifest,
    MomentsDtype,
    check_checksum,
    file_record,
    read_manifest,
)
from eqm_dist.data.source_changes import SourceChanges
from eqm_dist.data.sources.digits import Digits
from eqm_dist.data.sources.image import ImageSource, SkippedImage
from eqm_dist.documents import mapping_from_json, read_bounded
from eqm_dist.errors import DataError
from eqm_dist.models.autoencoder import Autoencoder, IdentityAutoencoder
from eqm_dist.storage.files import atomic_write, remove_leftovers, storage_errors
from eqm_dist.storage.folder import LocalFolder
from eqm_dist.storage.location import local_path
from eqm_dist.storage.lock import locked

REQUEST_NAME = "preparation.json"
REPORT_NAME = "report.json"

Work = Callable[[ShardTask, torch.device], ShardIndex]
Runner = Callable[[Work, Sequence[ShardTask]], Iterator[tuple[ShardTask, ShardIndex]]]
"""Writes shards, here or elsewhere, and yields each as it is done, in any order."""

logger = logging.getLogger(__name__)


def run_here(work: Work, tasks: Sequence[ShardTask]) -> Iterator[tuple[ShardTask, ShardIndex]]:
    """The runner of this process: one shard after the other, on the CPU."""
    for task in tasks:
        yield task, work(task, torch.device("cpu"))


def digits_shards(directory: str | Path) -> Manifest:
    """The embedded data set as shards, written at first use: 1,797 digits in 8 shards, the last of them short.

    Any number of processes may ask at once: one writes, the others wait for it.

    Raises:
        DataError: ``directory`` holds another data set.
        StorageError: the shards cannot be written.
    """
    return write_shards(directory, "digits", Digits(), IdentityAutoencoder(), samples_per_shard=256, dtype="float32")


def write_shards(
    directory: str | Path,
    name: str,
    source: ImageSource,
    autoencoder: Autoencoder,
    *,
    samples_per_shard: int,
    dtype: MomentsDtype,
    mirror: bool = False,
    class_names: Sequence[str] = (),
    max_bad_fraction: float = 0.0,
    runner: Runner = run_here,
) -> Manifest:
    """Encode all images of ``source`` into the shards DIR/NAME-000000.tar, ...; goes on where a killed one stopped.

    Args:
        directory: made if absent. It belongs to one data set.
        name: first part of the shards' names.
        source: the images.
        autoencoder: images -> moments [2C, H, W].
        samples_per_shard: of all shards but the last, where no image is skipped.
        dtype: in which moments are stored.
        mirror: store the moments of the mirrored image too (V = 2).
        class_names: one for each class, or none.
        max_bad_fraction: the most images that may be skipped because they cannot be decoded, of all. They are listed
            in DIR/report.json.
        runner: who does the work.

    Returns:
        The manifest; at once if all is there already.

    Raises:
        DataError: ``directory`` holds another data set or a damaged shard, a moment does not fit into ``dtype``, or
            too many images cannot be decoded.
        StorageError: the shards cannot be written. What was finished stays.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard must be at least 1, received {samples_per_shard}.")
    if not 0 <= max_bad_fraction <= 1:
        raise DataError(f"max_bad_fraction must lie in [0, 1], received {max_bad_fraction}.")
    directory = local_path(directory)
    request = {
        "version": VERSION,
        "name": name,
        "source": source.id,
        "samples": len(source),
        "autoencoder": autoencoder.id,
        "latent_scale": autoencoder.latent_scale,
        "latent_shift": autoencoder.latent_shift,
        "samples_per_shard": samples_per_shard,
        "dtype": dtype,
        "mirror": mirror,
    }
    with storage_errors("create", directory):
        directory.mkdir(parents=True, exist_ok=True)
    description = Description(
        name=name,
        source=source.id,
        autoencoder=autoencoder.id,
        autoencoder_location=autoencoder.location,
        latent_scale=autoencoder.latent_scale,
        latent_shift=autoencoder.latent_shift,
        num_classes=source.num_classes,
        class_names=tuple(class_names),
    )
    description.check()  # now, and not after hours of encoding
    changes = SourceChanges(directory, source)
    if _finished(directory, request) and not changes.possible():
        return read_manifest(directory)
    said = partial(logger.info, "Waiting for another process that prepares %s.", directory)
    with locked(directory / ".lock", waiting=said):
        finished = _finished(directory, request)  # perhaps by another process, while this one waited
        if finished and not changes.possible():
            return read_manifest(directory)
        _claim(directory, request)
        remove_leftovers(directory)
        if not finished:
            _check_recorded(directory)
        tasks = [
            ShardTask(directory / f"{name}-{number:06d}.tar", start, min(start + samples_per_shard, len(source)))
            for number, start in enumerate(range(0, len(source), samples_per_shard))
        ]
        done = {task.path: check_shard(task, dtype) for task in tasks if task.path.exists()}
        outdated = changes.outdated([(task, done[task.path]) for task in tasks if task.path in done])
        if finished:
            if not outdated:
                changes.accept()
                return read_manifest(directory)
            _check_recorded(directory)
            _remove([directory / MANIFEST_NAME])  # first, so that no manifest ever vouches for other files
        _remove([task.path for task in outdated])
        done = {path: index for path, index in done.items() if path not in {task.path for task in outdated}}
        changes.accept()
        missing = [task for task in tasks if task.path not in done]
        _check_skipped(directory, done, len(source), max_bad_fraction)
        progress = _Progress(len(source), sum(task.stop - task.start for task in missing))
        for task, index in runner(ShardWriter(source, autoencoder, dtype, mirror).write, missing):
            _check_alike(task, index, done)
            done[task.path] = index
            progress.log(task, index)
            _check_skipped(directory, done, len(source), max_bad_fraction)
        _write_report(directory, done, len(source))
        shards = [(file_record(task.path), done[task.path]) for task in tasks]
        return assemble(LocalFolder(directory), description, shards)


def _finished(directory: Path, request: dict[str, Any]) -> bool:
    """Whether the requested data set is there with all its files; what is missing is written again."""
    if not (directory / MANIFEST_NAME).exists():
        return False
    _check_request(directory, request)
    manifest = read_manifest(directory)
    return all((directory / record.name).exists() for record in (*manifest.shards, manifest.index))


def _claim(directory: Path, request: dict[str, Any]) -> None:
    """Write down what this directory is for, or see that it is for this.

    Raises:
        DataError: it holds another data set.
    """
    if (directory / REQUEST_NAME).exists():
        _check_request(directory, request)
    elif any(directory.glob("*.tar")):
        raise DataError(f"Shards must go into a directory of their own, but {directory} holds tars; choose another.")
    else:
        atomic_write(directory / REQUEST_NAME, (json.dumps(request, indent=1) + "\n").encode())


def _check_request(directory: Path, request: dict[str, Any]) -> None:
    path = directory / REQUEST_NAME
    try:
        with storage_errors("read", path):
            found = mapping_from_json(read_bounded(path) if path.exists() else b"{}")
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); delete {directory} and prepare the data set again.") from error
    different = [
        f"{field}={found.get(field)!r}, not {value!r}" for field, value in request.items() if found.get(field) != value
    ]
    if different:
        raise DataError(
            f"A directory holds one data set, but {directory} holds another, with {'; '.join(different)}; "
            "choose another directory or delete this one."
        )


def _check_recorded(directory: Path) -> None:
    """See that what is left of a finished data set was not changed, or the new manifest would vouch for the change.

    Raises:
        DataError: names the changed shard.
    """
    if not (directory / MANIFEST_NAME).exists():
        return
    for record in read_manifest(directory).shards:
        path = directory / record.name
        if path.exists():
            with storage_errors("read", path), open(path, "rb") as file:
                check_checksum(file, path, record)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with storage_errors("remove", path):
            path.unlink(missing_ok=True)


def _check_alike(task: ShardTask, index: ShardIndex, done: dict[Path, ShardIndex]) -> None:
    """See that a new shard has moments of the shape of the others, as soon as there are two.

    Raises:
        DataError: it has not.
    """
    for path, other in done.items():
        if index.moments_shape and other.moments_shape and index.moments_shape != other.moments_shape:
            raise DataError(
                f"All images must have one size, but those of {task.path} give moments {list(index.moments_shape)} and "
                f"those of {path.name} {list(other.moments_shape)}; give --resolution and a new --out."
            )


def _check_skipped(directory: Path, done: dict[Path, ShardIndex], images: int, max_bad_fraction: float) -> None:
    """Stop as soon as it is clear that too many images are broken.

    Raises:
        DataError: says how many, and where the list is.
    """
    skipped = _skipped(done)
    if len(skipped) > max_bad_fraction * images:
        _write_report(directory, done, images)
        raise DataError(
            f"At most {max_bad_fraction:g} of {images:,} images may be broken, but {len(skipped):,} are: "
            f"{skipped[0].name} ({skipped[0].reason}) and others in {directory / REPORT_NAME}; "
            "repair the images, or raise --max-bad-fraction and run the same command again."
        )


def _write_report(directory: Path, done: dict[Path, ShardIndex], images: int) -> None:
    skipped = _skipped(done)
    report = {
        "images": images,
        "read": sum(len(index.records) + len(index.skipped) for index in done.values()),
        "skipped": len(skipped),
        "skipped_images": [image.listed() for image in skipped],
    }
    atomic_write(directory / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())


def _skipped(done: dict[Path, ShardIndex]) -> list[SkippedImage]:
    return [image for path in sorted(done) for image in done[path].skipped]


class _Progress:
    """One line a shard: how much is done, how fast, how long it will take."""

    def __init__(self, images: int, missing: int) -> None:
        self._images = images
        self._done_before = images - missing
        self._done = 0
        self._bytes = 0
        self._started = time.monotonic()

    def log(self, task: ShardTask, index: ShardIndex) -> None:
        self._done += task.stop - task.start
        self._bytes += task.path.stat().st_size
        done = self._done_before + self._done
        speed = self._done / (time.monotonic() - self._started)
        logger.info(
            "Wrote %s: %s of %s images, %s images/s, %s s left, %.1f MB%s",
            task.path.name,
            f"{done:,}",
            f"{self._images:,}",
            f"{speed:,.0f}",
            f"{(self._images - done) / speed:,.0f}",
            self._bytes / 1e6,
            f", {len(index.skipped)} skipped" if index.skipped else "",
        )
