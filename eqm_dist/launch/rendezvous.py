"""How the workers of a cluster on one machine find each other: through a file of the user's, and no socket.

Torch's own store listens on all interfaces, whatever address it is given, and asks nobody who he is.

Ray's controller reads this, and the workers wait for it: torch, which Ray's own configuration imports there too, is
imported in the workers alone.
"""

import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

_LEAVE_S = 30


@dataclass
class FileGroup(BackendConfig):
    """A process group of torch that meets in a file, in place of a port.

    Attributes:
        backend: ``gloo`` or ``nccl``.
        timeout_s: of its collectives.
    """

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type["_FileBackend"]:
        """What sets the process group up."""
        return _FileBackend


class _FileBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """See Ray's; a new file each time that workers start."""
        session = Path(ray._private.worker.global_worker.node.get_session_dir_path())  # pyright: ignore
        file, world = session / f"rendezvous-{uuid.uuid4().hex}", len(worker_group)
        common = backend_config.backend, world, file.as_uri(), backend_config.timeout_s
        ray.get([worker_group.execute_single_async(rank, _join, rank, *common) for rank in range(world)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """See Ray's, which waits for no longer either: who does not answer is killed next."""
        with suppress(GetTimeoutError):
            ray.get(worker_group.execute_async(_leave, len(worker_group)), timeout=_LEAVE_S)


def _join(rank: int, backend: str, world: int, file: str, timeout_s: int) -> None:
    """Make this worker a rank, as Ray's own configuration does."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world, file, timeout_s)


def _leave(world: int) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=world > 1)
