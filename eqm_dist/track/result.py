"""``result.json``: what a finished run reached, on which hardware and with which versions."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import eqm_dist
from eqm_dist.data.storage import atomic_write

RESULT_FILE = "result.json"
_PACKAGES = ("torch", "ray", "deepspeed", "webdataset", "mlflow", "torchmetrics", "numpy")


def write_result(run_directory: Path, result: dict[str, Any]) -> None:
    """Write the final metrics and everything needed to compare them with another run."""
    record = {**result, "hardware": _hardware(), "versions": _versions(), "commit": _commit()}
    atomic_write(run_directory / RESULT_FILE, (json.dumps(record, indent=1) + "\n").encode())


def read_result(run_directory: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = run_directory / RESULT_FILE
    return json.loads(path.read_bytes()) if path.exists() else None


def _hardware() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), "gpus": gpus}


def _versions() -> dict[str, str]:
    found = {"eqm_dist": eqm_dist.__version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Commit of the code, with ``+changes`` if the tree differs from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changes else "")
