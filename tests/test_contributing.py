"""The recipes of CONTRIBUTING.md, really followed on a copy of the package: at most three places, and it works.

Each recipe is the edits that a contributor makes, by file, and the test that comes with them.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

END = "\n<the end of the file>\n"
Edits = Mapping[str, Mapping[str, str]]
"""By file: what is found there, and what stands there afterwards."""

DECAY: Edits = {
    "eqm_dist/core/decay.py": {
        END: '''

@dataclass(frozen=True)
class CosineDecay:
    """c = lambda * cos(pi gamma / 2)."""

    gradient_scale: float

    @property
    def data_slope(self) -> float:
        return self.gradient_scale * math.pi / 2

    def __call__(self, gamma: Tensor) -> Tensor:
        return self.gradient_scale * (gamma * math.pi / 2).cos()
''',
    },
    "eqm_dist/config.py": {
        'family: Literal["constant", ': 'family: Literal["cosine", "constant", ',
    },
    "eqm_dist/build.py": {
        "core.decay import ConstantDecay, ": "core.decay import ConstantDecay, CosineDecay, ",
        '''    match decay.family:
''': '''    match decay.family:
        case "cosine":
            return CosineDecay(decay.gradient_scale)
''',
    },
}  # fmt: skip

SAMPLER: Edits = {
    "eqm_dist/core/samplers.py": {
        END: '''

@dataclass(frozen=True)
class SignDescent:
    """x_{k+1} = x_k + step_size * sign(field(x_k))."""

    step_size: float

    def start(self, x: Tensor, nfe: int, start_time: float) -> State:
        return ()

    def look(self, x: Tensor, state: State, progress: Tensor) -> tuple[Tensor, Tensor]:
        return x, progress

    def move(self, x: Tensor, state: State, field: Tensor, progress: Tensor) -> tuple[Tensor, State, None]:
        return x + self.step_size * field.sign(), (), None
''',
    },
    "eqm_dist/config.py": {
        'name: Literal["gd", ': 'name: Literal["sign", "gd", ',
        'Only("name", DESCENTS, 0.003)': 'Only("name", (*DESCENTS, "sign"), 0.003)',
    },
    "eqm_dist/build.py": {
        "    Sampler,\n)": "    Sampler,\n    SignDescent,\n)",
        """    match sampler.name:
""": """    match sampler.name:
        case "sign":
            return SignDescent(required(sampler.step_size))
""",
    },
}

METRIC: Edits = {
    "eqm_dist/evaluate/metrics.py": {
        END: '''

def mean_distance(first: FeatureMoments, second: FeatureMoments) -> float:
    """Distance of the means of the features."""
    return (first.total / first.count - second.total / second.count).norm().item()
''',
    },
    "eqm_dist/metric_settings.py": {
        'MetricName = Literal["fid", ': 'MetricName = Literal["mean", "fid", ',
    },
    "eqm_dist/evaluate/statistics.py": {
        "    kernel_distance,\n": "    kernel_distance,\n    mean_distance,\n",
        'METRICS: dict[MetricName, Metric] = {\n': '''METRICS: dict[MetricName, Metric] = {
    "mean": Metric(MOMENTS, lambda generated, reference, _: {"mean": mean_distance(generated, reference)}),
''',
    },
}  # fmt: skip

RECIPES = {"c(gamma)": DECAY, "sampler": SAMPLER, "metric": METRIC}

TEST = """
import math

import torch

from eqm_dist.build import build_decay, build_sampler
from eqm_dist.config import Config, DecayConfig, SamplerConfig
from eqm_dist.core.sampling import SamplingMethod, sample
from eqm_dist.evaluate.statistics import compute, image_statistics, parts_of
from eqm_dist.options import options, with_overrides
from eqm_dist.presets import digits
from eqm_dist.sweeps.spaces import parse_space


def test_the_decay():
    config = with_overrides(digits(), {"objective.decay.family": "cosine"})
    decay = build_decay(config.objective.decay)
    torch.testing.assert_close(decay(torch.tensor([0.0, 1.0])), torch.tensor([4.0, 0.0]), atol=1e-6, rtol=0)
    assert config.objective.decay.decay_start is None
    parse_space({"objective.decay.family": ["cosine"]}, [option.key for option in options(Config)], "a test")


def test_the_sampler():
    config = with_overrides(digits(), {"sampler.name": "sign"})
    assert (config.sampler.step_size, config.sampler.momentum) == (0.02, None)
    method = SamplingMethod(build_sampler(config.sampler), nfe=5)
    assert torch.allclose(sample(lambda x: -x, torch.ones(1, 2), method).samples, torch.full((1, 2), 0.9))


def test_the_metric():
    class Pixels(torch.nn.Module):
        num_features = 4

        def forward(self, images):
            return images.flatten(1).float()

    ones, threes = (torch.full((3, 2, 2, 1), value, dtype=torch.uint8) for value in (1, 3))
    sides = [image_statistics(Pixels(), [images], parts=parts_of(["mean"])) for images in (ones, threes)]
    assert math.isclose(compute(["mean"], *sides)["mean"], 4.0)
    assert with_overrides(digits(), {"launch.launcher": "local", "evaluation.metrics": ["fid", "mean"]})
"""


def follow(edits: Edits, copy: Path) -> None:
    """Make the edits in a copy of the package."""
    for name, changes in edits.items():
        text = (copy / name).read_text(encoding="utf-8") + END
        for found, then in changes.items():
            assert text.count(found) == 1, f"{name} must have {found!r} once; bring the recipe up to date"
            text = text.replace(found, then + (END if found == END else ""))
        (copy / name).write_text(text.replace(END, ""), encoding="utf-8")


def copied(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "eqm_dist", tmp_path / "eqm_dist", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_at_most_three_places_and_names_them(recipe: str) -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    places = [f"`{name}`" for name in RECIPES[recipe]]
    assert len(places) <= 3
    assert [place for place in places if place not in text] == []


def test_what_the_recipes_add_works(tmp_path: Path) -> None:
    copy = copied(tmp_path)
    for edits in RECIPES.values():
        follow(edits, copy)
    (copy / "test_added.py").write_text(TEST, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_added.py"],
        cwd=copy,
        env={"PYTHONPATH": str(copy), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 passed" in ended.stdout


@pytest.mark.slow  # the type checker takes half a minute
@pytest.mark.parametrize(
    ("recipe", "place"),
    [("c(gamma)", "eqm_dist/build.py"), ("sampler", "eqm_dist/build.py")],
)
def test_the_type_checker_names_what_a_variant_added_by_half_lacks(recipe: str, place: str, tmp_path: Path) -> None:
    copy = copied(tmp_path)
    follow({name: edits for name, edits in RECIPES[recipe].items() if name != place}, copy)
    ended = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, place],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 1
    assert "assert_never" in ended.stdout
