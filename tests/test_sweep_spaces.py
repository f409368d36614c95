"""Search spaces: what files say, which points follow, and what is refused before anything starts."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.config import Config
from eqm_dist.errors import ConfigError
from eqm_dist.options import options
from eqm_dist.sweeps.search import Search
from eqm_dist.sweeps.spaces import Interval, parse_space, read_space, trial_name
from eqm_dist.sweeps.stepsize.tpe import TpeSearch

KEYS = [option.key for option in options(Config)]
ETA, MU, NAME, NFE = (f"sampler.{key}" for key in ("step_size", "momentum", "name", "nfe"))
TWO_METHODS = [
    {NAME: "gd", ETA: {"log": [0.001, 0.1], "points": 3}},
    {NAME: "nag", ETA: {"log": ["1e-3", 0.1], "points": 3}, MU: [0.3, 0.6]},
]


def test_a_grid_has_every_combination_of_every_alternative() -> None:
    grid = parse_space(TWO_METHODS, KEYS, "test").grid()
    expected = [{NAME: "gd", ETA: eta} for eta in (0.001, 0.01, 0.1)]
    expected += [{NAME: "nag", ETA: eta, MU: mu} for eta in (0.001, 0.01, 0.1) for mu in (0.3, 0.6)]
    assert grid == expected


def test_axes_of_whole_numbers_have_whole_values_and_no_point_twice() -> None:
    space = parse_space({NFE: {"linear": [1, 3], "points": 9}}, KEYS, "test")
    assert [point[NFE] for point in space.grid()] == [1, 2, 3]
    assert all(isinstance(point[NFE], int) for point in space.random(20, seed=0))


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_random_points_lie_in_the_space_and_more_of_them_change_none(seed: int, trials: int) -> None:
    space = parse_space(TWO_METHODS, KEYS, "test")
    points = space.random(trials, seed)
    assert points == space.random(trials + 5, seed)[:trials]
    for point in points:
        assert 0.001 <= point[ETA] <= 0.1
        assert (MU in point) == (point[NAME] == "nag")


def test_a_log_axis_is_uniform_in_the_logarithm() -> None:
    values = [point[ETA] for point in parse_space({ETA: {"log": [1e-4, 1]}}, KEYS, "test").random(2000, seed=1)]
    # A fraction of 2,000 draws has a standard deviation of at most 0.011; four of them.
    assert sum(value < 1e-2 for value in values) / 2000 == pytest.approx(0.5, abs=0.045)


def test_what_varies_is_what_differs_between_trials() -> None:
    space = parse_space([{NAME: "gd", ETA: [0.1], NFE: 9}, {NAME: "nag", ETA: [0.1], MU: 0.3, NFE: 9}], KEYS, "test")
    assert space.varying() == [NAME, MU]


def test_the_name_of_a_trial_does_not_depend_on_the_order_of_its_keys() -> None:
    assert trial_name({ETA: 0.1, NFE: 3}) == trial_name({NFE: 3, ETA: 0.1})
    assert trial_name({ETA: 0.1, NFE: 3}) != trial_name({ETA: 0.1, NFE: 4})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sampler.stepsize": [1]},
            r"stepsize is not an option .*did you mean sampler.step_size",
        ),
        ({"train.steps": [1]}, "train.steps cannot be an axis of this sweep"),
        ({ETA: {"log": [0, 1], "points": 3}}, "must be a value, a list of choices, or an interval"),
        ({ETA: {"log": [1, 0.1]}}, "two rising ends"),
        ({ETA: {"log": [0.1, 1], "point": 3}}, "must be a value"),
        ({ETA: {"log": [0.1, 1], "points": 1}}, "points at least 2"),
        ({ETA: []}, "must be a value"),
        ([], "must be a mapping from keys to axes"),
        ("eta", "must be a mapping from keys to axes, .* holds str"),
    ],
)
def test_what_is_no_space_is_refused(values: object, message: str) -> None:
    sampler = [key for key in KEYS if key.startswith("sampler.")]
    with pytest.raises(ConfigError, match=message):
        parse_space(values, sampler, "test")


def test_an_interval_without_points_has_no_grid() -> None:
    with pytest.raises(ConfigError, match=r"needs its number of points in a grid, got \{log: \[0.1, 1\]\}"):
        parse_space({ETA: {"log": [0.1, 1]}}, KEYS, "test").grid()


def test_python_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "space.py").write_text(f"space = {{'{ETA}': [0.1 * 2**-n for n in range(3)]}}")
    (tmp_path / "space.yaml").write_text(f"{ETA}: [0.1, 0.05, 0.025]")
    assert read_space(str(tmp_path / "space.py"), KEYS) == read_space(str(tmp_path / "space.yaml"), KEYS)
    (tmp_path / "broken.yaml").write_text("{")
    for name, message in (("broken.yaml", "not valid YAML"), ("absent.yaml", "No such file")):
        with pytest.raises(ConfigError, match=message):
            read_space(str(tmp_path / name), KEYS)


def quality(point: dict[str, float]) -> float:
    """Best for nag near 0.02."""
    return math.log(point[ETA] / 0.02) ** 2 + (point[NAME] != "nag")


def test_tpe_finds_what_random_search_misses_and_learns_from_a_ledger() -> None:
    space = parse_space([{**part, ETA: {"log": [1e-5, 10]}} for part in TWO_METHODS], KEYS, "test")
    search = TpeSearch(space, objectives=["FID"], seed=0)
    found = []
    for _ in range(60):
        point = search.ask()
        found.append((quality(point), point))
        search.tell(point, [quality(point)])
    random = min(quality(point) for point in space.random(60, seed=0))
    assert min(found)[0] < random

    again = TpeSearch(space, objectives=["FID"], seed=0)  # after a kill: everything it is told it has not asked for
    for value, point in found:
        again.tell(point, [value])
    first, later = sum(value for value, _ in found[:8]), 0.0
    for _ in range(8):
        point = again.ask()
        again.tell(point, [quality(point)])
        later += quality(point)
    assert later < first / 2  # a search that knows nothing begins at random, all over six decades


def test_tpe_keeps_to_whole_numbers_and_to_the_choices() -> None:
    space = parse_space({NFE: {"log": [2, 40]}, NAME: ["gd", "nag"], ETA: [0.1, 0.2]}, KEYS, "test")
    search = TpeSearch(space, objectives=["FID", "NFE"], seed=0)
    for number in range(15):
        point = search.ask()
        assert isinstance(point[NFE], int)
        assert 2 <= point[NFE] <= 40
        assert point[NAME] in ("gd", "nag")
        assert point[ETA] in (0.1, 0.2)
        search.tell(point, None if number % 5 == 0 else [point[NFE], 1.0])


def test_the_text_of_an_interval_is_how_one_writes_it() -> None:
    assert str(Interval(0.1, 1, 3, log=False, whole=False)) == "{linear: [0.1, 1]}"


def test_a_python_file_may_hold_what_numpy_makes(tmp_path: Path) -> None:
    file = tmp_path / "space.py"
    file.write_text(
        "import numpy as np\n"
        f"space = ({{'{NAME}': 'gd', '{ETA}': np.geomspace(0.01, 0.04, 3), '{NFE}': list(np.arange(2, 4))}},\n"
        f"         {{'{NAME}': 'nag', '{ETA}': {{'log': np.array([0.01, 0.1]), 'points': np.int64(2)}},"
        f" '{MU}': np.float64(0.5), '{NFE}': range(5, 6)}})\n"
    )
    grid = read_space(str(file), KEYS).grid()
    assert [(point[ETA], point[NFE]) for point in grid[:6]] == [
        (pytest.approx(eta), nfe) for eta in (0.01, 0.02, 0.04) for nfe in (2, 3)
    ]
    assert [point[ETA] for point in grid[6:]] == [0.01, 0.1]
    for point in grid:
        assert {type(value) for value in point.values()} <= {int, float, str}
        assert json.loads(json.dumps(point)) == point
        trial_name(point)


@pytest.mark.parametrize("value", ["{1, 2}", "[object()]", "[b'x']", "1j", "np.array(['2020-01-01'], 'M8')"])
def test_what_no_record_can_hold_is_refused_in_a_sentence(tmp_path: Path, value: str) -> None:
    (tmp_path / "space.py").write_text(f"import numpy as np\nspace = {{'{ETA}': {value}}}\n")
    with pytest.raises(ConfigError, match=r"sampler.step_size must be numbers, texts, true, false or null, got"):
        read_space(str(tmp_path / "space.py"), KEYS)


def search(values: object, how: str = "grid", trials: int = 4) -> Search:
    return Search(parse_space(values, KEYS, "test"), how, trials, 0, Path("out"))


def test_a_grid_may_grow_and_a_random_search_may_draw_more() -> None:
    before = search(TWO_METHODS)
    kept = json.loads(json.dumps(before.settings))["space"]
    grown = [*TWO_METHODS, {NAME: "gd", ETA: [0.2]}]
    assert search(grown).may_change("space", kept)
    assert search([{NAME: "gd", ETA: [0.001, 0.01, 0.1]}, TWO_METHODS[1]]).may_change("space", kept)  # said otherwise
    for other in (TWO_METHODS[:1], [{NAME: "gd", ETA: [0.001]}, TWO_METHODS[1]]):
        assert not search(other).may_change("space", kept)
    for junk in (None, 3, [3], [{ETA: 3}], [{ETA: {"lo": 1}}], {"a": 1}, [{ETA: {"values": 3}}],
                 [{ETA: {"low": "a", "high": 2, "points": "x", "log": True, "whole": 1}}]):  # fmt: skip
        assert not search(grown).may_change("space", junk)
    assert not search(grown, "random").may_change("space", kept)  # its draws would be others
    assert search(grown, "random").may_change("trials", 3)
    assert not search(grown, "pbt").may_change("trials", 3)
    assert not search(grown, "pbt").may_change("space", kept)
