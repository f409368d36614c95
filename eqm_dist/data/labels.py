"""Classes as files of others write them."""

import re

from eqm_dist.data.bounds import MAX_CLASSES
from eqm_dist.errors import DataError

LABEL_BYTES = 32
"""Of KEY.cls: a number, with white space around it."""
_NUMBER = re.compile(rb"\s*(-?[0-9]{1,18})\s*")


def parse_label(content: bytes) -> int:
    """The integer in a KEY.cls.

    Raises:
        ValueError: it holds none.
    """
    match = _NUMBER.fullmatch(content)
    if match is None:
        raise ValueError(f"a class {content[:LABEL_BYTES]!r} that is no integer")
    return int(match[1])


def check_label(label: int, where: str) -> None:
    """See that a class is one.

    Raises:
        DataError: it is negative, or beyond what a manifest holds.
    """
    if not 0 <= label < MAX_CLASSES:
        raise DataError(
            f"Classes must lie in [0, {MAX_CLASSES:,}), but {where} has {label}; number them from 0"
            f"{', or leave out what has no class, which -1 often means' if label == -1 else ''}."
        )
