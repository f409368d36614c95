"""A run that starts from a checkpoint of another one."""

import shutil
from pathlib import Path

from eqm_dist.errors import CheckpointError
from eqm_dist.run_directory import CHECKPOINTS, METRICS_FILE
from eqm_dist.storage.files import storage_errors
from eqm_dist.train.checkpoint import Checkpoints


def fork_run(source: Path, step: int, directory: Path) -> None:
    """Give a run that has not begun a checkpoint of another one, with all its state, and its record so far.

    The config of the new run decides what becomes of them. A run that has checkpoints already is left as it is.

    Args:
        source: directory of the other run.
        step: of its checkpoint.
        directory: of the new run.

    Raises:
        CheckpointError: there is no such checkpoint.
        StorageError: the machine cannot read or write.
    """
    if Checkpoints(directory / CHECKPOINTS, keep=1).latest() is not None:
        return
    origin = Checkpoints(source / CHECKPOINTS, keep=1)
    if step not in origin.steps():
        raise CheckpointError(
            f"A run starts from a whole checkpoint of another, and {source} has none of step {step}, but those of"
            f" {origin.steps()}; raise checkpoint.keep, or start over."
        )
    place = directory / CHECKPOINTS / origin.path(step).name
    aside = place.with_name(f".{place.name}")
    with storage_errors("write", directory):
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        if (source / METRICS_FILE).exists():
            shutil.copyfile(source / METRICS_FILE, directory / METRICS_FILE)
        shutil.copytree(origin.path(step), aside)
        aside.rename(place)
