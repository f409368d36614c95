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
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints; it lies there because a run's directory is Ray's too (docs/decisions/0006)."""

REPORTS = (CONFIG_FILE, "manifest*.json", METRICS_FILE, ATTEMPTS_FILE, RESULT_FILE, f"{SAMPLES}/*.png",
           f"{EVALUATIONS}/step_*.json")  # fmt: skip
"""What a mirror copies, besides the checkpoints and ``MLFLOW_FILE``, of which it decides by itself."""
OF_ONE_MACHINE = (
    MLFLOW_FILE,
    LEASE_FILE,
    RAY_SNAPSHOT,
    f"{LOGS}/*",
    f"{EVALUATIONS}/*.safetensors",
    f"{CHECKPOINTS}/*",
)
"""What it does not copy as a report. A new file of a run belongs into one of the two."""


def is_report(name: str) -> bool:
    """Whether a file is copied to a mirror, by its path in the run directory."""
    return _matches(name, REPORTS)


def is_known(name: str) -> bool:
    """Whether anything here says what becomes of a file."""
    return _matches(name, (*REPORTS, *OF_ONE_MACHINE))


def manifest_file(number: int) -> str:
    """Name of the copy of a data set's manifest, by its number in the mixture."""
    return f"manifest-{number}.json" if number else MANIFEST_FILE


def step_name(step: int) -> str:
    """How files and directories of a step begin: ``step_00000500``."""
    return f"step_{step:08d}"


def picture_name(kind: str, step: int) -> str:
    """Name of a picture in ``SAMPLES``: ``samples_step00002000.png``."""
    return f"{kind}_step{step:08d}.png"


def pictures(directory: Path) -> list[Path]:
    """The pictures of a run, in the order of their steps."""
    return sorted((directory / SAMPLES).glob("*.png"))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """As a shell matches: a star does not cross directories, but for those that are left alone whole."""
    whole = (LOGS, CHECKPOINTS)
    fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
    return any(pattern.startswith(whole) or name.count("/") == pattern.count("/") for pattern in fitting)
