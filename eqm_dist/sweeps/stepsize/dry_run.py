"""A sweep of samplers as ``--dry-run`` prints it: its trials, its rungs, and what they will cost here."""

import os

import torch

from eqm_dist.derived import step_size_bound
from eqm_dist.logs import clock
from eqm_dist.sweeps.cost import measured_seconds
from eqm_dist.sweeps.report import place, short
from eqm_dist.sweeps.spaces import Overrides
from eqm_dist.sweeps.stepsize.plan import Plan
from eqm_dist.text import counted, labelled


def describe(plan: Plan) -> str:
    """The plan and what it will cost on this machine, measured with a few images."""
    search, points = plan.search, plan.search.points()
    descents, count = list(plan.descents(points)), search.count
    each = sum(plan.nfe(descent[-1]) for descent in descents) / len(descents)
    trajectories = len(descents) if search.how == "grid" else count
    lines = {
        "model": plan.model.source,
        "trials": f"{count:,} ({search.how}{f', on {trajectories:,} descents' * (search.how == 'grid')})",
        "axes": ", ".join(map(short, search.keys)),
    }
    nfe, kept, before = 0.0, count, 0
    for number, samples in enumerate(plan.rungs, start=1):
        nfe += (samples - before) * each * min(trajectories, kept)
        lines[f"rung {number}"] = f"{'about ' * (number > 1)}{kept:,} trials with {samples:,} samples"
        kept, before = -(-kept // plan.reduction), samples
    if seeds := plan.comparing_seeds:
        nfe += plan.finalists * len(seeds) * plan.rungs[-1] * each
        lines["finalists"] = f"at most {plan.finalists}, compared with {counted(len(seeds), 'more seed')}"
    bound = step_size_bound(plan.model.config)
    if bound is not None:
        lines["largest stable step"] = f"{bound:.4g} (plain descent near data)"
    workers = 1 if plan.launcher == "local" else plan.actors or torch.cuda.device_count() or os.cpu_count() or 1
    seconds = nfe * _seconds_per_nfe(plan, points[0]) / workers
    lines["cost"] = f"about {nfe:,.0f} NFE, of one image each"
    lines["time"] = f"about {clock(seconds)} on {counted(workers, 'actor')} like this machine"
    lines["results"] = place(search.out)
    return "\n".join(labelled(lines))


def _seconds_per_nfe(plan: Plan, point: Overrides) -> float:
    """Of one image."""
    model = plan.model.with_sampler(**(plan.sampler(point) | {"nfe": 4}))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    indices = torch.arange(plan.batch)
    labels = indices % model.config.data.num_classes

    def draw() -> torch.Tensor:
        return model.generate(indices, labels, 0, plan.batch, device).images.sum()

    return measured_seconds(draw, device) / (4 * plan.batch)
