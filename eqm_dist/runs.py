"""Where runs and sweeps lie, if the user does not say."""

import os
from pathlib import Path

from eqm_dist.storage.location import local_path


def runs_root(root: str | None = None) -> Path:
    """The directory that holds all runs: ``run.root``, or the default where that is None."""
    if root is not None:
        return local_path(root)
    return local_path("~/eqm-dist-runs" if in_ray_job() else "runs")


def in_ray_job() -> bool:
    """Whether this is a submitted Ray job, whose working directory is a copy that Ray throws away."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def sweep_directory(name: str) -> Path:
    """Where a sweep lies by default: sweeps/ here; inside a Ray job, whose directory is thrown away, ~/sweeps."""
    path = runs_root().parent / "sweeps" / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
