"""A cluster that a command has started for itself, on one machine: Ray Train without what only others need.

Ray Train starts a process for each of its services, each of which imports Ray Train again: 1.5 to 2 s of a processor,
while the workers wait. On one machine nobody takes a node away, nobody adds one, and what Ray has placed ends with the
command; and we bring no data set of Ray's.

Ray's controller reads this, so it imports little.
"""

import os
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_SERVICES = ("PlacementGroupCleanerCallback", "DatasetsCallback")


def on_this_machine() -> bool:
    """Whether the cluster is one that a command has started for itself."""
    return ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")


class OneMachineTrainer(DataParallelTrainer):
    """Ray's trainer without the services."""

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        parts["callbacks"] = [each for each in parts["callbacks"] if type(each).__name__ not in _SERVICES]
        if not self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = _AsManyAsAsked(scaling_config=self.scaling_config)
        return super()._initialize_and_run_controller(**parts)


class _AsManyAsAsked(FixedScalingPolicy):
    """Asks no autoscaler for the room of its workers."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass
