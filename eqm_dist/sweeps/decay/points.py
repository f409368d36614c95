"""All points with all their seeds. Where points are stopped early, the first seed of each decides.

Were single runs stopped, a point would keep the seeds that had luck, and their mean would be better than the point is.
"""

from eqm_dist.launch.ray_tune import EarlyStop, Trial, history
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.training import Run, Trainer
from eqm_dist.sweeps.spaces import trial_name


def train_points(plan: Plan, trainer: Trainer) -> bool:
    """Train every run of a grid or a random search; False where the time was up before.

    Raises:
        LaunchError: there is no cluster, or it has no room for a run.
    """
    trainer.ledger.forget(lambda trained: trained.how == "lost")  # another attempt may have better luck
    runs = _runs(plan)
    if not plan.reduction:
        return trainer.train(runs)
    first, *others = plan.seed_numbers
    known = trainer.known()
    leaders = [run for run in runs if run.seed == first]
    past = {run.name: history(run.trial.directory) for run in leaders if run.name in known}
    if not trainer.train(leaders, EarlyStop(plan.grace, plan.reduction, past)):
        return False
    known = trainer.known()
    whole = {trial_name(run.point) for run in leaders if known[run.name].how == "complete"}
    return trainer.train([run for run in runs if run.seed in others and trial_name(run.point) in whole])


def _runs(plan: Plan) -> list[Run]:
    """Seed by seed, so that all points have one result before any has two. The name says which point and seed it is."""
    points = plan.search.points()
    return [
        Run(Trial(plan.config_of(point, f"{trial_name(point)}-s{seed}", seed)), point)
        for seed in plan.seed_numbers
        for point in points
    ]
