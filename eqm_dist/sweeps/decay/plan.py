"""What a sweep over trainings is: its points, their seeds, and when a trial may be stopped."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm_dist.build import check_evaluated_samples
from eqm_dist.config import Config
from eqm_dist.derived import derive
from eqm_dist.errors import ConfigError
from eqm_dist.options import Axis, keys_with, with_overrides
from eqm_dist.sweeps.search import Search

AXES = keys_with(Config, Axis)
"""What can be swept: what decides the numbers of a run, but for its length, its data and its evaluation."""
STATE_KEYS = ("model.", "objective.energy", "optimizer.ema_decays", "optimizer.schedule", "optimizer.warmup_steps")
"""What a checkpoint is bound to, or a part of a run cannot have: no axes of population-based training."""


@dataclass(frozen=True)
class Plan:
    """A sweep, checked.

    Attributes:
        config: of all trials, but for what the space changes.
        search: ``grid``, ``random`` or ``pbt``; its seed is that of the first run of a point.
        seeds: runs of each point, with seeds that count up; 1 for pbt.
        reduction: asynchronous successive halving of the first run of each point keeps one of so many; 0 trains all to
            the end. For pbt one of so many members is replaced after each generation.
        grace: steps before a run may be stopped; for pbt the steps of a generation.
        cpus, gpus: of a trial.
    """

    config: Config
    search: Search
    seeds: int
    reduction: int
    grace: int
    cpus: int
    gpus: float

    @property
    def runs(self) -> Path:
        """The directory of the trials."""
        return self.search.out.absolute() / "runs"

    def config_of(self, point: Mapping[str, Any], name: str, seed: int, **others: Any) -> Config:
        """The config of a run.

        Raises:
            ConfigError: the point cannot be.
        """
        place = {"run.root": str(self.runs), "run.name": name, "run.seed": seed}
        return with_overrides(self.config, {**point, **place, **others}, "the space")

    def cost(self, point: Mapping[str, Any]) -> tuple[float, ...]:
        """What a point costs: floating-point operations of its training, then multiply-accumulates to draw an image."""
        config = self.config_of(point, "cost", 0)
        derived = derive(config)
        return derived.images * derived.training_flops, float(config.sampler.nfe * derived.forward_macs)

    @property
    def seed_numbers(self) -> range:
        """The seeds of each point."""
        return range(self.search.seed, self.search.seed + self.seeds)


def check(plan: Plan) -> None:
    """Build every trial's config, and whatever else can fail before anything is computed.

    Raises:
        ConfigError: one sentence for the user.
    """
    config, search = plan.config, plan.search
    if not config.evaluation.every:
        raise ConfigError("A sweep compares FIDs, and evaluation.every=0 measures none; set evaluation.every.")
    if config.evaluation.asynchronous:
        raise ConfigError(
            "evaluation.asynchronous has no effect in a sweep, whose trials share the machine; leave it out."
        )
    check_evaluated_samples(config)
    if search.how == "pbt":
        _check_population(plan)
    elif plan.reduction and plan.grace % config.evaluation.every:
        raise ConfigError(
            f"--grace {plan.grace} must be a multiple of evaluation.every={config.evaluation.every}, for trials are"
            " stopped by their FID; change one of them."
        )
    elif plan.reduction and plan.grace >= config.train.steps:
        raise ConfigError(
            f"--grace {plan.grace} must be less than train.steps={config.train.steps}, or nothing is ever stopped;"
            " lower it, or leave out --reduction."
        )
    for point in [*search.points(), *(search.space.extremes() if search.how == "pbt" else ())]:
        plan.config_of(point, "check", 0)


def _check_population(plan: Plan) -> None:
    config = plan.config
    for key in plan.search.keys:
        if key.startswith(STATE_KEYS):
            raise ConfigError(
                f"{key} cannot change while a population trains, for checkpoints are bound to it; sweep it with"
                " --search grid or random."
            )
    if config.optimizer.schedule != "constant":
        raise ConfigError(
            f"optimizer.schedule={config.optimizer.schedule} plans the learning rate of a whole run, and a"
            " population finds it on the way; use optimizer.schedule=constant."
        )
    if config.train.steps % plan.grace:
        raise ConfigError(
            f"train.steps={config.train.steps} must be a multiple of the {plan.grace} steps of a generation;"
            " change --grace."
        )
