"""Points proposed by Optuna's TPE, asked for and told in batches.

Optuna itself and not Ray Tune's wrapper of it: what was found lies in the sweep's own ledger, from which the study is
made anew whenever the command starts, so there is no second state to keep, and several objectives are told as they are.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from eqm_dist.sweeps.spaces import Axis, Choices, Interval, Overrides, Space

ALTERNATIVE = "alternative"


class TpeSearch:
    """Asks for points and is told what they gave; the smaller, the better.

    Args:
        space: what is searched.
        objectives: how many values a point has; with two or more the points converge to their Pareto front.
        seed: of the proposals, which also depend on everything that was told before.
    """

    def __init__(self, space: Space, objectives: int, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)  # it lies of what is asked and not told
        self._study = optuna.create_study(directions=[StudyDirection.MINIMIZE] * objectives, sampler=sampler)
        self._space = space
        self._asked: list[tuple[Overrides, optuna.Trial]] = []

    def ask(self) -> Overrides:
        """A point; two asks may give the same."""
        trial = self._study.ask()
        number = trial.suggest_categorical(ALTERNATIVE, range(len(self._space.alternatives)))
        point = {
            key: _value(axis, _suggest(trial, f"{number}.{key}", axis))
            for key, axis in self._space.alternatives[number].items()
        }
        self._asked.append((point, trial))
        return point

    def tell(self, point: Mapping[str, Any], values: Sequence[float] | None) -> None:
        """What a point gave, asked for or not; None where it failed."""
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
                    create_trial(state=state, values=values, params=named, distributions=distributions)
                )
                return


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
