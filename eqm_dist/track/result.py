"""``result.json``: what a finished run reached, on which hardware and with which versions."""

import json
from pathlib import Path
from typing import Any

from eqm_dist.provenance import provenance
from eqm_dist.run_directory import RESULT_FILE
from eqm_dist.storage.files import atomic_write


def write_result(run_directory: Path, result: dict[str, Any]) -> None:
    """Write the final metrics and everything needed to compare them with another run."""
    record = {**result, **provenance()}
    atomic_write(run_directory / RESULT_FILE, (json.dumps(record, indent=1) + "\n").encode())


def read_result(run_directory: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None."""
    path = run_directory / RESULT_FILE
    return json.loads(path.read_bytes()) if path.exists() else None
