"""The directory of a run: the names of all that lies in it, once, and which of it is copied to a mirror.

RUNS/NAME/config.yaml            the values in effect
RUNS/NAME/manifest.json          that of its data; manifest-1.json, ... of a mixture
RUNS/NAME/metrics.jsonl          a line for each reported step
RUNS/NAME/attempts.jsonl         when it ran, from which step to which
RUNS/NAME/result.json            how it ended
RUNS/NAME/mlflow.json            where it is recorded
RUNS/NAME/checkpoints/           see ``train.checkpoint``
RUNS/NAME/evaluations/           see ``train.evaluations``
RUNS/NAME/samples/               a picture for each evaluation
RUNS/NAME/logs/                  a file for each worker
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from eqm_dist.storage.lease import LEASE_FILE

CONFIG_FILE = "config.yaml"
MANIFEST_FILE = "manifest.json"
METRICS_FILE = "metrics.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"
RESULT_FILE = "result.json"
MLFLOW_FILE = "mlflow.json"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
SAMPLES = "samples"
LOGS = "logs"
MARKER = "COMPLETE.json"
"""Written last into a checkpoint: one without it is none."""
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints; it lies there because a run's directory is Ray's too (docs/decisions/0006)."""

SIGN_FILE = ".root"
"""What the driver leaves for the workers to find (``launch.shared_root``)."""

REPORTS = (CONFIG_FILE, "manifest*.json", METRICS_FILE, ATTEMPTS_FILE, RESULT_FILE)
"""What a mirror copies, besides the results and pictures of steps (``is_report``), the checkpoints and
``MLFLOW_FILE``, of which it decides by itself."""
OF_ONE_MACHINE = (
    MLFLOW_FILE,
    LEASE_FILE,
    SIGN_FILE,
    RAY_SNAPSHOT,
    f"{LOGS}/*",
    f"{EVALUATIONS}/*.safetensors",
    f"{CHECKPOINTS}/*",
)
"""What it does not copy as a report. A new file of a run belongs into one of the two."""


def is_report(name: str) -> bool:
    """Whether a file is copied to a mirror, by its path in the run directory."""
    place, _, file = name.rpartition("/")
    if place == EVALUATIONS:
        return result_step(file) is not None
    return file in _pictures([file]) if place == SAMPLES else _matches(name, REPORTS)


def is_known(name: str) -> bool:
    """Whether anything here says what becomes of a file."""
    return is_report(name) or _matches(name, OF_ONE_MACHINE)


def manifest_file(number: int) -> str:
    """Name of the copy of a data set's manifest, by its number in the mixture."""
    return f"manifest-{number}.json" if number else MANIFEST_FILE


def step_name(step: int) -> str:
    """How files and directories of a step begin: ``step_00000500``."""
    return f"step_{step:08d}"


def step_in(name: str) -> int | None:
    """The step of a name that ``step_name`` gives; None for any other, such as that of a copy which a user made.

    Only what has a name of ours is ours: to go on from, to count, to move and to remove.
    """
    digits = name.removeprefix("step_")
    # "²" is a digit too, and "0000000004" a number, but neither is a name that we write.
    return int(digits) if digits.isdecimal() and len(digits) < 20 and name == step_name(int(digits)) else None


def checkpoints_in(directory: Path) -> dict[int, Path]:
    """What lies in a directory of checkpoints under a name of ours, by rising step."""
    with suppress(FileNotFoundError, NotADirectoryError):
        names = {step_in(name): name for name in os.listdir(directory)}
        return {step: directory / names[step] for step in sorted(step for step in names if step is not None)}
    return {}


def whole_checkpoints(directory: Path) -> dict[int, Path]:
    """Those of them that have a marker."""
    return {step: path for step, path in checkpoints_in(directory).items() if (path / MARKER).exists()}


def set_aside_step(name: str) -> int | None:
    """The step of a damaged checkpoint that was set aside: ``damaged-step_00000500``, ``damaged-step_00000500.2``."""
    found = re.fullmatch(r"damaged-(step_\d+)(\.\d+)?", name)
    return step_in(found[1]) if found else None


def result_step(file: str) -> int | None:
    """The step of a file in ``EVALUATIONS``; None where it is none of ours."""
    name, dot, ending = file.partition(".")
    return step_in(name) if dot + ending == ".json" else None


def picture_name(kind: str, step: int) -> str:
    """Name of a picture in ``SAMPLES``: ``samples_step00002000.png``."""
    return f"{kind}_step{step:08d}.png"


def pictures(directory: Path) -> list[Path]:
    """The pictures of a run, in the order of their steps."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return [directory / SAMPLES / name for name in _pictures(os.listdir(directory / SAMPLES))]
    return []


def _pictures(names: Iterable[str]) -> list[str]:
    """Those of the names that ``picture_name`` gives, by kind and step."""
    matches = [found for name in names if (found := re.fullmatch(r"([a-z]+)_step(\d{8,18})\.png", name))]
    return [found[0] for found in sorted(matches, key=lambda found: (found[1], int(found[2])))]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """As a shell matches: a star does not cross directories, but for those that are left alone whole."""
    whole = (LOGS, CHECKPOINTS)
    fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
    return any(pattern.startswith(whole) or name.count("/") == pattern.count("/") for pattern in fitting)
