"""What a device makes of a step, a sampler and a checkpoint, against the CPU in fp32.

Each test runs on the CPU too, against itself, so that on a GPU only the device is new. They need torch, and none of
Ray, DeepSpeed and MLflow: ``make gpu`` runs them on a machine that has nothing else.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from eqm_dist.compiled import compile_blocks, compiled
from eqm_dist.core.corruption import constant_pace
from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.guidance import blind_to_time, guided
from eqm_dist.core.objective import eqm_loss
from eqm_dist.core.samplers import Adam, GradientDescent, NesterovGradientDescent, Sampler
from eqm_dist.core.sampling import GradientNormStop, SamplingMethod, in_order, sample_queue
from eqm_dist.data.loader import Batch
from eqm_dist.models.sit import SiT
from eqm_dist.precision import computed_in, products, set_products
from eqm_dist.train.distributed import all_reduce_sum, from_rank_zero
from eqm_dist.train.engine import TorchEngine
from eqm_dist.train.optimizer import EmaAdamW
from eqm_dist.train.step import BatchLoss, ModelWithLoss, draw_batch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CPU = torch.device("cpu")
SHAPE, CLASSES, STEPS = (4, 8, 8), 10, 5


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with products("fp32"):  # and set back what a test sets
        yield torch.device(request.param)
    torch._dynamo.reset()


def model(device: torch.device, **options: Any) -> SiT:
    return SiT(8, 2, 4, hidden_size=64, depth=3, num_heads=2, num_classes=CLASSES, zero_init=False, **options).to(
        device
    )


def batch(size: int, step: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(step)
    moments = torch.randn(size, 2, 8, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(step * size + torch.arange(size), moments, labels).to(device)


def engine(device: torch.device, *, compile_it: bool = False, bf16: bool = False, **options: Any) -> TorchEngine:
    trained = model(device, **options)
    if compile_it:
        compile_blocks(trained.blocks)
    loss = BatchLoss(
        partial(eqm_loss, decay=TruncatedDecay(0.8, 4.0), path=constant_pace),
        seed=3, latent_scale=0.5, latent_shift=0.0, label_dropout=0.2, null_label=CLASSES, flip=True,
        draw=compiled(draw_batch) if compile_it else draw_batch,
    )  # fmt: skip
    module = ModelWithLoss(trained, loss)
    optimizer = EmaAdamW(module.trained_parameters().values(), lr=1e-3, ema_decays=[0.9])
    return TorchEngine(module, optimizer, device=device, precision="bf16" if bf16 else "fp32", gradient_clip=1.0)


def run(trained: TorchEngine) -> Tensor:
    """Losses and gradient norms of some steps [2, STEPS], on the CPU."""
    found = []
    for step in range(STEPS):
        losses = []
        for part in range(2):  # micro-batches of two sizes
            loss = trained.losses(batch(4 + part, 2 * step + part, trained.device)).sum() / 9
            trained.backward(loss, last=part == 1)
            losses.append(loss.detach())
        found.append(torch.stack([sum(losses, torch.zeros((), device=trained.device)), trained.step(1e-3)]).cpu())
    return torch.stack(found, 1)


# Sums of products are taken in another order by another device or compiler: 1e-7 each, which some steps of Adam pass
# on. In bf16 a product is rounded to three digits, and a loss is a mean over thousands of them.
@pytest.mark.parametrize(
    ("options", "relative"),
    [
        ({}, 1e-4),
        ({"checkpoint_blocks": True}, 1e-4),
        ({"qk_norm": True}, 1e-4),
        ({"bf16": True}, 2e-2),
        pytest.param({"compile_it": True}, 1e-4, marks=pytest.mark.slow),
        pytest.param({"compile_it": True, "bf16": True, "checkpoint_blocks": True}, 2e-2, marks=pytest.mark.slow),
    ],
    ids=lambda value: "+".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_steps_are_those_of_the_cpu(device: torch.device, options: dict[str, Any], relative: float) -> None:
    same_model = {name: value for name, value in options.items() if name == "qk_norm"}
    expected = run(engine(CPU, **same_model))
    torch.testing.assert_close(run(engine(device, **options)), expected, rtol=relative, atol=0)


def test_draws_have_the_bits_of_the_cpu(device: torch.device) -> None:
    positions = 2**40 + torch.arange(50)
    expected, found = (draw_batch(7, each, SHAPE, 0.3, True) for each in (positions, positions.to(device)))
    for name in ("mirrored", "gamma", "dropped"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    for name in ("posterior", "noise"):  # float64's log and cos may differ in the last bit, float32 seldom shows it
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=2e-7, atol=1e-14)


@pytest.mark.slow
def test_compiled_draws_have_the_bits_of_eager_ones(device: torch.device) -> None:
    positions = (2**40 + torch.arange(50)).to(device)
    expected, found = (draw(7, positions, SHAPE, 0.3, True) for draw in (draw_batch, compiled(draw_batch)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sampler",
    [GradientDescent(0.05), NesterovGradientDescent(0.05, 0.5), Adam(0.02)],
    ids=lambda each: type(each).__name__,
)
def test_samples_are_those_of_the_cpu(device: torch.device, sampler: Sampler, precision: Any) -> None:
    """More samples than slots, guided, with a stopping rule that some meet."""

    def drawn(on: torch.device, how: Any) -> tuple[Tensor, Tensor]:
        field = guided(
            blind_to_time(computed_in(how, model(on).eval())),
            cfg_scale=2.0, null_label=CLASSES, guided_channels=4, interval=(0.0, 1.0),
        )  # fmt: skip
        labels = (torch.arange(9) % CLASSES).to(on)
        noise = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(1)).to(on)
        method = SamplingMethod(sampler, 12, GradientNormStop(None, 0.9))
        queue = sample_queue(
            lambda x, rows, time: field(x, labels[rows], time),
            lambda rows: noise[rows],
            torch.arange(9, device=on),
            method,
            slots=4,
        )
        ended = in_order(list(queue))
        return ended.samples.cpu(), ended.nfe.cpu()

    (expected, nfe), (found, found_nfe) = drawn(CPU, "fp32"), drawn(device, precision)
    if precision == "fp32":
        assert torch.equal(found_nfe, nfe)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # twelve evaluations, each off by 1e-6
    else:
        together = found_nfe == nfe  # who meets the rule at 0.9 of the first norm may do so an evaluation apart
        assert together.float().mean() > 0.5
        # Three digits of the field in each evaluation; Adam divides by its size, and so may turn round where it is 0.
        assert (found - expected)[together].square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


def test_a_state_saved_on_the_device_is_the_state_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    one, other = engine(device), engine(CPU)
    run(one)
    saved = {(piece.name, piece.state): piece.values.cpu() for piece in one.fragments()}
    for piece in other.fragments():
        piece.values.copy_(saved[piece.name, piece.state])
    other.restored(STEPS)
    # What follows is the same run: on the same device bit for bit.
    following, expected = run(other), run(one)
    torch.testing.assert_close(following, expected, rtol=0 if device == CPU else 1e-4, atol=0)


def test_a_group_of_one_rank_changes_nothing(device: torch.device, tmp_path: Path) -> None:
    """NCCL on a GPU, gloo on the CPU: the collectives of a step, with nobody to meet."""
    expected = run(engine(device))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        found = run(engine(device))
        total = all_reduce_sum(torch.ones(3, device=device))
        dist.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
        assert from_rank_zero({"step": 3}) == {"step": 3}
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, expected, rtol=1e-6 if device.type == "cuda" else 0, atol=0)


@pytest.mark.gpu
def test_tf32_is_in_effect_where_it_is_asked_for_and_nowhere_else() -> None:
    """A product of 1 + 2^-12 with 1 keeps its last bits in fp32 and loses them in TF32, whose inputs have 10 bits."""
    x = torch.full((256, 256), 1 + 2.0**-12, device="cuda")
    image, kernel = x.expand(1, 64, -1, -1), torch.ones(64, 64, 1, 1, device="cuda")
    identity = torch.eye(256, device="cuda")
    for precision, kept in (("fp32", True), ("tf32", False), ("fp32", True)):
        set_products(precision)  # type: ignore[arg-type]
        for product in (x @ identity, torch.nn.functional.conv2d(image, kernel)):
            assert bool((product / product.round() - 1).abs().max() > 2.0**-13) is kept, precision
