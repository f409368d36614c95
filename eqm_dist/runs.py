"""Where runs and sweeps lie, if the user does not say."""

import os
from pathlib import Path

from eqm_dist.storage.location import local_path


def runs_root(root: str | None = None) -> Path:
    """The directory that holds all runs: ``run.root``, or the default where that is None."""
    if root is not None:
        return local_path(root)
    # Ray unpacks a submitted working directory into a copy that it throws away: runs there would be lost.
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return local_path("~/eqm-dist-runs" if in_job else "runs")


def sweep_directory(name: str) -> Path:
    """Where a sweep lies by default: sweeps/ here; inside a Ray job, whose directory is thrown away, ~/sweeps."""
    path = runs_root().parent / "sweeps" / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
