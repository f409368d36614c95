"""What a figure was made with: hardware, versions and commit, so that it can be compared with another."""

import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("eqm_dist", "torch", "ray", "deepspeed", "webdataset", "mlflow", "torchmetrics", "numpy")


def provenance() -> dict[str, Any]:
    """``hardware``, ``versions`` and ``commit``, for the records of runs, samples and evaluations."""
    return {"hardware": _hardware(), "versions": _versions(), "commit": _commit()}


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "gpus": gpus}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Commit of the code, with ``+changes`` if the tree differs from it; None outside a checkout of its own.

    A repository that lies around an installed package is not the code's, so only one whose root holds this package
    counts. Nothing that it configures is run: it may have come from anybody.
    """
    root = Path(__file__).parents[1]
    try:
        place, common = _git_directories(root)
        commit = _resolved((place / "HEAD").read_text().strip(), place, common)
        return commit and commit + _changes(root, place, common, commit)
    except (OSError, ValueError):
        return None


def _git_directories(root: Path) -> tuple[Path, Path]:
    """The git directory of a working tree, and the one that it shares with others of the repository.

    Raises:
        OSError: there is none.
    """
    place = root / ".git"
    if place.is_file():  # a worktree, or a submodule
        place = root / place.read_text().removeprefix("gitdir:").strip()
    shared = place / "commondir"
    return place, place / shared.read_text().strip() if shared.exists() else place


def _resolved(head: str, place: Path, common: Path) -> str | None:
    """The commit that HEAD names; None before the first one."""
    if not head.startswith("ref: "):
        return head
    name = head.removeprefix("ref: ")
    for directory in (place, common):
        if (directory / name).is_file():
            return (directory / name).read_text().strip()
    packed = common / "packed-refs"
    lines = packed.read_text().splitlines() if packed.exists() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def _changes(root: Path, place: Path, common: Path, commit: str) -> str:
    """``+changes``, or nothing; ``+unknown`` where git cannot tell.

    git runs programs that a repository's config names, for file-system monitors and filters. So it works in an empty
    directory with a config of its own, and takes only the objects and the index of the repository.
    """
    with tempfile.TemporaryDirectory() as empty:
        directory = Path(empty)
        (directory / "refs").mkdir()
        (directory / "HEAD").write_text(f"{commit}\n")
        (directory / "config").write_text("[core]\n\trepositoryformatversion = 0\n\tbare = false\n")
        surroundings = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        own = {
            "GIT_DIR": empty,
            "GIT_WORK_TREE": str(root),
            "GIT_INDEX_FILE": str(place / "index"),
            "GIT_OBJECT_DIRECTORY": str(common / "objects"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_OPTIONAL_LOCKS": "0",
        }
        ignored = f"core.excludesFile={common / 'info' / 'exclude'}"
        try:
            found = subprocess.run(
                ["git", "-c", ignored, "status", "--porcelain", "--ignore-submodules"],
                capture_output=True, check=True, cwd=root, env=surroundings | own, timeout=60,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return "+unknown"
    return "+changes" if found.stdout else ""
