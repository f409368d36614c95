"""The training loop: the page that says what a run does, in the order in which it happens."""

import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from eqm_dist.data.loader import Batch, Loader
from eqm_dist.errors import NonFiniteLossError
from eqm_dist.logs import clock
from eqm_dist.train.checkpoint import Checkpoints, whole_state
from eqm_dist.train.distributed import rank
from eqm_dist.train.engine import Engine
from eqm_dist.train.evaluations import Evaluations
from eqm_dist.train.grad_norms import GradientNorms
from eqm_dist.train.guard import Guard
from eqm_dist.train.meters import Interval, Meters
from eqm_dist.train.mirror import Mirror
from eqm_dist.train.saving import Saver
from eqm_dist.train.schedule import LearningRateSchedule
from eqm_dist.train.state import TrainState

logger = logging.getLogger(__name__)

Doing = Literal["training", "saving", "evaluating", "finishing"]

_ADVICE = (
    "Lower optimizer.learning_rate, set optimizer.gradient_clip or model.qk_norm, or use train.precision=fp32, and"
    " start again."
)


class Tracker(Protocol):
    """Where the record of a run goes. Only rank 0 calls it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record values, named as in the design, at a step."""
        ...

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Record a picture that lies on disk."""
        ...

    def go_back(self, step: int) -> None:
        """Later steps are done again."""
        ...

    def finish(self) -> None:
        """Bring everything where it belongs; called once, at the end."""
        ...


class Evaluation(Protocol):
    """Measures EMA weights. A collective: every rank calls it with the same weights."""

    @property
    def precision(self) -> str:
        """In which images are drawn."""
        ...

    def __call__(self, weights: Mapping[str, Tensor], step: int) -> tuple[dict[str, float], list[Path]]:
        """Metrics, and the pictures that rank 0 wrote."""
        ...


@dataclass(frozen=True)
class Run:
    """All parts of a run, made by ``eqm_dist.build``.

    Attributes:
        engine: objective, gradients and optimizer.
        loader: this rank's share of every global batch.
        schedule: learning rate by step.
        checkpoints: where state is saved.
        saver: saves it while training goes on.
        evaluate: measures the EMA weights; None where nobody does, or an asynchronous task.
        tracker: the record; None except on rank 0.
        ema_state: the EMA that is evaluated.
        steps: number of updates in all.
        global_batch: samples per update over all ranks.
        grad_accum: micro-batches per update; the same on every rank.
        evaluations: the results of evaluations, and which steps are due.
        log_every, save_every: steps between.
        grad_norms: adds up the gradient by parts of the model, for reports; None: nobody asks.
        guard: says which updates are skipped; None: none are, and the host never waits for one.
        flops_per_image: training FLOPs of one image, for the utilisation.
        peak_flops: what the device could do at best, over all ranks; None if unknown.
        mirror: where checkpoints are copied in the background; None without one, and except on rank 0.
        beat: told of every step, and of what this rank does until the next: who looks after it knows that it lives.
        join: told before each update, in which a rank waits for the others, that this one has come so far.
        must_save: asked after each report, on every rank, whether to save now: a machine is about to be taken away.
        must_stop: asked after each step, on every rank and with whether it was reported, whether to save and end here.
    """

    engine: Engine
    loader: Loader
    schedule: LearningRateSchedule
    checkpoints: Checkpoints[Any]
    saver: Saver
    evaluate: Evaluation | None
    tracker: Tracker | None
    ema_state: str
    steps: int
    global_batch: int
    grad_accum: int
    evaluations: Evaluations
    log_every: int
    save_every: int
    grad_norms: GradientNorms | None
    guard: Guard | None
    flops_per_image: float
    peak_flops: float | None = None
    mirror: Mirror | None = None
    beat: Callable[[int, Doing], None] = lambda step, doing: None
    join: Callable[[], None] = lambda: None
    must_save: Callable[[], bool] = lambda: False
    must_stop: Callable[[bool], bool] = lambda reported: False
    state: TrainState = field(default_factory=TrainState)

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the last one, happens now."""
        return self.state.step % every == 0 or self.state.step == self.steps

    def ema_weights(self) -> dict[str, Tensor]:
        """The EMA model, whole, as a state dict in host memory. A collective."""
        return {**self.engine.frozen, **whole_state(self.engine, self.ema_state)}


def train(run: Run) -> None:
    """Run from ``run.state`` to the last step, or to where it must stop.

    Raises:
        NonFiniteLossError: losses or gradients were NaN, infinite or too large, and nothing helped.
        StorageError: the last checkpoint could not be written, or too many in a row.
        DataError: a shard is damaged.
    """
    meters = Meters(run.engine.device)
    with run.saver:  # however the run ends, what is being saved becomes whole
        while run.state.step < run.steps and _advance(run, meters):
            pass


def _advance(run: Run, meters: Meters) -> bool:
    """Run to the last step, or until the guard has gone back; False where the run must stop before."""
    waited_from = time.perf_counter()
    for batch in run.loader.batches(run.state.batch, run.steps + run.state.passed_over):
        data_wait_s = time.perf_counter() - waited_from
        loss, grad_norm = _update(run, batch)
        if run.state.skipped_in_a_row:
            _warn_of_skip(run.state, grad_norm)
            meters.add_skipped(data_wait_s)
        else:
            meters.add(run.state.step, loss, grad_norm, data_wait_s)
        run.state.count_step()
        if run.guard is not None and run.guard.gives_up(run.state):
            _go_back(run)
            meters.restart()
            if run.grad_norms is not None:
                run.grad_norms.restart()
            return True

        saves, evaluates = run.due(run.save_every), run.evaluate is not None and run.evaluations.due(run.state.step)
        run.beat(run.state.step, "evaluating" if evaluates else "saving" if saves else "training")
        reports = saves or evaluates or run.due(run.log_every)
        if reports:
            _report(run, meters.report(run.saver.done))
        # An evaluation comes before the save of its step: whoever resumes there has its figures already.
        if evaluates:
            _evaluate(run)
        stops = run.must_stop(reports) and run.state.step < run.steps
        hurries = stops or (reports and run.must_save())
        if saves or hurries:
            run.saver.begin(run.state)
        if hurries:
            run.saver.settle()
        if stops:
            return False
        if saves or evaluates or hurries:
            meters.restart_clock()
        waited_from = time.perf_counter()
    return True


def _update(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """One update; returns this rank's share of the mean loss and the norm of the whole gradient."""
    device = run.engine.device
    total = torch.zeros((), device=device)
    micro_batches = batch.to(device).split(run.grad_accum)
    for index, micro_batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        share = run.engine.losses(micro_batch, last).sum() / run.global_batch
        # A loss that overflows may leave its gradient finite on this rank: then all must see that it is not.
        share = share * torch.where(share.detach().isfinite(), 1.0, torch.nan)
        run.engine.backward(share, last)
        total += share.detach()
    run.saver.wait_copied()
    run.join()
    accepts = None if run.guard is None else partial(run.guard.accepts, run.state)
    observe = None if run.grad_norms is None else run.grad_norms.add
    return total, run.engine.step(run.schedule(run.state.step), accepts, observe)


def _warn_of_skip(state: TrainState, grad_norm: Tensor) -> None:
    if rank() == 0:
        logger.warning(
            "warning: skipped the update of step %s: its gradient has the norm %.4g, the usual is %.4g",
            f"{state.step + 1:,}", grad_norm.item(), state.usual_norm,
        )  # fmt: skip


def _go_back(run: Run) -> None:
    """Return to the last checkpoint before the updates that were skipped; the batches since then are passed over.

    Only checkpoints of the run's own rhythm count: where it goes back to must not hang on a save out of turn.
    """
    state, guard = run.state, run.guard
    assert guard is not None
    run.saver.settle()
    good = state.step - state.skipped_in_a_row
    saved = run.checkpoints.resume(run.engine, lambda step: step <= good and step % run.save_every == 0)
    if saved.step == 0 or state.rollbacks - saved.rollbacks == guard.max_rollbacks:
        raise NonFiniteLossError(
            f"The gradient was NaN, infinite or far too large in {guard.max_skips} updates in a row up to step"
            f" {state.step:,}, and {_failed_remedies(run, saved)}. " + _ADVICE
        )
    if rank() == 0:
        logger.warning(
            "warning: skipped %d updates in a row; going back to step %s", guard.max_skips, f"{saved.step:,}"
        )
        run.checkpoints.forget(saved.step)
        run.evaluations.restart(saved.step)
    if run.tracker is not None:
        run.tracker.go_back(saved.step)
    state.go_back(saved)


def _failed_remedies(run: Run, saved: TrainState) -> str:
    if saved.step == 0:
        return "there is no checkpoint of an earlier step"
    tries = run.state.rollbacks - saved.rollbacks
    return f"going back to {run.checkpoints.path(saved.step)} did not help ({tries} times)"


def _report(run: Run, interval: Interval) -> None:
    if interval.first_bad_step is not None:
        run.saver.wait()
        latest = run.checkpoints.latest()
        good = f"the last good checkpoint is {latest}" if latest else "no checkpoint was written yet"
        raise NonFiniteLossError(
            f"The loss or its gradient became NaN or infinite at step {interval.first_bad_step + 1:,}; {good}. "
            + _ADVICE
        )
    if interval.saved:
        run.saver.settle()
    by_part = {} if run.grad_norms is None else run.grad_norms.report(interval.updates)
    if run.tracker is None:
        return
    step, images_per_s = run.state.step, run.global_batch / interval.step_s
    of_updates = {"train/loss": interval.loss, "train/grad_norm": interval.grad_norm, **by_part}
    metrics = {
        **(of_updates if interval.updates else {}),
        "train/learning_rate": run.schedule(step - 1),
        "train/images_seen": run.state.images_seen(run.global_batch),
        "time/step_s": interval.step_s,
        "time/data_wait_s": interval.data_wait_s,
        "throughput/images_per_s": images_per_s,
        "memory/peak_gib": _peak_gib(run.engine.device),
    }
    if run.guard is not None:
        metrics |= {"train/skipped_updates": run.state.skipped, "train/rollbacks": run.state.rollbacks}
    if run.peak_flops is not None:
        metrics["throughput/mfu"] = images_per_s * run.flops_per_image / run.peak_flops
    if run.saver.failed:
        metrics["checkpoint/failed_saves"] = run.saver.failed
    run.tracker.log(step, metrics)
    width = len(f"{run.steps:,}")
    logger.info(
        "step %s of %s | loss %8.4f | gradient %8.3f | %8s images/s | %s left",
        f"{step:{width},}", f"{run.steps:,}", interval.loss, interval.grad_norm, f"{images_per_s:,.0f}",
        clock((run.steps - step) * interval.step_s),
    )  # fmt: skip
    log_evaluations(run.evaluations, run.tracker)


def _evaluate(run: Run) -> None:
    assert run.evaluate is not None
    started = time.perf_counter()
    metrics, pictures = run.evaluate(run.ema_weights(), run.state.step)
    if run.tracker is not None:
        seconds = time.perf_counter() - started
        run.evaluations.write(run.state.step, metrics, pictures, seconds, run.evaluate.precision)
        log_evaluations(run.evaluations, run.tracker)


def log_evaluations(evaluations: Evaluations, tracker: Tracker) -> None:
    """Bring the evaluations that have ended since this was last called into the record."""
    for record in evaluations.news():
        step = record["step"]
        if "failed" in record:
            logger.warning("warning: the evaluation of step %s failed (%s)", f"{step:,}", record["failed"])
            continue
        metrics, seconds = record["metrics"], record["seconds"]
        tracker.log(step, {**metrics, "time/evaluation_s": seconds})
        for picture in map(Path, record["pictures"]):
            tracker.log_image(step, picture.stem.split("_step")[0], picture)
        figures = " | ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        logger.info("evaluated step %s in %.0f s | %s", f"{step:,}", seconds, figures)


def _peak_gib(device: torch.device) -> float:
    """Most memory used so far: of the GPU where there is one, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
