"""JSON and YAML from anybody: whatever they hold, they cost no more than their bounds, and end in a ValueError."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.documents import from_json, from_yaml, mapping_from_json, read_bounded, to_json


def bomb(levels: int) -> str:
    """YAML that stands for 9 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("- " * 60, "nested too deeply"),
        (bomb(9), "stands for more than 100,000 values"),
        ("a: &a [*a]", "an alias in it stands for what holds the alias"),
        ("x: " + "y" * 2_000_000, "more than 1,048,576 bytes"),
        (b"\xff\xfe\xff", "not UTF-8"),
        ("a: [", "expected the node content"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 2001-99-99", "month"),
        ("? [a]\n: b\n? {c: d}\n: e", "unhashable"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
    ],
)
def test_yaml_that_is_refused(text: str | bytes, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError, match=reason):
        from_yaml(text)
    assert time.monotonic() - began < 5


def test_yaml_as_people_write_it() -> None:
    assert from_yaml("base: &b {x: 1}\nmine: {<<: *b, y: [*b, *b]}\n")["mine"] == {"x": 1, "y": [{"x": 1}] * 2}
    assert from_yaml(b"") is None
    assert from_yaml("train:\n") == {"train": None}


@given(st.text(max_size=200))
def test_no_yaml_raises_anything_else(text: str) -> None:
    with contextlib.suppress(ValueError):
        from_yaml(text)


def test_json_that_is_refused() -> None:
    for content in (b"", b"{", b"[" * 100_000, b"\xff", b"9" * 5000):
        with pytest.raises(ValueError):  # noqa: PT011
            from_json(content)
    for content in ("null", "3", "[]", '"x"'):
        with pytest.raises(ValueError, match="instead of an object"):
            mapping_from_json(content)


def test_written_json_is_json() -> None:
    """Python writes NaN and Infinity, which no other reader knows."""
    text = to_json({"a": math.nan, "b": [math.inf, 1.5, (-math.inf,)], "c": {"d": True}})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5, [None]], "c": {"d": True}}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for path, reason in (("pipe", "is no file"), ("large", "more than 10 bytes")):
        with pytest.raises(ValueError, match=reason):
            read_bounded(tmp_path / path, 10)
    with pytest.raises(ValueError, match="is no file"):
        read_bounded(Path("/dev/zero"))
    with pytest.raises(OSError, match="directory"):
        read_bounded(tmp_path)
