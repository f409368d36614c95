"""The wish of the driver that the workers save and end."""

import uuid

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_put


class StopRequest:
    """A wish, kept by the cluster's head, which lives as long as the run can: it needs no process, and no node of ours.

    Pickles: whoever has a copy asks for the same one.
    """

    def __init__(self) -> None:
        self._key = f"eqm_dist/stop/{uuid.uuid4().hex}".encode()

    def make(self) -> None:
        """Wish it."""
        _internal_kv_put(self._key, b"")

    def made(self) -> bool:
        """Whether it is wished."""
        return _internal_kv_exists(self._key)

    def forget(self) -> None:
        """Leave nothing behind on a cluster that goes on."""
        _internal_kv_del(self._key)
