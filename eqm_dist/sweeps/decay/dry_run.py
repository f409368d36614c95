"""A sweep of trainings as ``--dry-run`` prints it: its trials, and what they will cost here."""

import os

import torch

from eqm_dist.build import build_model
from eqm_dist.config import Config
from eqm_dist.derived import derive
from eqm_dist.logs import clock
from eqm_dist.sweeps.cost import measured_seconds
from eqm_dist.sweeps.decay.plan import Plan
from eqm_dist.sweeps.report import place
from eqm_dist.text import labelled


def describe(plan: Plan) -> str:
    """The plan and its cost."""
    points, config = plan.search.count, plan.config
    runs = points * plan.seeds
    images = runs * config.train.steps * config.train.global_batch
    gflop = derive(config).training_flops / 1e9
    device = torch.device("cuda" if plan.gpus else "cpu")
    seconds = images * _seconds_per_image(config, device)
    at_once = max(1, int(torch.cuda.device_count() / plan.gpus if plan.gpus else (os.cpu_count() or 1) / plan.cpus))
    cores = 1 if plan.gpus else plan.cpus
    early = plan.reduction > 0 and plan.search.how != "pbt"
    most = " at most" if early and plan.seeds > 1 else ""
    lines = {
        "trials": f"{runs:,}{most} ({plan.search.how}: {points:,} points x {plan.seeds} seeds)",
        "axes": ", ".join(plan.search.keys),
        "steps": f"{config.train.steps:,} each",
        "images": f"{images:,} at most, {images * gflop / 1e6:,.3f} PFLOP",
        "time": f"about {clock(seconds / at_once / cores)} of training, {at_once} at once, on a machine like this",
        "resources": f"{plan.cpus} CPUs and {plan.gpus:g} GPUs a trial, launcher {config.launch.launcher}",
        "results": place(plan.search.out),
    }
    if plan.search.how == "pbt":
        lines["generations"] = f"{config.train.steps // plan.grace:,} of {plan.grace:,} steps"
    elif early:
        lines["early stopping"] = (
            f"of the first seed, on FID, from step {plan.grace:,} on; one of {plan.reduction} goes on, and the points"
            " that come to the end get their other seeds"
        )
    return "\n".join(labelled(lines))


def _seconds_per_image(config: Config, device: torch.device) -> float:
    """Forward and backward."""
    model = build_model(config).to(device)
    count = min(64, config.train.global_batch)
    latents = torch.zeros(count, *config.data.latent_shape, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    gamma = torch.zeros(count, device=device) if config.objective.kind == "flow_matching" else None

    def learn() -> torch.Tensor:
        loss = model(latents, labels, gamma).square().mean()
        loss.backward()
        return loss

    return measured_seconds(learn, device) / count
