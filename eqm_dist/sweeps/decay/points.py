"""All points with all their seeds, stopped early where their FID is worse than that of others."""

from eqm_dist.launch.ray_tune import EarlyStop, Trial, history
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.training import Run, Trainer
from eqm_dist.sweeps.spaces import trial_name


def train_points(plan: Plan, trainer: Trainer) -> bool:
    """Train every run of a grid or a random search; False where the time was up before.

    Raises:
        LaunchError: there is no cluster.
    """
    trainer.ledger.forget(lambda trained: trained.how == "lost")  # another attempt may have better luck
    runs = _runs(plan)
    if not plan.reduction:
        return trainer.train(runs)
    known = trainer.known()
    past = {run.name: history(run.trial.directory) for run in runs if run.name in known}
    return trainer.train(runs, EarlyStop(plan.grace, plan.reduction, past))


def _runs(plan: Plan) -> list[Run]:
    """Seed by seed, so that all points have one result before any has two. The name says which point and seed it is."""
    first, points = plan.search.seed, plan.search.points()
    return [
        Run(Trial(plan.config_of(point, f"{trial_name(point)}-s{seed}", seed)), point)
        for seed in range(first, first + plan.seeds)
        for point in points
    ]
