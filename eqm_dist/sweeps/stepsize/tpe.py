"""Points proposed by Optuna's TPE, asked for and told in batches.

Optuna itself and not Ray Tune's wrapper of it: what was found lies in the sweep's own ledger, from which the study is
made anew whenever the command starts, so there is no second state to keep, and several objectives are told as they are.
A storage is a copy for Optuna's own tools to look at; nothing is read from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from eqm_dist.errors import ConfigError, EqmDistError, StorageError
from eqm_dist.sweeps.spaces import Axis, Choices, Interval, Overrides, Space

ALTERNATIVE = "alternative"
OURS = "eqm_dist"
"""Marks a study that this package has made, and may make anew."""


class TpeSearch:
    """Asks for points and is told what they gave; the smaller, the better.

    Args:
        space: what is searched.
        objectives: names of a point's values; with two or more the points converge to their Pareto front.
        seed: of the proposals, which also depend on everything that was told before.
        storage: a URL of a database, or a file for Optuna's journal, where the study is kept; None keeps none.
        name: of the study there. One that an earlier attempt left is made anew.

    Raises:
        ConfigError: the storage cannot be opened, or holds a study of that name that is not ours.
    """

    def __init__(
        self, space: Space, objectives: Sequence[str], seed: int, storage: str | None = None, name: str | None = None
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # it lies of what is asked and not told
        opened = None if storage is None else open_storage(storage, name)
        self._study = optuna.create_study(
            directions=[StudyDirection.MINIMIZE] * len(objectives), sampler=sampler, storage=opened, study_name=name
        )
        self._study.set_user_attr(OURS, True)
        self._study.set_user_attr("objectives", list(objectives))
        self._space, self._storage = space, storage
        self._asked: list[tuple[Overrides, optuna.Trial]] = []

    def ask(self) -> Overrides:
        """A point; two asks may give the same.

        Raises:
            StorageError: the storage does not answer.
        """
        with _answers(self._storage):
            trial = self._study.ask()
            number = trial.suggest_categorical(ALTERNATIVE, range(len(self._space.alternatives)))
            point = {
                key: _value(axis, _suggest(trial, f"{number}.{key}", axis))
                for key, axis in self._space.alternatives[number].items()
            }
            for key, value in point.items():
                trial.set_user_attr(key, value)
        self._asked.append((point, trial))
        return point

    def tell(self, point: Mapping[str, Any], values: Sequence[float] | None) -> None:
        """What a point gave, asked for or not; None where it failed.

        Raises:
            StorageError: the storage does not answer.
        """
        with _answers(self._storage):
            self._tell(point, values)

    def _tell(self, point: Mapping[str, Any], values: Sequence[float] | None) -> None:
        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        for number, (asked, trial) in enumerate(self._asked):
            if asked == point:
                del self._asked[number]
                self._study.tell(trial, values, state)
                return
        for number, alternative in enumerate(self._space.alternatives):
            params = {key: _parameter(axis, point.get(key)) for key, axis in alternative.items()}
            if point.keys() == alternative.keys() and None not in params.values():
                distributions: dict[str, BaseDistribution] = {
                    f"{number}.{key}": _distribution(axis) for key, axis in alternative.items()
                }
                distributions[ALTERNATIVE] = CategoricalDistribution(range(len(self._space.alternatives)))
                named = {f"{number}.{key}": value for key, value in params.items()} | {ALTERNATIVE: number}
                self._study.add_trial(
                    create_trial(
                        state=state, values=values, params=named, distributions=distributions, user_attrs=dict(point)
                    )
                )
                return


def open_storage(storage: str, name: str | None) -> BaseStorage:
    """A storage without a study of that name: one that an earlier attempt left there is removed.

    Raises:
        ConfigError: it cannot be opened, or holds a study of that name that is not ours.
    """
    try:
        if "://" in storage:
            opened: BaseStorage = RDBStorage(storage)
        else:
            journal = JournalFileBackend(str(Path(storage).expanduser()))
            opened = JournalStorage(journal)
        if name in optuna.get_all_study_names(opened):
            if OURS not in optuna.load_study(study_name=name, storage=opened).user_attrs:
                raise ConfigError(
                    f"--storage must not hold a study of somebody else called {name}, and {storage} does; name another"
                    " storage."
                )
            optuna.delete_study(study_name=str(name), storage=opened)
    except EqmDistError:
        raise
    except Exception as error:  # of the database, its driver, the file, or what is in it
        raise ConfigError(
            f"--storage must be a URL such as sqlite:///study.db or a file for Optuna's journal, and {storage} cannot"
            f" be opened ({_first_line(error)}); correct it, or leave it out."
        ) from error
    return opened


@contextmanager
def _answers(storage: str | None) -> Iterator[None]:
    """Say in one sentence that a storage has gone."""
    try:
        yield
    except Exception as error:
        if storage is None:
            raise
        raise StorageError(
            f"The storage {storage} must take what the search finds, but did not ({_first_line(error)}); run the same"
            " command again to go on, with another --storage or none if need be."
        ) from error


def _first_line(error: BaseException) -> str:
    """Of what lies under the layers of a database client."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _distribution(axis: Axis) -> BaseDistribution:
    """Choices by their place in the list: as neighbours where they are rising numbers."""
    if isinstance(axis, Choices):
        ordered = all(_is_number(value) for value in axis.values) and all(a < b for a, b in pairwise(axis.values))
        places = len(axis.values)
        return IntDistribution(0, places - 1) if ordered else CategoricalDistribution(range(places))
    if axis.whole:
        return IntDistribution(round(axis.low), round(axis.high), log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _suggest(trial: optuna.Trial, name: str, axis: Axis) -> Any:
    match _distribution(axis):
        case IntDistribution() as whole:
            return trial.suggest_int(name, whole.low, whole.high, log=whole.log)
        case FloatDistribution() as real:
            return trial.suggest_float(name, real.low, real.high, log=real.log)
        case choices:
            assert isinstance(choices, CategoricalDistribution)
            return trial.suggest_categorical(name, choices.choices)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(axis: Axis, parameter: Any) -> Any:
    return axis.values[parameter] if isinstance(axis, Choices) else axis.rounded(parameter)


def _parameter(axis: Axis, value: Any) -> Any:
    """What Optuna calls a value; None where the axis does not have it."""
    if isinstance(axis, Interval):
        return value if _is_number(value) and axis.low <= value <= axis.high else None
    return axis.values.index(value) if value in axis.values else None
