"""Where runs and sweeps lie, if the user does not say."""

import os
from pathlib import Path

from eqm_dist.storage.location import Location, S3Path, is_remote, local_path, to_location


def runs_root(root: str | None = None) -> Path:
    """The directory that holds all runs: ``run.root``, or the default where that is None."""
    if root is not None:
        return local_path(root)
    return local_path("~/eqm-dist-runs" if in_ray_job() else "runs")


def runs_location(root: str | None = None) -> Location:
    """As ``runs_root``, which may be on S3."""
    return to_location(root) if root is not None and is_remote(root) else runs_root(root)


def scratch_of(run: S3Path, scratch: str) -> Path:
    """Where a machine works for a run on S3: SCRATCH/BUCKET/PREFIX/NAME."""
    return local_path(scratch).joinpath(*run.parts[1:])


def in_ray_job() -> bool:
    """Whether this is a submitted Ray job, whose working directory is a copy that Ray throws away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def sweep_directory(name: str) -> Path:
    """Where a sweep lies by default: sweeps/ here; inside a Ray job, whose directory is thrown away, ~/sweeps."""
    path = runs_root().parent / "sweeps" / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
