"""What the pictures of all sweeps share: axes with numbers as one says them, and the files."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter


def plain_numbers(axis: Axis) -> None:
    """A logarithmic axis with numbers as one says them: 0.05, not 5 x 10^-2."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save_pictures(out: Path, pictures: Mapping[str, Figure]) -> list[Path]:
    """Write pictures under their names; returns the files."""
    for name, picture in pictures.items():
        picture.savefig(out / name)
    return [out / name for name in pictures]
