"""An open run as plain values, which reach other processes whatever they have imported."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eqm_dist.build import OpenRun
from eqm_dist.config import Config
from eqm_dist.options import dump, parse
from eqm_dist.track.mlflow import MlflowRun


def pack(opened: OpenRun) -> dict[str, Any]:
    """As lists, dicts and scalars."""
    return {
        "config": dump(opened.config),
        "directory": str(opened.directory),
        "mlflow": asdict(opened.mlflow) if opened.mlflow else None,
    }


def unpack(packed: Mapping[str, Any]) -> OpenRun:
    """What ``pack`` was given."""
    mlflow = MlflowRun(**packed["mlflow"]) if packed["mlflow"] else None
    return OpenRun(parse(Config, packed["config"]), Path(packed["directory"]), mlflow)
