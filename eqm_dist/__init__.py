"""Distributed training of Equilibrium Matching models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eqm_dist.pretrained import Pretrained, load

__version__ = "0.1.0"
__all__ = ["Pretrained", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which --help and a refused flag need not wait for.
    if name in ("Pretrained", "load"):
        from eqm_dist import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
