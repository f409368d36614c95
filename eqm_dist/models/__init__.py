"""Networks. ``SiT`` is imported on first use, so that ``eqm_dist.models.sizes`` stays free of torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eqm_dist.models.sit import SiT

__all__ = ["SiT"]


def __getattr__(name: str) -> Any:
    if name != "SiT":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from eqm_dist.models.sit import SiT

    return SiT
