"""``eqm-dist``: the commands of an installed package, from a directory where there is no checkout."""

import os
import runpy
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import yaml

import eqm_dist
from eqm_dist.__main__ import COMMANDS, main
from tests import tiny

ROOT = Path(__file__).parent.parent
SCRIPTS = [*(ROOT / "pipelines").glob("*.py"), *(ROOT / "tuning").glob("*.py")]
HEAVY = "torch numpy ray deepspeed mlflow webdataset sklearn matplotlib torchmetrics diffusers pydantic yaml"


def run(*arguments: str, path: Path = ROOT, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` that finds the package at ``path``."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=directory, env=environment, capture_output=True, text=True, timeout=120
    )


def eqm_dist_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "eqm_dist", *arguments)


# --- the list ---


def test_every_command_has_a_module_a_script_and_a_name() -> None:
    names = {name.replace("-", "_") for name in COMMANDS}
    assert {path.stem for path in (ROOT / "eqm_dist" / "commands").glob("[!_]*.py")} == names
    assert {path.stem for path in SCRIPTS} == names


def test_help_lists_every_command_in_a_line_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
sys.argv = ["eqm-dist", "--help"]
from eqm_dist.__main__ import main
try:
    main()
except SystemExit as end:
    assert end.code == 0
print(sorted(set({HEAVY!r}.split()) & set(sys.modules)))
"""
    seconds, printed = [], ""
    for _ in range(3):
        before = os.times()
        printed = run("-c", code).stdout
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    # CPU time, and the least of it: what the answer takes on an idle machine, whatever else runs on this one.
    assert min(seconds) < 0.5
    *lines, heavy = printed.splitlines()
    assert heavy == "[]"
    for name, text in COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split(maxsplit=1)[1] == text
        assert len(line) <= 80


def test_version_is_that_of_the_package() -> None:
    done = eqm_dist_command("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"eqm-dist {eqm_dist.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], "error: trian is not a command; did you mean train?\n"),
        (["sweep_decay"], "error: sweep_decay is not a command; did you mean sweep-decay?\n"),
        (["zebra"], "error: zebra is not a command; see eqm-dist --help for all commands.\n"),
        ([], "error: A command must be given; see eqm-dist --help for all commands.\n"),
        (["train", "--train.step", "5"], "error: --train.step is not an option (command line); did you mean"
         " --train.steps?\n"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    done = eqm_dist_command(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)


# --- help, by either way ---


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_the_command_as_it_was_started(script: Path) -> None:
    name = script.stem.replace("_", "-")
    by_script = tiny.run(partial(runpy.run_path, str(script), run_name="__main__"), str(script), "--help")
    by_program = tiny.run(main, "eqm-dist", name, "--help")
    assert (by_script.code, by_program.code) == (0, 0), by_script.err + by_program.err
    assert by_script.out.startswith(f"usage: {script.name} [")
    assert f"\npython {script.relative_to(ROOT).as_posix()} " in by_script.out
    assert "eqm-dist " not in by_script.out
    assert by_program.out.startswith(f"usage: eqm-dist {name} [")
    assert f"\neqm-dist {name} " in by_program.out
    assert not any(place in by_program.out for place in ("python ", "pipelines/", "tuning/"))


def test_a_refusal_names_the_command_that_there_is(tmp_path: Path) -> None:
    # What the sentence advises has to exist for whoever reads it.
    arguments = ["--launcher", "local", "--data.shards", str(tmp_path / "none"), "--run.root", str(tmp_path)]
    done = tiny.run(main, "eqm-dist", "train", *arguments)
    assert done.code == 2
    assert "`eqm-dist prepare-shards --source digits" in done.err
    assert "`python pipelines/prepare_shards.py --source digits" in tiny.train(*arguments).err


# --- the wheel ---


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the built wheel is installed; nothing is fetched."""
    here = tmp_path_factory.mktemp("wheel")
    # A copy, so that the build leaves nothing in the checkout and finds nothing of an earlier one.
    source = here / "source"
    shutil.copytree(ROOT / "eqm_dist", source / "eqm_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    build = run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(here), str(source))
    assert build.returncode == 0, build.stderr
    (wheel,) = here.glob("*.whl")
    target = here / "target"
    install = run(*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    assert install.returncode == 0, install.stderr
    return target


def packaged(installed: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The console script of the wheel, in ``directory``."""
    return run(str(installed / "bin" / "eqm-dist"), *arguments, path=installed, directory=directory)


def test_a_wheel_trains_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    where = run("-c", "import eqm_dist; print(eqm_dist.__file__)", path=installed, directory=tmp_path).stdout
    assert where == f"{installed / 'eqm_dist' / '__init__.py'}\n"
    done = packaged(installed, tmp_path, "train", "--dry-run", "--run.root", str(tmp_path / "runs"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "largest stable step" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_brings_its_search_spaces(installed: Path, tmp_path: Path) -> None:
    helped = packaged(installed, tmp_path, "sweep-stepsize", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    planned = packaged(installed, tmp_path, "sweep-decay", "--dry-run", "--run.root", str(tmp_path / "runs"))
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "(grid: 4 points x 3 seeds)" in planned.stdout  # a point for each family of c(gamma)


def test_a_wheel_holds_the_package_alone_with_its_types(installed: Path) -> None:
    assert (installed / "eqm_dist" / "py.typed").is_file()
    assert {path.name for path in installed.iterdir() if "dist-info" not in path.name} == {"bin", "eqm_dist"}
    in_tree = {
        path.relative_to(ROOT)
        for path in (ROOT / "eqm_dist").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {
        path.relative_to(installed)
        for path in (installed / "eqm_dist").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert in_wheel == in_tree


# --- what others read of the package ---


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == eqm_dist.__version__
    assert citation["license"] == project["license"]
    assert citation["title"] == project["name"]
    assert "arxiv.org/abs/2510.02300" in str(citation["references"])
