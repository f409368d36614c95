"""Search spaces: axes over the dotted keys of the config, from a YAML or a Python file.

    - sampler.name: nag                                       # a value: the same in all trials
      sampler.momentum: [0.3, 0.6]                            # a list: choices
      sampler.step_size: {log: [0.005, 0.16], points: 6}      # an interval; its points make the grid

A file holds one such mapping, or a list of alternatives whose trials are those of each: what only one method has then
stands beside its name. A Python file sets ``space`` to the same.
"""

import hashlib
import itertools
import json
import math
import runpy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from eqm_dist.config import Config
from eqm_dist.documents import MOST_YAML_BYTES, from_yaml, read_bounded
from eqm_dist.errors import ConfigError
from eqm_dist.options import options, suggestion

Overrides = dict[str, Any]
"""Dotted keys with their values: a point of a space."""


@dataclass(frozen=True)
class Choices:
    """An axis of separate values."""

    values: tuple[Any, ...]

    def grid(self) -> Sequence[Any]:
        """All of them."""
        return self.values

    def extremes(self) -> Sequence[Any]:
        """All of them."""
        return self.values

    def at(self, part: float) -> Any:
        """The value at a part in [0, 1) of the axis."""
        return self.values[int(part * len(self.values))]


@dataclass(frozen=True)
class Interval:
    """An axis of numbers.

    Attributes:
        low, high: its ends, both possible.
        points: values of it in a grid; None if it was not said.
        log: evenly spaced in the logarithm.
        whole: whole numbers only.
    """

    low: float
    high: float
    points: int | None
    log: bool
    whole: bool

    def grid(self) -> Sequence[Any]:
        """``points`` values from end to end, evenly spaced."""
        if self.points is None:
            raise ConfigError(
                f"An interval needs its number of points in a grid, got {self}; add points, or use --search random or"
                " optuna."
            )
        return list(dict.fromkeys(self._between(part) for part in np.linspace(0, 1, self.points)))

    def extremes(self) -> Sequence[Any]:
        """Both ends."""
        return [self._between(0), self._between(1)]

    def at(self, part: float) -> Any:
        """The value at a part in [0, 1) of the axis."""
        return self._between(part)

    def rounded(self, value: float) -> Any:
        """A value as it is used: four digits tell points apart, and stay readable in names and tables."""
        return round(value) if self.whole else float(f"{value:.4g}")

    def _between(self, part: float) -> Any:
        if self.log:
            return self.rounded(self.low ** (1 - part) * self.high**part)
        return self.rounded(self.low + part * (self.high - self.low))

    def __str__(self) -> str:
        return f"{{{'log' if self.log else 'linear'}: [{self.low:g}, {self.high:g}]}}"


Axis = Choices | Interval


@dataclass(frozen=True)
class Space:
    """What is searched: alternatives, each a mapping from dotted keys to axes."""

    alternatives: tuple[Mapping[str, Axis], ...]

    def varying(self) -> list[str]:
        """Every key that varies, in the order of the file."""
        axes = itertools.chain.from_iterable(alternative.items() for alternative in self.alternatives)
        values: dict[str, set[str]] = {}
        for key, axis in axes:
            values.setdefault(key, set()).update(json.dumps(value) for value in axis.extremes())
        everywhere = [key for key in values if all(key in alternative for alternative in self.alternatives)]
        return [key for key, found in values.items() if len(found) > 1 or key not in everywhere]

    def grid(self) -> list[Overrides]:
        """Every combination of every alternative."""
        return [
            dict(zip(alternative, values, strict=True))
            for alternative in self.alternatives
            for values in itertools.product(*(axis.grid() for axis in alternative.values()))
        ]

    def random(self, trials: int, seed: int) -> list[Overrides]:
        """Different points, drawn independently and uniformly (with log, in the logarithm).

        More trials begin with the same points. Where the space has fewer, as many as were found.
        """
        drawn: dict[str, Overrides] = {}
        for number in range(10 * trials):
            draw = np.random.Generator(np.random.Philox(key=np.array([seed, number], np.uint64)))
            alternative = self.alternatives[draw.integers(len(self.alternatives))]
            point = {key: axis.at(draw.random()) for key, axis in alternative.items()}
            drawn.setdefault(trial_name(point), point)
            if len(drawn) == trials:
                break
        return list(drawn.values())

    def extremes(self) -> Iterator[Overrides]:
        """For every choice and every end of an interval a point that has it: what is checked before a search."""
        for alternative in self.alternatives:
            first = {key: axis.extremes()[0] for key, axis in alternative.items()}
            for key, axis in alternative.items():
                yield from ({**first, key: value} for value in axis.extremes())


def trial_name(overrides: Mapping[str, Any]) -> str:
    """Short and the same for the same point, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:10]


def recorded(space: Space) -> list[dict[str, Any]]:
    """A space as JSON."""
    return [{key: vars(axis) for key, axis in part.items()} for part in space.alternatives]


def restored(record: Any) -> Space:
    """The space that ``recorded`` made this of.

    Raises:
        AttributeError, KeyError, TypeError: it made it of something else.
    """

    def axis(values: Mapping[str, Any]) -> Axis:
        return Choices(tuple(values["values"])) if "values" in values else Interval(**values)

    return Space(tuple({key: axis(values) for key, values in part.items()} for part in record))


def read_space(path: str, known: Collection[str]) -> Space:
    """The space in a YAML or Python file.

    Args:
        path: of the file; a Python file is executed.
        known: keys that may be axes.

    Raises:
        ConfigError: no such file, an unknown key, or an axis that is none of the three kinds.
    """
    try:
        values = _executed(path) if path.endswith(".py") else from_yaml(read_bounded(Path(path), MOST_YAML_BYTES))
    except OSError as error:
        raise ConfigError(f"--space must name a readable YAML or Python file, got {path} ({error.strerror}).") from None
    except ValueError as error:
        raise ConfigError(f"--space must name a YAML file, and {path} is not valid YAML: {error}.") from None
    return parse_space(values, known, path)


def _executed(path: str) -> Any:
    """What a Python file calls ``space``."""
    try:
        return runpy.run_path(path).get("space")
    except OSError:
        raise
    except Exception as error:  # the user's code: whatever it raises is to be mended there
        line = " ".join(str(error).split())[:200]
        raise ConfigError(f"{path} must make a space, and fails with {type(error).__name__}: {line}.") from error


def parse_space(values: Any, known: Collection[str], source: str) -> Space:
    """The space that lists and mappings describe; ``source`` is where they come from.

    Raises:
        ConfigError: an unknown key, or an axis that is none of the three kinds.
    """
    alternatives = list(values) if isinstance(values, list | tuple) else [values]
    if not alternatives or not all(isinstance(part, Mapping) and part for part in alternatives):
        raise ConfigError(
            f"A search space must be a mapping from keys to axes, or a list of such mappings, and {source} holds"
            f" {type(values).__name__}; see docs/tuning.md."
        )
    return Space(tuple(_alternative(part, known, source) for part in cast("list[Mapping[Any, Any]]", alternatives)))


def _alternative(values: Mapping[Any, Any], known: Collection[str], source: str) -> dict[str, Axis]:
    keys = {option.key for option in options(Config)}
    for key in values:
        if key not in keys:
            raise ConfigError(f"{key} is not an option ({source}); {suggestion(str(key), list(known))}")
        if key not in known:
            raise ConfigError(f"{key} cannot be an axis of this sweep ({source}); leave it out.")
    return {key: _axis(key, value, source) for key, value in values.items()}


def _axis(key: str, value: Any, source: str) -> Axis:
    value = _plain(value)
    if isinstance(value, list) and value:
        _check_values(key, cast("list[Any]", value), source)
        return Choices(tuple(cast("list[Any]", value)))
    if not isinstance(value, Mapping | list):
        _check_values(key, [value], source)
        return Choices((value,))
    kind = "log" if "log" in value else "linear"
    match value:
        case {"log": [low, high], **others} | {"linear": [low, high], **others} if others.keys() <= {"points"}:
            points = others.get("points")
            low, high = _number(low), _number(high)
            counted = points is None or (isinstance(points, int) and points >= 2)
            if counted and low < high < math.inf and low > (0 if kind == "log" else -math.inf):
                return Interval(low, high, points, kind == "log", _is_whole(key))
        case _:
            pass
    raise ConfigError(
        f"{key} must be a value, a list of choices, or an interval like {{log: [0.001, 0.1], points: 5}} (or linear;"
        f" two rising ends, positive with log; points at least 2), got {value} ({source})."
    )


def _plain(value: Any) -> Any:
    """What a Python file may say in other words: numpy's values, tuples and ranges as numbers and lists."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(part) for part in value]
    return value


def _check_values(key: str, values: Sequence[Any], source: str) -> None:
    """Refuse what no record can hold.

    Raises:
        ConfigError: it is no number, text, true, false, null, or a list or mapping of these.
    """
    for value in values:
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{key} must be numbers, texts, true, false or null, got {type(value).__name__} ({source}); convert it."
            ) from None


def _number(value: Any) -> float:
    """NaN, of which no comparison holds, where it is none. To YAML 1e-3 is a text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _is_whole(key: str) -> bool:
    return next(option for option in options(Config) if option.key == key).type_name.startswith("INT")
