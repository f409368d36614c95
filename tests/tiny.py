"""A run that takes milliseconds: a data set of 48 small images, a config for it, and the command that trains it."""

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eqm_dist.commands import train as train_command
from eqm_dist.config import Config
from eqm_dist.data.shards import write_shards
from eqm_dist.data.sources import LabelledImage
from eqm_dist.models.autoencoder import IdentityAutoencoder
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits


class Blots:
    """48 random images [4, 4, 1] of three classes."""

    id = "blots"
    num_classes = 3

    def __len__(self) -> int:
        return 48

    def read(self, start: int, stop: int) -> Iterator[LabelledImage]:
        images = np.random.default_rng(0).integers(0, 256, (48, 4, 4, 1), dtype=np.uint8)
        for index in range(start, stop):
            yield LabelledImage(f"{index:02d}", images[index], index % 3)


def write_blots(directory: Path, mirror: bool = False) -> Path:
    """The blots in three shards."""
    write_shards(
        directory, "blots", Blots(), IdentityAutoencoder(), samples_per_shard=16, dtype="float32", mirror=mirror
    )
    return directory


def overrides(root: Path, shards: Path, **others: Any) -> dict[str, Any]:
    """What turns the digits preset into a tiny run on one process with the plain engine."""
    return {
        "run.root": str(root),
        "run.name": "tiny",
        "data.shards": str(shards),
        "data.latent_shape": [1, 4, 4],
        "data.num_classes": 3,
        "model.hidden_size": 16,
        "model.depth": 1,
        "model.num_heads": 2,
        "optimizer.warmup_steps": 2,
        "train.steps": 6,
        "train.global_batch": 4,
        "train.log_every": 1,
        "checkpoint.every": 2,
        "evaluation.every": 0,
        "launch.launcher": "local",
        "track.mlflow": False,
        **others,
    }


def config(root: Path, shards: Path, **others: Any) -> Config:
    """The config of a tiny run."""
    return with_overrides(digits(), overrides(root, shards, **others))


def flags(values: dict[str, Any]) -> list[str]:
    """Dotted keys and values as a command line spells them."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    return [part for key, text in texts.items() for part in (f"--{key}", text)]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def run(start: Callable[[], object], program: str, *arguments: str) -> Outcome:
    """``python PROGRAM ARGUMENTS`` in this process, which has imported everything; the logging it sets up is undone."""
    package = logging.getLogger("eqm_dist")
    before = package.handlers, package.level, package.propagate
    package.handlers = []
    argv, sys.argv = sys.argv, [program, *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            start()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for handler in package.handlers:
            handler.close()
        package.handlers, package.level, package.propagate = before
    return Outcome(int(code or 0), out.getvalue(), err.getvalue())


def train(*arguments: str) -> Outcome:
    """``python pipelines/train.py ARGUMENTS`` in this process."""
    return run(train_command.start, "pipelines/train.py", *arguments)


FAR = {"optimizer.learning_rate": 0.05, "train.steps": 30, "checkpoint.every": 30, "train.log_every": 30}
"""Overrides of a run whose large steps take it far, so that labels and depth matter."""


def trained(root: Path, shards: Path, **others: Any) -> Path:
    """The directory of a tiny run that has ended well."""
    ended = train(*flags(overrides(root, shards, **others)))
    assert ended.code == 0, ended.err
    return root / others.get("run.name", "tiny")
