"""``result.json``: what a finished run reached, on which hardware and with which versions."""

import math
from pathlib import Path
from typing import Any

from eqm_dist.documents import mapping_from_json, read_bounded, to_json
from eqm_dist.errors import DataError
from eqm_dist.provenance import provenance
from eqm_dist.run_directory import RESULT_FILE
from eqm_dist.storage.files import atomic_write


def write_result(run_directory: Path, result: dict[str, Any]) -> None:
    """Write the final metrics and everything needed to compare them with another run."""
    record = {**result, **provenance()}
    atomic_write(run_directory / RESULT_FILE, (to_json(record, 1) + "\n").encode())


def read_result(run_directory: Path) -> dict[str, Any] | None:
    """The result of a finished run, or None.

    Raises:
        DataError: it is damaged.
    """
    path = run_directory / RESULT_FILE
    if not path.exists():
        return None
    try:
        result = mapping_from_json(read_bounded(path))
        if type(result.get("step")) is not int or not isinstance(result.get("metrics"), dict):
            raise ValueError("it has no step or no metrics")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} must be the result of the run ({error}); delete it, and the run goes on from its last checkpoint."
        ) from None
    metrics = {name: math.nan if value is None else value for name, value in result["metrics"].items()}
    return result | {"metrics": metrics}
