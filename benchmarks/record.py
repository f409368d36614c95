"""What every benchmark leaves: one JSON file with the command, the hardware and the commit beside the figures."""

import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_loader import cpu_name
from eqm_dist.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def device_name(device: torch.device) -> str:
    """The GPU, or the processor, as its driver or the kernel names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def write_record(what: str, device: torch.device, results: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``WHAT_DEVICE_DATE.json``; a record of the same day on the same device is replaced.

    Args:
        what: one word for the benchmark.
        device: on which it ran.
        results: its figures, and what they are of.
        folder: where the file goes.
    """
    made = provenance()
    hardware = {**made["hardware"], "device": device_name(device), "load": list(os.getloadavg())}
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(device_name(device).lower().split()[:3])).strip("-")
    now = datetime.now(UTC)
    path = folder / f"{what}_{name}_{now:%Y-%m-%d}.json"
    module = f"{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}"
    command = f"python -m {module} {' '.join(sys.argv[1:])}".strip()
    record = {"command": command, "date": f"{now:%Y-%m-%dT%H:%M:%SZ}", **made, "hardware": hardware, **results}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
