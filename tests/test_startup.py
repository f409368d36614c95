"""What is not imported before the first step, for it takes seconds: in the driver, in Ray's controller, in a worker."""

import subprocess
import sys
from pathlib import Path

from eqm_dist.data.shards import digits_shards
from eqm_dist.options import to_yaml, with_overrides
from eqm_dist.presets import digits

LATER = {"torchmetrics", "scipy", "matplotlib", "sklearn", "mlflow", "pandas", "optuna", "diffusers"}
"""Of the evaluation, the record and the sweeps: needed after the first step, if at all."""


def imported(code: str, *arguments: str) -> set[str]:
    """The modules that a process has imported after some code."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_the_driver_imports_nothing_before_training_that_only_an_evaluation_or_a_sweep_needs() -> None:
    found = imported("import eqm_dist.launch.training")
    assert found & (LATER | {"ray", "deepspeed"}) == set()
    assert "torch" in found


def test_the_controller_for_which_the_workers_wait_imports_no_torch() -> None:
    # All that reaches it: its callback, how workers meet, the trainer's own policy, and the wish to stop.
    parts = "one_machine", "ray_cluster", "recovery", "rendezvous", "stop"
    found = imported("\n".join(f"import eqm_dist.launch.{part}" for part in parts))
    assert found & ((LATER | {"torch", "deepspeed", "eqm_dist.build"}) - {"pandas"}) == set()  # Ray Train imports that
    assert "ray.train" in found


def test_a_process_that_has_made_its_first_step_has_imported_nothing_that_it_did_not_need(tmp_path: Path) -> None:
    # With an evaluation and a record to come.
    digits_shards(tmp_path / "data" / "digits")
    small = {"run.root": str(tmp_path), "model.hidden_size": 16, "model.depth": 1, "model.num_heads": 2}
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(with_overrides(digits(), {**small, "launch.launcher": "local"})))
    code = """
from pathlib import Path
import torch
from eqm_dist.build import build_run
from eqm_dist.config import Config
from eqm_dist.open_run import check_run
from eqm_dist.options import parse_document
from eqm_dist.track.mlflow import MlflowRun, MlflowTracker
from eqm_dist.train.loop import _update
run = build_run(check_run(parse_document(Config, Path(sys.argv[1]).read_bytes(), "it")), torch.device("cpu"))
tracker = MlflowTracker(MlflowRun("sqlite://", "none", 1.0))
_update(run, next(iter(run.loader.batches(0, 1))))
"""
    found = imported(code, str(file))
    assert found & (LATER | {"ray", "deepspeed"}) == set()
