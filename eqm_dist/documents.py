"""JSON and YAML files as others may have made them: read within bounds, and written so that everybody can read them.

Nothing that a file holds may cost more memory or time than its bounds say, or end in anything but a ``ValueError``.
"""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""Of a JSON file: the marker of a checkpoint of thousands of files, or the names of all classes, has less."""
MOST_YAML_BYTES = 1 << 20
MOST_DEPTH = 50
MOST_VALUES = 100_000
"""In a YAML file, where an alias counts as often as it stands for something."""


def read_bounded(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file that is a file, and not too large.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, or has more bytes than that.
    """
    # A pipe would wait for a writer for ever.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def from_json(content: bytes | str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def mapping_from_json(content: bytes | str) -> dict[str, Any]:
    """What JSON says that must be an object.

    Raises:
        ValueError: it is no JSON, or something else.
    """
    found = from_json(content)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__} instead of an object")
    return found  # pyright: ignore[reportUnknownVariableType]


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, in which a number that is not finite is null, for JSON has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def from_yaml(content: bytes | str) -> Any:
    """What YAML says; nothing in it is executed.

    Raises:
        ValueError: it is no YAML in UTF-8, too large, nested too deeply, or its aliases stand for too much.
    """
    import yaml  # here, for the models and the numerics work without it

    if len(content) > MOST_YAML_BYTES:
        raise ValueError(f"it has more than {MOST_YAML_BYTES:,} bytes")
    try:
        text = content.decode() if isinstance(content, bytes) else content
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except (yaml.YAMLError, ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Values that a node stands for. ``known``: those of nodes seen before, 0 while one is being counted."""
    if depth > MOST_DEPTH:
        raise ValueError("it is nested too deeply")
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias in it stands for what holds the alias")
        return known[id(node)]
    known[id(node)] = 0
    inner = node.value if isinstance(node.value, list) else []  # of a scalar it is a text
    parts = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]  # pyright: ignore
    count = 1 + sum(_count(part, known, depth + 1) for part in parts)
    if count > MOST_VALUES:
        raise ValueError(f"it stands for more than {MOST_VALUES:,} values")
    known[id(node)] = count
    return count


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]  # pyright: ignore[reportUnknownVariableType]
    return value
