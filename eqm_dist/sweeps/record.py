"""A sweep in MLflow: a run with a nested run for each trial, in an experiment of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.config import Config, TrackConfig
from eqm_dist.options import required, to_yaml
from eqm_dist.storage.files import storage_errors
from eqm_dist.sweeps.search import Search
from eqm_dist.track.mlflow import SweepRecord, default_uri, open_run


@dataclass(frozen=True)
class Record:
    """How a sweep is recorded.

    Attributes:
        track: whether and where.
        root: directory of the runs, where the store and its artifacts lie unless ``track`` names another.
        config: what the trials have in common, kept as ``config.yaml``.
        params: of the sweep, besides those of its search.
    """

    track: TrackConfig
    root: Path
    config: Config
    params: Mapping[str, Any]

    @property
    def experiment(self) -> str:
        """The MLflow experiment, apart from that of ordinary runs."""
        return f"{self.track.experiment}-sweeps"

    def open(self, search: Search) -> SweepRecord | None:
        """Open the MLflow run of a sweep, or open it again; None where none is wanted.

        Raises:
            StorageError: the directory of the runs cannot be made.
            TrackingError: the server does not answer, or no longer knows the sweep.
        """
        if not self.track.mlflow:
            return None
        with storage_errors("create", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        parent = open_run(
            search.out,
            name=search.out.name,
            tracking_uri=self.track.mlflow_uri or default_uri(self.root),
            experiment=self.experiment,
            params={"search": search.how, "trials": search.count, "seed": search.seed, **self.params},
            config_yaml=to_yaml(self.config),
            timeout_s=required(self.track.timeout_s),
            artifacts=self.root,
        )
        return SweepRecord(parent)
