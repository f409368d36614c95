"""Population-based training: generation after generation, the worst members go on from the best ones, changed.

A member of a generation is a run that begins with the checkpoint of its parent in the generation before. So what a
member is follows from the ledger alone, and a killed sweep goes on with the generation that it was in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eqm_dist.errors import LaunchError
from eqm_dist.launch.ray_cluster import cluster
from eqm_dist.launch.ray_quiet import quiet
from eqm_dist.launch.ray_tune import Trial
from eqm_dist.logs import log_file
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.decay.results import Trained
from eqm_dist.sweeps.decay.training import Run, Trainer
from eqm_dist.sweeps.spaces import Choices, Interval, Overrides, Space


@dataclass(frozen=True)
class Member:
    """A member of a generation.

    Attributes:
        point: its keys.
        parent: name of the run that it goes on from; None in the first generation.
    """

    point: Overrides
    parent: str | None = None


def train_population(plan: Plan, trainer: Trainer) -> bool:
    """Train all generations; False where the time was up before.

    Raises:
        LaunchError: there is no cluster, or no member of a generation gave an FID.
    """
    members = [Member(point) for point in plan.search.points()]
    with quiet(), cluster():  # one for all generations
        for generation in range(plan.config.train.steps // plan.grace):
            runs = [_run(plan, member, generation, number) for number, member in enumerate(members)]
            if not trainer.train(runs):
                return False
            known = trainer.known()
            members = next_members(plan, [known[run.name] for run in runs], generation)
    return True


def _run(plan: Plan, member: Member, generation: int, number: int) -> Run:
    steps = plan.grace
    ends = {"train.steps": (generation + 1) * steps, "checkpoint.every": steps, "evaluation.every": steps}
    config = plan.config_of(member.point, f"g{generation:03d}-m{number:03d}", plan.search.seed, **ends)
    origin = None if member.parent is None else (plan.runs / member.parent, generation * steps)
    return Run(Trial(config, origin), member.point)


def next_members(plan: Plan, trained: Sequence[Trained], generation: int) -> list[Member]:
    """The members of the next generation: the worst are replaced by changed copies of the best.

    Raises:
        LaunchError: no member of this generation gave an FID.
    """
    order = sorted(range(len(trained)), key=lambda member: trained[member].score)
    if trained[order[0]].fid is None:
        first = trained[order[0]]
        raise LaunchError(
            f"A population needs one member that gives an FID, and none of generation {generation} did,"
            f" {first.name} for this: {first.failure}; its log is {log_file(plan.runs / first.name, 0)}; put it right,"
            " and give another --out."
        )
    replaced = max(1, len(order) // plan.reduction) if len(order) > 1 else 0
    worst = {*order[len(order) - replaced :], *(member for member in order if trained[member].fid is None)}
    members: list[Member] = []
    for member, own in enumerate(trained):
        if member not in worst:
            members.append(Member(own.overrides, own.name))
            continue
        draw = np.random.Generator(np.random.Philox(key=np.array([plan.search.seed, generation], np.uint64),
                                                    counter=[0, 0, 0, member]))  # fmt: skip
        better = trained[order[draw.integers(max(1, replaced))]]
        members.append(Member(explored(plan.search.space, better.overrides, draw), better.name))
    return members


def explored(space: Space, point: Overrides, draw: np.random.Generator) -> Overrides:
    """A point near another: numbers times 0.8 or 1.25 within their interval, choices now and then another one."""
    alternative = next(part for part in space.alternatives if part.keys() == point.keys())
    near: Overrides = {}
    for key, axis in alternative.items():
        if isinstance(axis, Interval):
            factor = (0.8, 1.25)[draw.integers(2)]
            near[key] = axis.rounded(min(max(point[key] * factor, axis.low), axis.high))
        else:
            assert isinstance(axis, Choices)
            near[key] = axis.at(draw.random()) if draw.random() < 0.25 else point[key]
    return near
