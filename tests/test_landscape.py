"""Landscapes on the plane: the toy data, what is learned, and the command."""

import contextlib
import io
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image

from eqm_dist.commands.landscape import main
from eqm_dist.core.energy import ExplicitEnergy
from eqm_dist.errors import ConfigError
from eqm_dist.tasks.landscape import (
    METHODS,
    NFE,
    STEP_SIZE,
    Landscape,
    Method,
    PlaneField,
    ToyData,
    energy_distance,
    toy_data,
    train,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", get_args(ToyData))
def test_toy_data_is_centred_and_a_function_of_the_generator(name: ToyData) -> None:
    points = toy_data(name, 20_000, generator())
    assert torch.equal(points, toy_data(name, 20_000, generator()))
    assert not torch.equal(points, toy_data(name, 20_000, generator(1)))
    # Coordinates have a deviation of at most 1.5; 5 standard errors of 20,000 are 0.05.
    assert points.mean(0).abs().max() < 0.06
    assert 0.5 < points.std() < 1.6


def test_toy_data_lies_where_its_name_says() -> None:
    gaussians = toy_data("gaussians", 4000, generator())
    angles = 2 * math.pi / 8 * torch.arange(8)
    distances = torch.cdist(gaussians, 2 * torch.stack([angles.cos(), angles.sin()], dim=1))
    assert distances.min(1).values.max() < 0.6  # six standard deviations
    assert (distances.argmin(1).bincount() > 350).all()
    board = toy_data("checkerboard", 4000, generator())
    assert ((board >= -2) & (board <= 2)).all()
    assert (board.floor().sum(1) % 2 == 0).all()  # one colour of the board
    assert {tuple(field) for field in board.floor().tolist()} == {
        (float(i), float(j)) for i in range(-2, 2) for j in range(-2, 2) if (i + j) % 2 == 0
    }
    moons = toy_data("moons", 4000, generator()) / 1.6 + torch.tensor([0.5, 0.25])
    to_arcs = torch.stack([moons.norm(dim=1), (moons - torch.tensor([1.0, 0.5])).norm(dim=1)], dim=1) - 1
    assert to_arcs.abs().min(1).values.max() < 0.3


def test_unknown_toy_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of moons, gaussians, checkerboard, got spiral"):
        toy_data("spiral", 10, generator())  # pyright: ignore[reportArgumentType]


def test_energy_distance_in_closed_form() -> None:
    # Two points 3 apart: 2 * 3 - 0 - 0. A pair against its middle, 1 away from both: 2 * 1 - 1 - 0.
    origin, three = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert energy_distance(origin, three) == pytest.approx(6)
    assert energy_distance(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), origin) == pytest.approx(1)
    points = toy_data("moons", 100, generator())
    assert energy_distance(points, points) == pytest.approx(0, abs=1e-6)


def test_trajectories_are_descent_and_for_flow_matching_steps_through_time() -> None:
    start = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    trajectories = Landscape("eqm", lambda x, labels: -x).trajectories(start)
    assert torch.equal(trajectories[0], start)
    torch.testing.assert_close(trajectories[-1], start * (1 - STEP_SIZE) ** NFE)
    # A velocity of gamma: Euler steps at 0, 1/N ... (N - 1)/N add up to (N - 1) / 2N.
    trajectories = Landscape("flow_matching", lambda x, labels, gamma: gamma[:, None].expand(-1, 2)).trajectories(start)
    torch.testing.assert_close(trajectories[-1] - start, torch.full((2, 2), (NFE - 1) / (2 * NFE)))


@pytest.mark.parametrize("method", METHODS)
def test_training_brings_samples_to_the_data(method: Method) -> None:
    data = toy_data("gaussians", 500, generator(1))
    start = torch.randn(500, 2, generator=generator(2))
    trajectories = train(method, "gaussians", 150, seed=0).trajectories(start)
    # After 150 of 2,000 steps: a fifth of the way that noise was from data.
    assert energy_distance(trajectories[-1], data) < 0.2 * energy_distance(start, data)


@pytest.mark.parametrize("method", METHODS)
def test_training_is_a_function_of_its_arguments(method: Method) -> None:
    start = torch.randn(5, 2, generator=generator(2))
    trajectories = [train(method, "moons", 3, seed=seed).trajectories(start) for seed in (0, 0, 1)]
    assert torch.equal(trajectories[0], trajectories[1])
    assert not torch.equal(trajectories[0], trajectories[2])


def test_descent_of_an_explicit_energy_never_climbs() -> None:
    landscape = train("eqm_energy", "moons", 100, seed=0)
    trajectories = landscape.trajectories(torch.randn(200, 2, generator=generator(3)))
    with torch.no_grad():
        energies = torch.stack([landscape.energy(points) for points in trajectories])
    # fp32 keeps 7 digits of energies of the size of one.
    assert (energies.diff(dim=0) <= 1e-5).all()
    assert (energies[-1] < energies[0]).all()


def test_a_field_is_the_gradient_of_its_energy_only_where_it_has_one() -> None:
    model = PlaneField(timed=False, generator=generator())
    x = torch.randn(5, 2, generator=generator(1))
    landscape = Landscape("eqm_energy", ExplicitEnergy(model, "dot"))
    step = 1e-2
    for axis in torch.eye(2):
        with torch.no_grad():
            slope = (landscape.energy(x + step * axis) - landscape.energy(x - step * axis)) / (2 * step)
        # A central difference in fp32: rounding 1e-7 / step and a third derivative times step^2.
        torch.testing.assert_close(landscape.at(x, 0).detach() @ axis, -slope, rtol=0, atol=5e-3)


def run(*arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(arguments)
    return out.getvalue()


def test_the_command_writes_both_pictures_and_tells_how_far_samples_are(tmp_path: Path) -> None:
    printed = run("--steps", "5", "--data", "checkerboard", "--out", str(tmp_path / "pictures"))
    distances = dict(re.findall(r"^(\w+) +energy distance to data ([\d.]+)$", printed, flags=re.MULTILINE))
    assert list(distances) == ["flow_matching", "eqm", "eqm_energy", "data"]
    assert all(float(distances[method]) > float(distances["data"]) for method in METHODS)
    with Image.open(tmp_path / "pictures" / "landscape.png") as picture:
        assert picture.width > 1000
    animation = tmp_path / "pictures" / "descent.gif"
    assert animation.stat().st_size < 2_000_000
    with Image.open(animation) as frames:
        assert getattr(frames, "n_frames", 0) == 36
        assert frames.info["loop"] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--steps", "0"], "Argument --steps: must be a whole number of at least 1, got 0; see --help."),
        (["--seed", "-1"], "Argument --seed: must be a whole number from 0 to 2**63 - 1, got -1; see --help."),
        (["--data", "spiral"], "invalid choice: 'spiral'"),
    ],
)
def test_bad_flags_are_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        main(arguments)
