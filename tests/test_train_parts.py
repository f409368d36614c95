"""The parts of training one by one: optimizer, schedule, meters, division of a batch, the random part, the loop."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import eqm_dist.train.meters as meters_module
from eqm_dist.build import OpenRun, build_run, plan_batch
from eqm_dist.config import Config
from eqm_dist.core.decay import TruncatedDecay
from eqm_dist.core.objective import eqm_loss
from eqm_dist.data.loader import Batch
from eqm_dist.data.order import SampleOrder, rank_range
from eqm_dist.data.shards import write_shards
from eqm_dist.errors import ConfigError, NonFiniteLossError
from eqm_dist.models import SiT
from eqm_dist.open_run import open_run
from eqm_dist.options import with_overrides
from eqm_dist.presets import digits
from eqm_dist.track.jsonl import read_metrics
from eqm_dist.train.grad_norms import group_of
from eqm_dist.train.loop import train
from eqm_dist.train.meters import Meters
from eqm_dist.train.optimizer import EmaAdamW, ema_key
from eqm_dist.train.schedule import LearningRateSchedule
from eqm_dist.train.step import BatchLoss
from tests import tiny
from tests.distributed import run_ranks

CPU = torch.device("cpu")

# --- optimizer ---

SHAPES = [(3, 5), (7,), ()]
SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in SHAPES]


def update(optimizer: torch.optim.Optimizer, params: list[Tensor], step: int) -> None:
    for param, grad in zip(params, gradients(step, params[0].dtype), strict=True):
        param.grad = grad
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_torch_adamw(dtype: torch.dtype) -> None:
    ours, theirs, plain = parameters(dtype), parameters(dtype), parameters(dtype)
    optimizers = [
        (EmaAdamW(ours, **SETTINGS, ema_decays=(0.9,)), ours),
        (torch.optim.AdamW(theirs, **SETTINGS, fused=True), theirs),
        (torch.optim.AdamW(plain, **SETTINGS, foreach=False), plain),
    ]
    for step in range(20):
        for optimizer, params in optimizers:
            update(optimizer, params, step)
    for mine, same, other, start in zip(ours, theirs, plain, parameters(dtype), strict=True):
        assert torch.equal(mine, same)  # the EMAs leave the update alone
        # The unfused update rounds in another order: a few ulp a step, twenty steps.
        torch.testing.assert_close(mine, other, rtol=200 * torch.finfo(dtype).eps, atol=200 * torch.finfo(dtype).eps)
        assert (mine - start).abs().max() > 0.1


def test_emas_have_their_closed_form() -> None:
    decays, steps = (0.0, 0.9, 0.999), 25
    params = parameters()
    optimizer = EmaAdamW(params, **SETTINGS, ema_decays=decays)
    history = [[param.detach().clone() for param in params]]
    for step in range(steps):
        update(optimizer, params, step)
        history.append([param.detach().clone() for param in params])
    for decay in decays:
        for index, param in enumerate(params):
            # ema_n = d^n w_0 + (1 - d) sum_k d^(n-k) w_k
            expected = decay**steps * history[0][index]
            for k in range(1, steps + 1):
                expected = expected + (1 - decay) * decay ** (steps - k) * history[k][index]
            found = optimizer.state[param][ema_key(decay)]
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # 25 additions in float64
    assert torch.equal(optimizer.state[params[0]][ema_key(0.0)], params[0])


def test_state_is_made_once_and_starts_at_the_weights() -> None:
    params = parameters()
    optimizer = EmaAdamW(params, **SETTINGS, ema_decays=(0.9, 0.99))
    assert optimizer.state_keys == ("exp_avg", "exp_avg_sq", "ema_0.9", "ema_0.99")
    _ = optimizer.state[params[0]]  # DeepSpeed looks before there is anything
    optimizer.initialize_state(params)
    for param in params:
        assert set(optimizer.state[param]) == {"step", *optimizer.state_keys}
        assert torch.equal(optimizer.state[param]["ema_0.9"], param)
        assert optimizer.state[param]["ema_0.9"].data_ptr() != param.data_ptr()
    tensors = {key: value.data_ptr() for key, value in optimizer.state[params[0]].items()}
    update(optimizer, params, 0)
    optimizer.initialize_state(params)
    assert {key: value.data_ptr() for key, value in optimizer.state[params[0]].items()} == tensors
    assert optimizer.state[params[0]]["step"] == 1
    assert not torch.equal(optimizer.state[params[0]]["ema_0.9"], optimizer.state[params[0]]["ema_0.99"])


def test_a_parameter_without_a_gradient_keeps_weight_and_ema() -> None:
    params = parameters()
    optimizer = EmaAdamW(params, **SETTINGS, ema_decays=(0.5,))
    update(optimizer, params, 0)
    before = params[1].detach().clone(), optimizer.state[params[1]]["ema_0.5"].clone()
    params[0].grad, params[1].grad, params[2].grad = gradients(1)[0], None, gradients(1)[2]
    optimizer.step()
    assert torch.equal(params[1], before[0])
    assert torch.equal(optimizer.state[params[1]]["ema_0.5"], before[1])
    assert optimizer.state[params[0]]["step"] == 2
    assert optimizer.state[params[1]]["step"] == 1


@pytest.mark.parametrize("one_call_each", [True, False], ids=["stage 3", "stages 1 and 2"])
def test_flat_pieces_are_updated_like_the_whole(one_call_each: bool) -> None:
    """DeepSpeed swaps flat pieces of all parameters into the group; in stage 3 it steps once for each of them."""
    whole = parameters()
    reference = EmaAdamW(whole, **SETTINGS, ema_decays=(0.9, 0.5))
    cuts = [4, 13]

    def flat_pieces(tensors: list[Tensor]) -> list[Tensor]:
        return [piece.clone() for piece in torch.cat([t.detach().flatten() for t in tensors]).tensor_split(cuts)]

    pieces = [piece.requires_grad_() for piece in flat_pieces(parameters())]
    optimizer = EmaAdamW(parameters(), **SETTINGS, ema_decays=(0.9, 0.5))
    for step in range(5):
        update(reference, whole, step)
        for piece, grad in zip(pieces, flat_pieces(gradients(step)), strict=True):
            piece.grad = grad
        for called_with in [[piece] for piece in pieces] if one_call_each else [pieces]:
            optimizer.param_groups[0]["params"] = called_with
            optimizer.step()
            optimizer.param_groups[0]["params"] = []
    # Elements at the end of a tensor take another path through the vectorised kernel: off by an ulp a step.
    close = partial(torch.testing.assert_close, rtol=1e-14, atol=1e-15)
    close(torch.cat([piece.detach() for piece in pieces]), torch.cat(flat_pieces(whole)))
    for key in reference.state_keys:
        found = torch.cat([optimizer.state[piece][key] for piece in pieces])
        close(found, torch.cat(flat_pieces([reference.state[param][key] for param in whole])))
    assert [optimizer.state[piece]["step"].item() for piece in pieces] == [5, 5, 5]


# --- learning rate ---

schedules = st.builds(
    lambda peak, warmup, rest, shape: LearningRateSchedule(peak, warmup + rest, warmup, shape),
    st.floats(1e-6, 1),
    st.integers(0, 50),
    st.integers(1, 200),
    st.sampled_from(["constant", "cosine", "linear"]),
)


@given(schedules)
def test_the_learning_rate_rises_to_its_peak_and_never_again(schedule: LearningRateSchedule) -> None:
    rates = [schedule(step) for step in range(schedule.steps)]
    warm_up, rest = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert rest[0] == schedule.peak
    assert all(0 < rate <= schedule.peak for rate in rates)  # no update is wasted on a rate of zero
    assert warm_up == sorted(set(warm_up))
    assert rest == sorted(rest, reverse=True)
    # No jump: a step changes the rate by no more than the steepest slope of its part.
    slope = {"constant": 0.0, "linear": 1.0, "cosine": math.pi / 2}[schedule.shape]
    steepest = schedule.peak * max(1 / (schedule.warmup_steps + 1), slope / (schedule.steps - schedule.warmup_steps))
    assert max(map(abs, np.diff(rates)), default=0.0) <= steepest * (1 + 1e-9)


@given(schedules)
def test_the_learning_rate_ends_where_its_shape_says(schedule: LearningRateSchedule) -> None:
    end = schedule(schedule.steps)  # the limit after the last update
    assert end == pytest.approx(schedule.peak if schedule.shape == "constant" else 0.0, abs=1e-16)
    half_way = LearningRateSchedule(schedule.peak, 2 * schedule.steps, 0, schedule.shape)(schedule.steps)
    assert half_way == pytest.approx(schedule.peak * (1.0 if schedule.shape == "constant" else 0.5))


def test_the_warm_up_is_linear_from_zero() -> None:
    schedule = LearningRateSchedule(peak=1.0, steps=100, warmup_steps=4)
    assert [schedule(step) for step in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


def test_a_cosine_is_a_cosine() -> None:
    schedule = LearningRateSchedule(peak=2.0, steps=13, warmup_steps=1, shape="cosine")
    assert [schedule(step) for step in (1, 4, 7, 10)] == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)])


# --- meters ---


def add(meters: Meters, step: int, loss: float, grad_norm: float = 1.0) -> None:
    meters.add(step, torch.tensor(loss), torch.tensor(grad_norm), data_wait_s=0.25)


def test_meters_give_means_and_start_again() -> None:
    meters = Meters(CPU)
    for step, (loss, norm) in enumerate([(1.0, 10.0), (2.0, 20.0), (6.0, 60.0)]):
        add(meters, step, loss, norm)
    interval = meters.report()
    assert (interval.loss, interval.grad_norm, interval.data_wait_s) == (3.0, 30.0, 0.25)
    assert interval.first_bad_step is None
    add(meters, 3, 5.0)
    assert meters.report().loss == 5.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_meters_name_the_first_bad_step_of_an_interval(bad: float, where: str) -> None:
    meters = Meters(CPU)
    for step in range(10, 16):
        add(meters, step, **{"loss": 1.0, **({where: bad} if step in (12, 14) else {})})
    assert meters.report().first_bad_step == 12
    add(meters, 16, 1.0)
    assert meters.report().first_bad_step is None


def test_the_step_time_counts_from_where_the_clock_was_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(meters_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meters = Meters(CPU)
    for passed, restart in [(30.0, True), (4.0, False)]:  # an evaluation, then two steps
        now[0] += passed
        if restart:
            meters.restart_clock()
    add(meters, 0, 1.0)
    add(meters, 1, 1.0)
    assert meters.report().step_s == 2.0
    now[0] += 1.0
    add(meters, 2, 1.0)
    assert meters.report().step_s == 1.0


# --- division of a batch ---


def batch_config(global_batch: int, micro_batch: int | None) -> Config:
    return with_overrides(digits(), {"train.global_batch": global_batch, "train.micro_batch": micro_batch})


@given(st.integers(1, 300), st.integers(1, 40), st.none() | st.integers(1, 4) | st.integers(1, 300))
@example(10, 3, 1)  # largest share 4, smallest 3: one worker would have an empty fourth micro-batch
@example(2, 3, None)
@example(10, 3, 3)
def test_every_rank_has_the_same_number_of_micro_batches_and_every_sample_counts_once(
    global_batch: int, world: int, micro_batch: int | None
) -> None:
    assume(micro_batch is None or micro_batch <= global_batch)
    smallest, largest = global_batch // world, -(-global_batch // world)
    fewest = 1 if micro_batch is None else -(-largest // micro_batch)
    possible = smallest >= fewest  # every worker has at least one sample for each of its micro-batches
    if not possible:
        few = f"train.global_batch={global_batch} must be at least the number of workers, {world}; raise it or lower"
        empty = f"train.micro_batch={micro_batch} leaves a worker's micro-batch empty"
        with pytest.raises(ConfigError, match=few if global_batch < world else empty):
            plan_batch(batch_config(global_batch, micro_batch), world)
        return
    grad_accum, most = plan_batch(batch_config(global_batch, micro_batch), world)
    assert grad_accum == fewest  # fewer, larger products
    assert most <= (micro_batch or largest)
    positions = []
    for rank in range(world):
        part = torch.arange(*rank_range(0, global_batch, rank, world))
        micro_batches = Batch(part, torch.zeros(len(part), 1), part).split(grad_accum)
        assert len(micro_batches) == grad_accum
        assert all(1 <= len(micro_batch.positions) <= most for micro_batch in micro_batches)
        positions += [position for micro_batch in micro_batches for position in micro_batch.positions.tolist()]
    assert positions == list(range(global_batch))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(2, 8), st.booleans())
def test_no_worker_and_no_micro_batch_cuts_a_group_of_the_dispersive_loss(
    world: int, grad_accum: int, groups: int, group: int, cut: bool
) -> None:
    micro_batch = groups * group
    config = with_overrides(
        batch_config(world * grad_accum * micro_batch + cut, micro_batch),
        {"objective.dispersive.weight": 0.5, "objective.dispersive.group": group},
    )
    if cut:  # one sample more than whole groups
        with pytest.raises(ConfigError, match=r"objective\.dispersive compares groups of samples that no worker or"):
            plan_batch(config, world)
        return
    assert plan_batch(config, world) == (grad_accum, micro_batch)
    for rank in range(world):
        part = torch.arange(*rank_range(0, config.train.global_batch, rank, world))
        for piece in Batch(part, torch.zeros(len(part), 1), part).split(grad_accum):
            assert piece.positions[0] % group == len(piece.positions) % group == 0


# --- the random part ---

DRAWS = 20_000


def draws(step: BatchLoss, batch: Batch) -> dict[str, Tensor]:
    """What a training step hands to its objective."""
    handed: dict[str, Tensor] = {}

    def keep(model: object, latents: Tensor, labels: Tensor, *, gamma: Tensor, noise: Tensor) -> Tensor:
        handed.update(latents=latents, labels=labels, gamma=gamma, noise=noise)
        return gamma

    replace(step, loss=keep)(lambda x, labels: x, batch)
    return handed


def training_step(**changes: Any) -> BatchLoss:
    settings: dict[str, Any] = {
        "loss": partial(eqm_loss, decay=TruncatedDecay()),
        "seed": 5,
        "latent_scale": 0.5,
        "latent_shift": 0.25,
        "label_dropout": 0.1,
        "null_label": 10,
        "flip": True,
    }
    return BatchLoss(**{**settings, **changes})


def random_batch(size: int, first_position: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(size)
    positions = first_position + torch.arange(size)
    moments = torch.randn(size, 2, 4, 4, 4, generator=generator)  # two views, mean and log-variance of two channels
    return Batch(positions, moments, torch.randint(10, (size,), generator=generator))


def take(batch: Batch, rows: Tensor) -> Batch:
    return Batch(batch.positions[rows], batch.moments[rows], batch.labels[rows])


@given(st.permutations(range(12)), st.integers(1, 11), st.sampled_from([0, 997, 2**33]))
def test_draws_depend_on_the_position_alone(order: list[int], cut: int, first_position: int) -> None:
    step, batch = training_step(), random_batch(12, first_position)
    whole = draws(step, batch)
    for rows in (torch.tensor(order[:cut]), torch.tensor(order[cut:])):
        for name, values in draws(step, take(batch, rows)).items():
            assert torch.equal(values, whole[name][rows]), name


def test_a_divided_batch_has_the_losses_of_the_whole() -> None:
    model = SiT(
        input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=10,
        zero_init=False, seed=0,
    ).double()  # fmt: skip
    batch = random_batch(9)
    batch = Batch(batch.positions, batch.moments.double(), batch.labels)
    step = training_step()
    whole = step(model, batch)
    assert whole.shape == (9,)
    for parts in (2, 4, 9):
        divided = torch.cat([step(model, part) for part in batch.split(parts)])
        torch.testing.assert_close(divided, whole, rtol=1e-12, atol=0)  # the same sums in another blocking, in float64


def test_other_seeds_and_other_positions_give_other_draws() -> None:
    here = draws(training_step(), random_batch(8))
    for other in (
        draws(training_step(seed=6), random_batch(8)),
        draws(training_step(), replace(random_batch(8), positions=torch.arange(8, 16))),
    ):
        for name in ("latents", "gamma", "noise"):
            assert (here[name] != other[name]).flatten(1).any(1).all() if here[name].ndim > 1 else True
            assert not torch.equal(here[name], other[name])


def five_sigma(probability: float) -> float:
    """How far a frequency of so many draws may lie from its probability: missed once in two million."""
    return 5 * math.sqrt(probability * (1 - probability) / DRAWS)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5])
def test_labels_are_dropped_as_often_as_asked(probability: float) -> None:
    batch = Batch(torch.arange(DRAWS), torch.zeros(DRAWS, 1, 2, 1, 1), torch.arange(DRAWS) % 10)
    labels = draws(training_step(label_dropout=probability, flip=False), batch)["labels"]
    dropped = labels == 10
    assert abs(dropped.double().mean().item() - probability) <= five_sigma(probability)
    assert torch.equal(labels[~dropped], batch.labels[~dropped])


def test_a_flip_takes_the_mirror_half_of_the_time() -> None:
    moments = torch.full((DRAWS, 2, 2, 1, 1), -math.inf)  # a log-variance of -inf: the posterior is its mean
    moments[:, 0, 0], moments[:, 1, 0] = 3.0, 7.0
    batch = Batch(torch.arange(DRAWS), moments, torch.zeros(DRAWS, dtype=torch.int64))
    plain = training_step(latent_scale=1.0, latent_shift=0.0)
    latents = draws(plain, batch)["latents"].flatten()
    assert set(latents.tolist()) == {3.0, 7.0}
    assert abs((latents == 7.0).double().mean().item() - 0.5) <= five_sigma(0.5)
    assert set(draws(replace(plain, flip=False), batch)["latents"].flatten().tolist()) == {3.0}


def test_latents_are_scaled_posterior_samples() -> None:
    moments = torch.zeros(DRAWS, 1, 2, 1, 1)
    moments[:, :, 0], moments[:, :, 1] = 2.0, math.log(9.0)
    batch = Batch(torch.arange(DRAWS), moments, torch.zeros(DRAWS, dtype=torch.int64))
    handed = draws(training_step(flip=False), batch)
    # Mean 2 and deviation 3, then (. - 0.25) * 0.5.
    assert handed["latents"].mean().item() == pytest.approx(0.875, abs=5 * 1.5 / math.sqrt(DRAWS))
    assert handed["latents"].std().item() == pytest.approx(1.5, abs=5 * 1.5 / math.sqrt(2 * DRAWS))
    assert torch.corrcoef(torch.stack([handed["latents"].flatten(), handed["noise"].flatten()]))[0, 1].abs() < 0.05


# --- the loop ---

BAD_STEP = 6


class Spiked:
    """Blots of which one is so bright that the square of its error overflows fp32: data that a run stumbles over."""

    id = "spiked"
    latent_channels: int | None = None
    latent_scale = 1.0
    latent_shift = 0.0
    location: str | None = None

    def __init__(self, spike: Tensor) -> None:
        self.spike = spike

    def encode(self, images: Tensor) -> Tensor:
        mean = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        bad = (images == self.spike).flatten(1).all(1)
        mean[bad] = 1e30
        return torch.cat([mean, torch.full_like(mean, -torch.inf)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def spiked_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose bad sample comes in step 6 of a run with seed 0, eight windows and four samples a step."""
    order = SampleOrder([16, 16, 16], seed=0, window_shards=8)
    _, indices = order.samples(np.array([4 * (BAD_STEP - 1) + 1]))
    spike = torch.from_numpy(next(iter(tiny.Blots().read(indices[0], indices[0] + 1))).image)
    directory = tmp_path_factory.mktemp("spiked")
    write_shards(directory, "spiked", tiny.Blots(), Spiked(spike), samples_per_shard=16, dtype="float32")
    return directory


@pytest.mark.parametrize(
    ("log_every", "save_every", "last_good"),
    [(1, 2, 4), (100, 2, 4), (5, 5, 5), (100, 4, 4), (1, 100, None), (100, 1, 5)],
)
def test_a_loss_that_is_not_finite_stops_the_run_at_its_last_good_checkpoint(
    log_every: int, save_every: int, last_good: int | None, spiked_shards: Path, tmp_path: Path
) -> None:
    settings = {"train.steps": 10, "train.log_every": log_every, "checkpoint.every": save_every, "checkpoint.keep": 99,
                "train.guard.skip": "none"}  # fmt: skip
    config = tiny.config(tmp_path, spiked_shards, **settings)
    for _ in range(2):  # starting again changes nothing: it is the same sample
        run = build_run(open_run(config), CPU)
        with pytest.raises(NonFiniteLossError) as raised:
            train(run)
        good = "no checkpoint was written yet"
        if last_good is not None:
            good = f"the last good checkpoint is {run.checkpoints.path(last_good)}"
        assert f"became NaN or infinite at step {BAD_STEP}; {good}. " in str(raised.value)
        assert run.checkpoints.whole() == [run.checkpoints.path(step) for step in range(1, 6) if step % save_every == 0]
        lines = list(read_metrics(tmp_path / "tiny" / "metrics.jsonl"))
        assert all(line["step"] < BAD_STEP and math.isfinite(line["train/loss"]) for line in lines)
    if last_good is not None:
        resumed = build_run(open_run(config), CPU)
        assert resumed.state.step == last_good
        assert all(torch.isfinite(piece.values).all() for piece in resumed.engine.fragments())


@pytest.mark.multiprocess
@pytest.mark.deepspeed
def test_deepspeed_stops_at_the_same_step(spiked_shards: Path, tmp_path: Path) -> None:
    settings = {"launch.launcher": "ray", "train.steps": 10, "train.log_every": 100, "checkpoint.every": 4,
                "train.guard.skip": "none"}  # fmt: skip
    opened = open_run(tiny.config(tmp_path, spiked_shards, **settings))
    for message in run_ranks(1, _message_of_the_end, opened):
        assert (
            f"at step {BAD_STEP}; the last good checkpoint is {tmp_path / 'tiny/checkpoints/step_00000004'}" in message
        )


def _message_of_the_end(rank: int, opened: OpenRun) -> str:
    with pytest.raises(NonFiniteLossError) as raised:
        train(build_run(opened, CPU))
    return str(raised.value)


# --- norms of the gradient by parts of the model ---


def test_parts_of_the_model_are_named_for_people() -> None:
    names = ["x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.3.attn.qkv.bias",
             "final_layer.linear.weight"]  # fmt: skip
    assert [group_of(name) for name in names] == ["embedders", "embedders", "block_03", "final_layer"]


def test_norms_by_parts_add_up_to_the_norm_of_the_whole(shards: Path, tmp_path: Path) -> None:
    settings = {"train.log_grad_norms": True, "optimizer.gradient_clip": 0.1}
    train(build_run(open_run(tiny.config(tmp_path, shards, **settings)), CPU))
    lines = list(read_metrics(tmp_path / "tiny" / "metrics.jsonl"))
    parts = ["embedders", "block_00", "final_layer"]
    for line in lines:
        whole = math.hypot(*(line[f"train/grad_norm/{part}"] for part in parts))
        assert whole == pytest.approx(line["train/grad_norm"], rel=1e-5)  # fp32 sums in another order
    assert lines[-1]["train/grad_norm"] > 0.1  # norms are those before clipping
    assert len([key for key in lines[-1] if key.startswith("train/grad_norm/")]) == len(parts)


def test_over_an_interval_a_part_has_the_root_mean_square_of_its_norms(shards: Path, tmp_path: Path) -> None:
    found = {}
    for every in (1, 3):
        settings = {
            "train.log_grad_norms": True,
            "train.log_every": every,
            "checkpoint.every": 6,
            "run.name": f"{every}",
        }
        train(build_run(open_run(tiny.config(tmp_path, shards, **settings)), CPU))
        lines = read_metrics(tmp_path / f"{every}" / "metrics.jsonl")
        found[every] = {line["step"]: line["train/grad_norm/block_00"] for line in lines}
    for last in (3, 6):
        norms = [found[1][step] for step in range(last - 2, last + 1)]
        assert found[3][last] == pytest.approx(math.sqrt(sum(norm**2 for norm in norms) / 3), rel=1e-6)
