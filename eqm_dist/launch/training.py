"""A training run from its config to its last line: what ``pipelines/train.py`` calls."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eqm_dist.build import OpenRun, build_mirror
from eqm_dist.config import Config
from eqm_dist.derived import derive, step_size_warning
from eqm_dist.launch import local
from eqm_dist.logs import setup_logging
from eqm_dist.open_run import check_run, hold_run, open_record
from eqm_dist.options import to_yaml
from eqm_dist.run_directory import CHECKPOINTS, METRICS_FILE, pictures
from eqm_dist.storage.location import Location
from eqm_dist.text import counted, labelled
from eqm_dist.track.mlflow import close_run, default_uri
from eqm_dist.track.result import read_result


def describe(config: Config) -> str:
    """The resolved config as YAML, then the numbers that follow from it."""
    found = derive(config)
    lines = {
        "parameters": f"{found.parameters:,} ({found.trained_parameters:,} trained)",
        "global batch": f"{config.train.global_batch:,} images",
        "steps": f"{config.train.steps:,}",
        "images": f"{found.images:,}",
        "checkpoint": f"{_bytes(found.checkpoint_bytes)}, {config.checkpoint.keep} kept",
        "model state": f"{_bytes(found.state_bytes)} on each of {counted(found.workers, 'worker')}, {found.engine}",
        "training cost": f"{found.training_flops / 1e9:.3f} GFLOP per image ({found.forward_macs / 1e9:.3f} GMAC"
                         " forward)",
        "run directory": str(found.directory),
    }  # fmt: skip
    if found.largest_stable_step is not None:
        lines["largest stable step"] = f"{found.largest_stable_step:.4g} (plain descent near data; sampler.step_size)"
    return "\n".join([to_yaml(config), *labelled(lines)])


def _bytes(size: int) -> str:
    return f"{size:,} bytes ({size / 2**30:.2f} GiB)"


def train(config: Config) -> str:
    """Run to the last step, or go on with a run that was begun; returns the closing report.

    Raises:
        EqmDistError: one sentence for the user.
    """
    setup_logging()
    with hold_run(config):
        return _train(config)


def _train(config: Config) -> str:
    unrecorded = check_run(config)
    if warning := step_size_warning(unrecorded.config):
        print(f"warning: {warning}")
    with _recorded(unrecorded) as opening:
        result = read_result(unrecorded.directory)
        if result is None or result["step"] < unrecorded.config.train.steps or _awaits_evaluation(unrecorded):
            _run(unrecorded.config.launch.launcher, opening)
            result = read_result(unrecorded.directory)
            assert result is not None
        opened = opening.result()
        if mirror := build_mirror(opened):
            mirror.complete()
    return _closing_report(opened, result)


def _run(launcher: str, opening: Future[OpenRun]) -> None:
    if launcher == "local":
        local.train(opening.result())
        return
    from eqm_dist.launch import ray_cluster  # a local run works without Ray

    with ray_cluster.cluster():
        from eqm_dist.launch import ray_train  # while MLflow is opened, and Ray's daemons settle

        ray_train.train(opening.result())


def _awaits_evaluation(opened: OpenRun) -> bool:
    """Whether a run that made its last step was killed before its last asynchronous evaluation was done."""
    awaited = opened.evaluations.awaited(opened.checkpoints.steps())
    return opened.config.evaluation.asynchronous and bool(awaited)


@contextmanager
def _recorded(opened: OpenRun) -> Iterator[Future[OpenRun]]:
    """The run with its record, which is opened in the background, for that takes as long as the start of a cluster.

    The MLflow run is left with the status of how the work inside ended.
    """
    status = "FAILED"
    with ThreadPoolExecutor(1, thread_name_prefix="record") as thread:
        opening = thread.submit(open_record, opened)
        try:
            yield opening
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if (mlflow := opening.result().mlflow) is not None:
                close_run(mlflow, status)


def _closing_report(opened: OpenRun, result: dict[str, Any]) -> str:
    metrics, directory = result["metrics"], opened.place
    lines = {
        "steps": f"{result['step']:,} ({result['images_seen']:,} images)",
        "final loss": f"{metrics['train/loss']:.4f}",
        "speed": f"{result['images_per_s']:,.0f} images/s (median), workers: {result['workers']}",
    }
    if "run/goodput" in metrics:
        lines["goodput"] = (
            f"{metrics['run/goodput']:.1%} of its time; restarts: {metrics['run/restarts']:,.0f}, steps done again:"
            f" {metrics['run/lost_steps']:,.0f}"
        )
    if "eval/fid" in metrics:
        fid, yardstick = metrics["eval/fid"], metrics["eval/fid_yardstick"]
        lines["FID"] = (
            f"{fid:.3f} with {metrics['eval/samples']:,.0f} samples, {fid / yardstick:.2f} times the yardstick of"
            f" {yardstick:.3f} (two halves of the real data)"
        )
    samples = pictures(opened.directory)
    if samples:
        lines["samples"] = _shown(directory / samples[-1].relative_to(opened.directory))
    lines |= {"checkpoints": _shown(directory / CHECKPOINTS), "metrics": _shown(directory / METRICS_FILE)}
    lines["run directory"] = _shown(directory)
    if opened.mlflow is not None:
        lines["MLflow"] = _ui_command(opened.mlflow.tracking_uri)
    return "\n".join(["", f"run {result['run']} is complete", *labelled(lines, indent="  ")])


def _shown(path: Location) -> str:
    """As short as it can be typed here."""
    return str(path.relative_to(Path.cwd()) if isinstance(path, Path) and path.is_relative_to(Path.cwd()) else path)


def _ui_command(tracking_uri: str) -> str:
    if tracking_uri.startswith("http"):
        return tracking_uri
    if tracking_uri == default_uri(Path.cwd() / "runs"):
        return "make ui"
    return f"mlflow ui --backend-store-uri {tracking_uri}"
