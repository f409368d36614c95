"""The names of a run's files: the list knows every file that a run leaves, and says whether a mirror copies it."""

from pathlib import Path

import pytest

from eqm_dist.run_directory import is_known, is_report, manifest_file, picture_name, step_name
from tests import tiny


@pytest.mark.parametrize(
    ("name", "copied"),
    [
        ("config.yaml", True),
        (manifest_file(0), True),
        (manifest_file(12), True),
        ("metrics.jsonl", True),
        ("attempts.jsonl", True),
        ("result.json", True),
        (f"samples/{picture_name('samples', 20)}", True),
        (f"evaluations/{step_name(20)}.json", True),
        ("mlflow.json", False),
        ("evaluations/digits.safetensors", False),
        ("logs/rank-0000.log", False),
        ("checkpoints/step_00000020/ema.safetensors", False),
        ("samples/deep/grid.png", False),
        ("notes.txt", False),
    ],
)
def test_what_a_mirror_copies(name: str, copied: bool) -> None:
    assert is_report(name) == copied


def test_every_file_of_a_run_is_known(tmp_path: Path) -> None:
    options = {"run.root": str(tmp_path), "train.steps": 4, "train.log_every": 2, "checkpoint.every": 2,
               "evaluation.every": 2, "evaluation.samples": 20, "evaluation.grid_columns": 2, "sampler.nfe": 2,
               "launch.launcher": "local"}  # fmt: skip
    ended = tiny.train(*tiny.flags(options))
    assert ended.code == 0, ended.err
    files = [
        path.relative_to(tmp_path / "digits").as_posix() for path in (tmp_path / "digits").rglob("*") if path.is_file()
    ]
    assert len(files) > 10
    assert [name for name in files if not is_known(name)] == []
