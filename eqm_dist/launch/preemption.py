"""Saves a run at once when a machine under it is about to be taken away.

Ray knows of it when the node is drained, which ``cluster/spot_drain.py`` does when the cloud gives notice. At the
deadline Ray restarts the run on the nodes that are left; until then it trains on.
"""

import logging
import time

import ray.train

from eqm_dist.train.distributed import rank

logger = logging.getLogger(__name__)


class Preemption:
    """Asked again and again by every rank alike; says yes once for every node that is being drained."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self) -> bool:
        """Whether to save now. A collective."""
        info = ray.train.get_preemption_info()
        new = set(info.preempted_node_ids) - self._known if info else set()
        if info is None or not new:
            return False
        self._known |= new
        if rank() == 0:
            workers = ", ".join(map(str, info.preempted_ranks))
            when = f"in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s" if info.deadline_ms else "soon"
            logger.warning("warning: the machine of worker %s will be taken away %s; saving now", workers, when)
        return True
