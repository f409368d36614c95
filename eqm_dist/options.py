"""What an option is: where its default stands, when it takes effect, and how its value is changed.

A section of options is a frozen pydantic model. An option that only one variant of its section has says so where it
is declared (``Only``), together with its default there. From that one place come its line in ``--help``, the sentence
that refuses it where it has no effect, what a change of the variant drops, and the value that is recorded: after
validation every option holds the value in effect, and None only where there is none.

Values are told apart by whether somebody gave them. What nobody gave is settled anew by every change, so that a default
that follows from another option (a tenth of the step size) follows it (docs/decisions/0005).
"""

import difflib
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, cast

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from eqm_dist.documents import MOST_YAML_BYTES, from_yaml, read_bounded
from eqm_dist.errors import ConfigError
from eqm_dist.redaction import RULE, holds_secret

V = TypeVar("V")

REQUIRED: Any = object()
"""The default of an option that must be given wherever it takes effect."""


@dataclass(frozen=True)
class Only:
    """An option takes effect only with some values of another option. Its type allows None, which is its default.

    Attributes:
        option: the other option (or a property) of its section; ``SECTION.OPTION`` for one of another section.
        values: the values of the other one with which it takes effect.
        default: its value there, or a function of its section, or ``REQUIRED``.
        otherwise: the value in effect elsewhere, or a function of its section; no other may be given there.
        words: what it needs, where ``option=value`` would not say it.
        by: the options that decide, where ``option`` is a property.
    """

    option: str
    values: tuple[Any, ...]
    default: Any = None
    otherwise: Any = None
    words: str | None = None
    by: tuple[str, ...] = ()

    @property
    def deciders(self) -> tuple[str, ...]:
        """The options that say whether it takes effect."""
        return self.by or (self.option,)

    @property
    def needs(self) -> str:
        """``name=gd, nag or adam``."""
        return self.words or f"{self.option}={either(self.values)}"


class Resumable:
    """Marks an option that may be another one when a run is started again."""


class Axis:
    """Marks an option that a sweep of trainings may vary."""


class Place:
    """Marks an option that says where something lies, which every start of a run says anew, for it may have moved."""


Mark = type[Resumable] | type[Axis] | type[Place]


class Section(BaseModel):
    """Base of all sections: frozen, complete, unknown keys refused, finite numbers only.

    A section is declared with the marks that all its options have: ``class LaunchConfig(Section, marks=(Resumable,))``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    marks: ClassVar[tuple[Mark, ...]] = ()

    def __init_subclass__(cls, marks: tuple[Mark, ...] = (), **settings: Any) -> None:
        super().__init_subclass__(**settings)
        cls.marks = marks

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # To pydantic true is 1 and false is 0; in YAML yes, no, on and off are booleans too.
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError(f"should not be true or false, got {value}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        # What an option holds is written to config.yaml, to every checkpoint and to MLflow.
        if isinstance(value, str) and holds_secret(value):
            raise ValueError(RULE)
        return value

    @model_validator(mode="after")
    def _settle(self) -> Self:
        settle(self, self)
        return self


T = TypeVar("T", bound=Section)

Layer = tuple[Mapping[str, Any], str]
"""Dotted keys or nested sections with their values, and the name of their source."""


@dataclass(frozen=True)
class Option:
    """An option of a config.

    Attributes:
        key: dotted.
        field: as pydantic has it.
        only: when it takes effect; None: always.
        marks: what may be done with it.
    """

    key: str
    field: FieldInfo
    only: Only | None
    marks: frozenset[Mark]

    @property
    def type_name(self) -> str:
        """Short name of its type: ``INT``, ``FLOAT``, ``{a,b}``, ``[INT,INT]``."""
        return annotation_name(self.field.annotation)

    @property
    def help(self) -> str:
        """What it is, its default, and with what it takes effect."""
        return self._described(self._default)

    @property
    def help_of_model(self) -> str:
        """The same where a model has been trained with values of its own."""
        return self._described("default: that of the model")

    @property
    def _default(self) -> str | None:
        default = self.field.default if self.only is None else self.only.default
        if default is REQUIRED:
            return "no default"
        shows = default is not None and not callable(default) and not self.field.is_required()
        return f"default: {shown(default)}" if shows else None

    def _described(self, default: str | None) -> str:
        facts = [] if default is None else [default]
        if self.only is not None:
            facts.append(f"only with {self.only.needs}")
        return f"{self.field.description} ({'; '.join(facts)})" if facts else str(self.field.description)


def options(section: type[BaseModel], prefix: str = "") -> Iterator[Option]:
    """Every option of a section and of those in it, in the order in which they are declared."""
    marks = getattr(section, "marks", ())
    for name, field in section.model_fields.items():
        if (inner := _section_type(field.annotation)) is not None:
            yield from options(inner, f"{prefix}{name}.")
        else:
            own = [mark for mark in (Resumable, Axis, Place) if mark in field.metadata]
            yield Option(f"{prefix}{name}", field, _only(field), frozenset((*marks, *own)))


def keys_with(section: type[BaseModel], mark: Mark) -> list[str]:
    """The dotted keys of all options with a mark."""
    return [option.key for option in options(section) if mark in option.marks]


def make(kind: Callable[[], V]) -> Callable[[Any], V]:
    """A default that is made anew for every section."""
    return lambda section: kind()


def required(value: V | None) -> V:
    """The value of an option that takes effect here, so that it is not None."""
    assert value is not None
    return value


# --- settling ---


def settle(section: Section, root: Section) -> None:
    """Put the values in effect where nobody gave one.

    Args:
        section: changed in place.
        root: that in which the dotted keys of ``Only.option`` are looked up; the section itself while it is alone.

    Raises:
        PydanticCustomError: an option was given that has no effect, or one is missing.
    """
    for name, field in type(section).model_fields.items():
        only = _only(field)
        if only is None or (decider := _decider(section, root, only)) is _UNDECIDED:
            continue
        value, applies = getattr(section, name), decider in only.values
        if name not in section.model_fields_set or value is None:
            in_effect = only.default if applies else only.otherwise
            if in_effect is REQUIRED:
                raise ValueError(f"{name} must be given with {only.option}={shown(decider)}")
            put(section, name, in_effect(section) if callable(in_effect) else in_effect)
        elif not applies:
            otherwise = only.otherwise(section) if callable(only.otherwise) else only.otherwise
            if value != otherwise:
                raise no_effect(name, _why(name, value, only, decider, otherwise), only.deciders)


def put(section: Section, name: str, value: Any) -> None:
    """Set the value in effect of an option that nobody gave."""
    vars(section)[name] = value  # frozen for everybody else
    section.model_fields_set.discard(name)


def put_section(section: Section, name: str, inner: Section) -> None:
    """Put a settled section in the place of the one that was given."""
    vars(section)[name] = inner


def no_effect(key: str, sentence: str, because: Sequence[str]) -> PydanticCustomError:
    """The error of an option that cannot take effect beside others; where these were chosen later, it is dropped.

    Args:
        key: of the option, in the section that raises the error.
        sentence: for the user.
        because: the options that it contradicts, likewise.
    """
    return PydanticCustomError("no_effect", "{sentence}", {"sentence": sentence, "option": key, "because": because})


_UNDECIDED = object()


def _decider(section: Section, root: Section, only: Only) -> Any:
    place, _, name = only.option.rpartition(".")
    if place:
        if root is section:
            return _UNDECIDED
        section = getattr(root, place)
    value, field = getattr(section, name), type(section).model_fields.get(name)
    return _UNDECIDED if value is None and field is not None and _waits(field, section is root) else value


def _waits(field: FieldInfo, alone: bool) -> bool:
    only = _only(field)
    return only is not None and alone and "." in only.option


def _why(name: str, value: Any, only: Only, decider: Any, otherwise: Any) -> str:
    if otherwise is not None:
        return (
            f"{name}={shown(value)} contradicts {only.option}={shown(decider)}, which fixes it to {shown(otherwise)};"
            f" leave it out or use {only.needs}"
        )
    if only.words is not None:
        return f"{name} has no effect without {only.words}; leave it out"
    return f"{name} has no effect with {only.option}={shown(decider)}; leave it out or use {only.needs}"


def _only(field: FieldInfo) -> Only | None:
    return next((part for part in field.metadata if isinstance(part, Only)), None)


def _section_type(annotation: Any) -> type[Section] | None:
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    for part in (annotation, *parts):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


# --- reading and changing ---


def flatten(values: Mapping[str, Any], section: type[BaseModel] | None = None) -> dict[str, Any]:
    """Nested sections as one level of dotted keys: ``{"a": {"b": 1}}`` becomes ``{"a.b": 1}``.

    Args:
        values: nested.
        section: whose values they are: an option of it whose value is a mapping stays one. None: all are flattened.
    """
    return _flattened(values, {option.key for option in options(section)} if section else set(), "")


def _flattened(values: Mapping[str, Any], whole: Collection[str], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in whole:
            flat |= _flattened(cast("Mapping[str, Any]", value), whole, f"{key}.")
        else:
            flat[key] = value
    return flat


def dump(section: Section) -> dict[str, Any]:
    """The values in effect as plain lists, dicts and scalars: what goes into YAML, JSON and to the workers."""
    return section.model_dump(mode="json")


def given(section: Section) -> dict[str, Any]:
    """The values that somebody gave, as ``dump`` gives all of them."""
    return section.model_dump(mode="json", exclude_unset=True)


def to_yaml(section: Section) -> str:
    """The values in effect as YAML that ``--config`` reads back to equal ones."""
    return yaml.safe_dump(dump(section), sort_keys=False, width=120)


def parse(section: type[T], values: Mapping[str, Any], source: str = "the config") -> T:
    """Validate nested ``values``.

    Raises:
        ConfigError: one sentence for the first wrong value: the rule, what was received, the remedy.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(section, error, {}, [source])) from None


def parse_document(section: type[T], content: bytes, source: str) -> T:
    """Validate the YAML that ``to_yaml`` wrote, wherever it has been since.

    Raises:
        ConfigError: it is damaged, or a value in it is wrong.
    """
    try:
        values = from_yaml(content)
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__} instead of sections")
    except ValueError as error:
        raise ConfigError(f"{source} must hold the options of a run, and is damaged ({error}); restore it.") from None
    return parse(section, cast("dict[str, Any]", values), source)


def with_overrides(config: T, overrides: Mapping[str, Any], source: str = "the overrides") -> T:
    """A copy of ``config`` with dotted keys set, validated as a whole.

    The one way to change a config, for flags, files, presets, sweeps and tests alike: see ``layered``.

    Raises:
        ConfigError: an unknown key, or a value that the rules refuse.
    """
    return layered(type(config), (given(config), "the config"), (overrides, source))


def layered(section: type[T], *layers: Layer) -> T:
    """The config of several layers, each of keys and the name of its source; the last one that has a key counts.

    The whole is validated, so a layer need not be valid alone. Where a layer chooses another variant, what an earlier
    one gave for the variant before, and means nothing to this one, is dropped. What contradicts the choice of its own
    layer, or of an earlier one, is refused.

    Raises:
        ConfigError: an unknown key, or a value that the rules refuse.
    """
    values: dict[str, Any] = {}
    givers: dict[str, int] = {}
    known, required_sections = list(_prefixes(section)), set(_required_sections(section))
    places = {key.rpartition(".")[0] for key in known}
    for number, (layer, source) in enumerate(layers):
        for key, value in flatten(layer, section).items():
            if value is None and key in required_sections:
                continue  # in YAML a section whose lines are all commented out
            parent, _, name = key.rpartition(".")
            if parent not in places or key != (f"{parent}.{name}" if parent else name):
                raise ConfigError(_unknown(section, key, source))
            _node(values, parent)[name] = value
            if value is not None or key not in givers:  # null takes the default, and contradicts nothing
                givers[key] = number
    while True:
        try:
            return section.model_validate(values)
        except ValidationError as error:
            dropped = [key for key, because in _without_effect(section, error) if _gives_way(key, because, givers)]
            if not dropped:
                raise ConfigError(_sentence(section, error, givers, [source for _, source in layers])) from None
            for key in dropped:
                parent, _, name = key.rpartition(".")
                del _node(values, parent)[name]


def _gives_way(key: str, because: Collection[str], givers: Mapping[str, int]) -> bool:
    """Whether what it contradicts was chosen later than it was given itself, or any option in it."""
    own = [number for other, number in givers.items() if f"{other}.".startswith(f"{key}.")]
    return max((givers[other] for other in because if other in givers), default=-1) > max(own, default=-1)


def read_yaml(path: str, section: type[BaseModel]) -> dict[str, Any]:
    """The dotted keys that a YAML file sets; an empty section sets none.

    Raises:
        ConfigError: no such file, no YAML, or not a mapping.
    """
    try:
        values = from_yaml(read_bounded(Path(path), MOST_YAML_BYTES))
    except OSError as error:
        raise ConfigError(f"--config must name a readable YAML file, got {path} ({error.strerror}).") from None
    except ValueError as error:
        raise ConfigError(f"--config must name a YAML file, and {path} is not valid YAML: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config must name a YAML file of sections, and {path} holds {type(values).__name__}.")
    return flatten(cast("dict[str, Any]", values), section)


def _node(values: dict[str, Any], parent: str) -> dict[str, Any]:
    """The mapping of a section in nested values, made where it is missing."""
    for part in parent.split(".") if parent else ():
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    return values


def _prefixes(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key, of options and of sections."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        if (inner := _section_type(field.annotation)) is not None:
            yield from _prefixes(inner, f"{prefix}{name}.")


def _required_sections(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of sections that cannot be null."""
    for name, field in section.model_fields.items():
        if (inner := _section_type(field.annotation)) is not None:
            if type(None) not in typing.get_args(field.annotation):
                yield f"{prefix}{name}"
            yield from _required_sections(inner, f"{prefix}{name}.")


def _without_effect(section: type[BaseModel], error: ValidationError) -> Iterator[tuple[str, set[str]]]:
    """The dotted keys of options that have no effect, each with the options that say so."""
    for each in error.errors(include_url=False):
        if each["type"] == "no_effect":
            facts = each.get("ctx", {})
            key, *because = (".".join(map(str, (*each["loc"], name))) for name in (facts["option"], *facts["because"]))
            yield key, _deciders(section, because)


def _deciders(section: type[BaseModel], keys: Collection[str]) -> set[str]:
    """These options, those that say whether they take effect, and so on."""
    onlys = {option.key: option.only for option in options(section)}
    found: set[str] = set()
    left = list(keys)
    while left:
        key = left.pop()
        found.add(key)
        if (only := onlys.get(key)) is not None:
            place = key.rpartition(".")[0]
            left += [name if "." in name else f"{place}.{name}" for name in only.deciders]
    return found


def _sentence(section: type[Section], error: ValidationError, givers: Mapping[str, int], sources: Sequence[str]) -> str:
    first, *rest = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    source = sources[givers.get(key, -1)]
    if first["type"] == "extra_forbidden":
        sentence = _unknown(section, key, source)
    elif first["type"] == "missing":
        sentence = f"{key} must be given ({source})."
    else:
        rule = first["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
        received = "" if first["type"] in ("value_error", "no_effect") else f", got {first['input']!r}"
        sentence = f"{key or source}: {rule}{received} ({source})." if key else f"{rule} ({source})."
    return sentence + (f" ({len(rest)} more of the kind.)" if rest else "")


def _unknown(section: type[Section], key: str, source: str) -> str:
    return f"{key} is not an option ({source}); {suggestion(key, [option.key for option in options(section)])}"


# --- words ---


def suggestion(key: str, known: Collection[str]) -> str:
    """What may have been meant by an unknown dotted key: a key with a similar last part, best in the same section."""
    parent, _, name = key.rpartition(".")
    similar = difflib.get_close_matches(name, {other.rpartition(".")[2] for other in known}, n=len(known))
    candidates = [other for other in known if other.rpartition(".")[2] in similar]
    siblings = [other for other in candidates if other.rpartition(".")[0] == parent]
    best = difflib.get_close_matches(key, siblings or candidates, n=1, cutoff=0)
    return f"did you mean {best[0]}?" if best else "see --help for all keys."


def annotation_name(annotation: Any) -> str:
    """Short name of a type for ``--help``: ``INT``, ``FLOAT``, ``{a,b}``, ``[INT,INT]``."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(str(value) for value in arguments) + "}"
    if origin is dict:
        return "{KEY:VALUE,...}"
    if origin is Annotated:
        return annotation_name(arguments[0])
    if origin is tuple:
        return "[" + ",".join("..." if part is Ellipsis else annotation_name(part) for part in arguments) + "]"
    if arguments:  # a union
        return "|".join(annotation_name(part) for part in arguments if part is not type(None))
    return annotation.__name__.upper()


def shown(value: Any) -> str:
    """A value as it is typed: ``true``, ``0.1``, ``[1, 4]``."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value)


def either(values: Collection[Any]) -> str:
    """``gd, nag or adam``."""
    *others, last = map(shown, values)
    return f"{', '.join(others)} or {last}" if others else last
