"""What the front door promises: the README's code, the pins, and how little an import or --help costs."""

import ast
import os
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def readme_block(marker: str) -> str:
    """The one Python block of the README that contains ``marker``."""
    (block,) = [block for block in PYTHON_BLOCKS if marker in block]
    return block


def python(*arguments: str) -> str:
    """What a fresh interpreter prints, run in the root of the repository."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_use_of_the_numerics_runs_as_it_stands() -> None:
    names: dict[str, Any] = {}
    exec(readme_block("NesterovGradientDescent(step_size"), names)
    result, field, loss, model = names["result"], names["field"], names["loss"], names["model"]
    assert tuple(field.shape) == tuple(result.samples.shape) == (16, 1, 8, 8)
    assert tuple(loss.shape) == (16,)
    assert result.nfe.tolist() == [249] * 16
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_decisions_are_numbered_without_a_gap() -> None:
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    for number, page in enumerate(pages, start=1):
        assert page.name.startswith(f"{number:04d}-")
        assert page.read_text(encoding="utf-8").startswith(f"# {number}. ")


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(name): Version(version)
        for name, version in (line.split("==") for line in lines if line and not line.startswith("#"))
    }
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in (*project["dependencies"], *extras["dev"], *extras["docs"])]
    assert {requirement.name: str(requirement.specifier) for requirement in asked if not requirement.specifier} == {}
    for requirement in asked:
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    # A local version (+cpu, +cu128) would decide for every machine which build it gets.
    assert [name for name, version in pins.items() if version.local] == []


def test_the_numerics_work_without_any_of_the_platform() -> None:
    # The finder stands first, so that it is asked before any that could find the real package.
    code = """
import sys

class Missing:
    names = {"ray", "deepspeed", "mlflow", "webdataset", "boto3", "pydantic", "yaml", "sklearn", "torchmetrics", "PIL"}
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in cls.names:
            raise ModuleNotFoundError(f"{name} is not installed")

sys.meta_path.insert(0, Missing)
import importlib, pkgutil
import eqm_dist.core, eqm_dist.models, eqm_dist.rng
for package in (eqm_dist.core, eqm_dist.models):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
try:
    import ray
except ModuleNotFoundError:
    print("without ray")
"""
    assert python("-c", code) == "without ray\n"


@pytest.mark.parametrize("part", ["core", "rng.py"])
def test_the_numerics_import_torch_and_numpy_only(part: str) -> None:
    path = ROOT / "eqm_dist" / part
    allowed = {"torch", "numpy", *sys.stdlib_module_names}
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                inside = module.startswith("eqm_dist.core") or module == "eqm_dist.errors"
                assert inside or module.split(".")[0] in allowed, f"{file.name} imports {module}"


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        assert "--train.steps" in python("pipelines/train.py", "--help")
        after = os.times()
        # CPU time: what the answer takes on an idle machine, whatever else runs on this one.
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert statistics.median(seconds) < 1


def test_help_imports_nothing_heavy() -> None:
    # One process for all: what one command imported would show in those after it too.
    code = """
import contextlib, io, runpy, sys
heavy = set("torch numpy ray deepspeed mlflow webdataset sklearn matplotlib torchmetrics diffusers".split())
for command in sys.argv[1:]:
    sys.argv = [command, "--help"]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(command, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (command, end.code)
    print(command, sorted(heavy & set(sys.modules)))
"""
    commands = sorted(str(path) for path in (ROOT / "pipelines").glob("*.py"))
    assert python("-c", code, *commands).splitlines() == [f"{command} []" for command in commands]
