"""What a config amounts to before anything is made of it: counts, bytes, operations, the largest stable step."""

from dataclasses import dataclass

from eqm_dist.build import decay_and_path, shape_arguments
from eqm_dist.config import Config
from eqm_dist.core.corruption import SelfStoppingPath
from eqm_dist.core.decay import divergence_bound
from eqm_dist.models.sizes import forward_macs, parameter_count, training_flops_per_image
from eqm_dist.options import required
from eqm_dist.runs import runs_location
from eqm_dist.storage.location import Location
from eqm_dist.train.memory import model_state_bytes


@dataclass(frozen=True)
class Derived:
    """The numbers that follow from a config.

    Attributes:
        parameters: of the model, the frozen position table among them.
        trained_parameters: those that training changes.
        images: samples of all updates together.
        checkpoint_bytes: a checkpoint: every state of every trained parameter, and the first EMA whole.
        state_bytes: what a worker holds of weights, moments, EMAs and gradient.
        workers: how many share the state: of an elastic run the fewest, 1 where the cluster decides.
        engine: ``plain``, or ``ZeRO`` with its stage.
        training_flops: floating-point operations of an image, forward and backward.
        forward_macs: multiply-accumulates of an image, forward.
        directory: the run directory.
        largest_stable_step: step size above which plain descent diverges near data; None where there is none.
    """

    parameters: int
    trained_parameters: int
    images: int
    checkpoint_bytes: int
    state_bytes: int
    workers: int
    engine: str
    training_flops: float
    forward_macs: int
    directory: Location
    largest_stable_step: float | None


def derive(config: Config) -> Derived:
    """The numbers that follow from a config."""
    shape = shape_arguments(config)
    counted = {
        **shape,
        "num_classes": config.data.num_classes,
        "qk_norm_size": shape["hidden_size"] // required(config.model.num_heads) if config.model.qk_norm else 0,
    }
    parameters, trained = parameter_count(**counted), parameter_count(**counted, trainable_only=True)
    macs, emas = forward_macs(**shape), len(config.optimizer.ema_decays)
    states = 3 + emas  # fp32 weight, two moments, the EMAs
    workers = _fewest_workers(config)
    stage = config.engine.stage(workers)
    return Derived(
        parameters=parameters,
        trained_parameters=trained,
        images=config.train.steps * config.train.global_batch,
        checkpoint_bytes=4 * (states * trained + parameters),
        state_bytes=model_state_bytes(trained, emas, stage or 0, workers),
        workers=workers,
        engine="plain" if stage is None else f"ZeRO {stage}",
        training_flops=training_flops_per_image(macs),
        forward_macs=macs,
        directory=runs_location(config.run.root) / config.run.name,
        largest_stable_step=step_size_bound(config),
    )


def step_size_bound(config: Config) -> float | None:
    """The largest step size with which descent comes to rest near data, if any does."""
    decay, path = decay_and_path(config.objective)
    return path.step_size_bound if isinstance(path, SelfStoppingPath) else divergence_bound(decay)


def step_size_warning(config: Config) -> str | None:
    """A sentence if the configured descent cannot come to rest near data, else None (docs/decisions/0001)."""
    sampler, bound = config.sampler, step_size_bound(config)
    constant = sampler.name in ("gd", "nag") and sampler.step_policy == "constant"
    if not config.evaluation.every or bound is None or not constant or required(sampler.step_size) <= bound:
        return None
    stops = config.objective.kind == "self_stopping"
    what = "jumps over the part of the path on which it slows down" if stops else "near data diverges for this c(gamma)"
    return (
        f"sampler.step_size={sampler.step_size:g} is above {bound:.4g}, where descent {what}; expect broken samples,"
        " or lower it."
    )


def _fewest_workers(config: Config) -> int:
    workers = config.launch.workers
    if isinstance(workers, tuple):
        return workers[0]
    return workers if isinstance(workers, int) else 1
