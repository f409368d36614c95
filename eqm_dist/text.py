"""Figures and facts as people read them."""

from collections.abc import Mapping, Sequence


def labelled(lines: Mapping[str, str], indent: str = "") -> list[str]:
    """A line for each label and its text, the texts below each other."""
    width = max(map(len, lines))
    return [f"{indent}{label:<{width}}  {text}" for label, text in lines.items()]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as it must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def counted(number: int, noun: str) -> str:
    """``1 worker``, ``2 workers``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
