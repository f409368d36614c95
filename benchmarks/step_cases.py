"""The steps that are timed and counted: SiT at patch size 2 on 4x32x32 latents with 1,000 classes, on one device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from eqm_dist.compiled import compile_blocks, compiled
from eqm_dist.config import SIZES
from eqm_dist.core.corruption import constant_pace
from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.objective import eqm_loss
from eqm_dist.data.loader import Batch
from eqm_dist.models.sit import SiT
from eqm_dist.models.sizes import forward_macs, training_flops_per_image
from eqm_dist.precision import Precision, set_products
from eqm_dist.train.engine import Engine, TorchEngine
from eqm_dist.train.optimizer import EmaAdamW
from eqm_dist.train.step import BatchLoss, ModelWithLoss, draw_batch

SIDE, CHANNELS, PATCH, CLASSES = 32, 4, 2, 1000
LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999


@dataclass(frozen=True)
class Case:
    """One way to make a step."""

    size: str
    batch: int
    precision: Precision
    compiled: bool
    deepspeed: bool

    @property
    def name(self) -> str:
        """``B/2 x32 bf16+compile``."""
        return (
            f"{self.size}/{PATCH} x{self.batch} {self.precision}"
            + "+compile" * self.compiled
            + ("+deepspeed" * self.deepspeed)
        )


def cases(sizes: Sequence[str], batches: Sequence[int], kinds: Sequence[str]) -> list[Case]:
    """All of them, in order."""
    made = []
    for size in sizes:
        for batch in batches:
            for kind in kinds:
                precision, *words = kind.split("+")
                made.append(Case(size, batch, cast("Precision", precision), "compile" in words, "deepspeed" in words))
    return made


def build_model(size: str, **options: Any) -> SiT:
    """A model of one of the published sizes."""
    return SiT(SIDE, PATCH, CHANNELS, **SIZES[size]._asdict(), num_classes=CLASSES, **options)


def flops_per_image(size: str) -> float:
    """Of a training step."""
    shape = SIZES[size]
    macs = forward_macs(
        input_size=SIDE, patch_size=PATCH, in_channels=CHANNELS, hidden_size=shape.hidden_size, depth=shape.depth
    )
    return training_flops_per_image(macs)


def build_engine(case: Case, device: torch.device) -> Engine:
    """The engine of a case, as ``build_run`` would make it."""
    set_products(case.precision)
    with torch.device(device):
        model = build_model(case.size)
    if case.compiled:
        compile_blocks(model.blocks)
    loss = BatchLoss(
        partial(eqm_loss, decay=TruncatedDecay(0.8, 4.0), path=constant_pace),
        seed=0,
        latent_scale=0.18215,
        latent_shift=0.0,
        label_dropout=0.1,
        null_label=CLASSES,
        flip=False,
        draw=compiled(draw_batch) if case.compiled else draw_batch,
    )
    module = ModelWithLoss(model, loss)
    optimizer = EmaAdamW(module.trained_parameters().values(), lr=LEARNING_RATE, ema_decays=[EMA_DECAY])
    if not case.deepspeed:
        return TorchEngine(module, optimizer, device=device, precision=case.precision)
    from eqm_dist.train.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(
        module, optimizer, device=device, zero_stage=1, precision=case.precision, micro_batch=case.batch
    )


def random_batch(size: int, device: torch.device, step: int = 0) -> Batch:
    """Moments [size, 1, 2C, H, W] with their labels and positions."""
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(size, 1, 2 * CHANNELS, SIDE, SIDE, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(step * size + torch.arange(size), moments, labels).to(device)
