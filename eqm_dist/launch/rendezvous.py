"""How the workers of a cluster on one machine find each other: through a file of the user's, and no socket.

Torch's own store listens on all interfaces, whatever address it is given, and asks nobody who he is.
"""

import uuid
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)


def on_this_machine() -> bool:
    """Whether the cluster is one that a command has started for itself."""
    return ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")


class FileTorchConfig(TorchConfig):
    """Ray's, with a file in place of a port."""

    @property
    def backend_cls(self) -> type["_FileBackend"]:
        """What sets the process group up."""
        return _FileBackend


class _FileBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """See Ray's; a new file each time that workers start."""
        session = Path(ray._private.worker.global_worker.node.get_session_dir_path())  # pyright: ignore
        file = session / f"rendezvous-{uuid.uuid4().hex}"
        worker_group.execute(_set_torch_distributed_env_vars)
        starting = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=file.as_uri(),
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(starting)
