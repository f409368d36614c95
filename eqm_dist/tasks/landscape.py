"""Fields on the plane, small enough to look at: Equilibrium Matching, its explicit energy, and flow matching.

In two dimensions Equilibrium Matching is delicate. Where noise has many dimensions, x_gamma tells how noisy it is; on
the plane it does not, so that the field at a datum is an average over all targets that pass there, which is not zero.
The remedy here is the one that its author and users advise: training points that are data themselves, with gamma = 1
and hence a target of zero, in a large share. c(gamma) is the truncated decay with a = 0.8 of the paper, lambda = 1.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.energy import ExplicitEnergy
from eqm_dist.core.objective import eqm_loss, flow_matching_loss
from eqm_dist.errors import ConfigError

logger = logging.getLogger(__name__)

ToyData = Literal["moons", "gaussians", "checkerboard"]
Method = Literal["flow_matching", "eqm", "eqm_energy"]
METHODS: tuple[Method, ...] = get_args(Method)

DECAY = TruncatedDecay(decay_start=0.8, gradient_scale=1.0)
DATA_SHARE = 0.7
"""Share of training points that are data, at gamma = 1."""
STEP_SIZE, NFE = 0.02, 150
BATCH, LEARNING_RATE, WIDTH = 512, 2e-3, 128
WAVE_NUMBER = 2.0
"""Standard deviation of the waves' numbers, in radians per unit."""


def toy_data(name: ToyData, count: int, generator: torch.Generator) -> Tensor:
    """Points [count, 2] of a toy distribution, centred, about as wide as twice the noise.

    Raises:
        ConfigError: an unknown name.
    """
    if name == "moons":
        angle = math.pi * torch.rand(count, generator=generator)
        upper = torch.rand(count, generator=generator) < 0.5
        x = torch.where(upper, angle.cos(), 1 - angle.cos())
        y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
        points = torch.stack([x - 0.5, y - 0.25], dim=1)
        return 1.6 * (points + 0.05 * torch.randn(count, 2, generator=generator))
    if name == "gaussians":
        angle = 2 * math.pi / 8 * torch.randint(8, (count,), generator=generator)
        centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
        return centres + 0.1 * torch.randn(count, 2, generator=generator)
    if name == "checkerboard":
        # The eight dark fields of a 4 x 4 board: in column i the rows of i's parity.
        column = torch.randint(4, (count,), generator=generator)
        row = 2 * torch.randint(2, (count,), generator=generator) + column % 2
        inside = torch.rand(count, 2, generator=generator)
        return torch.stack([column, row], dim=1) + inside - 2
    raise ConfigError(f"The toy data is one of {', '.join(get_args(ToyData))}, got {name}.")


class PlaneField(nn.Module):
    """A field on the plane: (x [B, 2], labels, gamma [B] or None) -> [B, 2]. The labels are there for the losses.

    Args:
        timed: whether it sees gamma, as flow matching does.
        generator: draws the initial weights.
    """

    def __init__(self, timed: bool, generator: torch.Generator) -> None:
        super().__init__()
        # Waves of random directions, as coordinates alone make it slow to learn what is finer than a unit
        # (Tancik et al., "Fourier features", arXiv 2006.10739).
        self.waves = WAVE_NUMBER * torch.randn(2, WIDTH // 4, generator=generator)
        sizes = [2 + WIDTH // 2 + timed, WIDTH, WIDTH, WIDTH]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(WIDTH, 2))
        with torch.no_grad():
            for parameter in self.net.parameters():
                bound = parameter.shape[-1] ** -0.5
                parameter.copy_(bound * (2 * torch.rand(parameter.shape, generator=generator) - 1))

    def forward(self, x: Tensor, labels: Tensor, gamma: Tensor | None = None) -> Tensor:
        angles = x @ self.waves
        time = [] if gamma is None else [gamma[:, None]]
        return self.net(torch.cat([x, angles.sin(), angles.cos(), *time], dim=1))


@dataclass(frozen=True)
class Landscape:
    """A trained method on the plane.

    Attributes:
        method: which of the three.
        field: (x [B, 2], labels [B]) for the two that descend, (x, labels, gamma [B]) for flow matching.
    """

    method: Method
    field: Callable[..., Tensor]

    def at(self, x: Tensor, gamma: float) -> Tensor:
        """The field at x [B, 2], of a sample that has gamma of its path behind it, which only flow matching heeds."""
        labels = torch.zeros(len(x), dtype=torch.int64)
        if self.method == "flow_matching":
            return self.field(x, labels, torch.full((len(x),), gamma))
        return self.field(x, labels)

    def energy(self, x: Tensor) -> Tensor:
        """The explicit energy [B] at x [B, 2]; for the method that has one."""
        assert isinstance(self.field, ExplicitEnergy)
        return self.field.energy(x, torch.zeros(len(x), dtype=torch.int64))

    @torch.no_grad()
    def trajectories(self, start: Tensor) -> Tensor:
        """The trajectory of every start [B, 2], itself included: [NFE + 1, B, 2].

        Flow matching takes Euler steps from gamma 0 to 1, the others gradient descent: the same line of code, but that
        descent may take steps of any size and has no end.
        """
        step_size = 1 / NFE if self.method == "flow_matching" else STEP_SIZE
        points = [start]
        for step in range(NFE):
            points.append(points[-1] + step_size * self.at(points[-1], step / NFE))
        return torch.stack(points)


def train(method: Method, data: ToyData, steps: int, seed: int) -> Landscape:
    """Fit one of the methods to toy data; a function of its arguments, on one thread.

    Args:
        method: flow_matching, eqm, or eqm_energy (the dot energy).
        data: what to fit.
        steps: updates of Adam on batches of 512, with a cosine decay from 2e-3.
        seed: of weights and draws.
    """
    generator = torch.Generator().manual_seed(seed)
    timed = method == "flow_matching"
    model = PlaneField(timed, generator)
    field = ExplicitEnergy(model, "dot") if method == "eqm_energy" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    began = told = time.monotonic()
    for step in range(1, steps + 1):
        latents = toy_data(data, BATCH, generator)
        noise = torch.randn(BATCH, 2, generator=generator)
        gamma = torch.rand(BATCH, generator=generator)
        if timed:
            loss = flow_matching_loss(model, latents, labels, gamma=gamma, noise=noise).mean()
        else:
            gamma = torch.where(torch.rand(BATCH, generator=generator) < DATA_SHARE, 1.0, gamma)
            loss = eqm_loss(field, latents, labels, gamma=gamma, noise=noise, decay=DECAY).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if time.monotonic() - told > 3 or step == steps:
            told = time.monotonic()
            left = (told - began) / step * (steps - step)
            logger.info(f"{method:13} step {step:5,} of {steps:,} | loss {loss.item():7.4f} | {left:3.0f} s left")
    return Landscape(method, field)


def energy_distance(first: Tensor, second: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples [n, 2] and [m, 2]: 0 for the same distribution.

    Szekely & Rizzo, "Energy statistics" (2013), as a V-statistic, which is biased upwards by about 1 / n.
    """
    between, within = torch.cdist(first, second).mean(), torch.cdist(first, first).mean()
    return (2 * between - within - torch.cdist(second, second).mean()).item()
