from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqm_dist.core.samplers import (
    Adam,
    BacktrackingStep,
    DecayingStep,
    Field,
    GradientDescent,
    NesterovGradientDescent,
    Sampler,
)
from eqm_dist.core.sampling import GradientNormStop, SampleResult, SamplingMethod, in_order, sample, sample_queue
from eqm_dist.errors import ConfigError

START = torch.tensor([[1.0, -2.0], [0.5, 4.0], [0.0, -1.0]], dtype=torch.float64)


def quadratic(curvature: float) -> Field:
    """The field of the energy curvature * ||x||^2 / 2."""
    return lambda x: -curvature * x


@given(step_size=st.floats(0.01, 1.0), curvature=st.floats(0.1, 1.9), nfe=st.integers(1, 30))
def test_gradient_descent_on_a_quadratic(step_size: float, curvature: float, nfe: int) -> None:
    result = sample(quadratic(curvature), START, SamplingMethod(GradientDescent(step_size), nfe))
    expected = (1 - step_size * curvature) ** nfe * START
    torch.testing.assert_close(result.samples, expected, rtol=1e-11, atol=1e-13)
    assert result.nfe.tolist() == [nfe] * len(START)
    assert result.nfe.dtype == torch.int64


@given(
    step_size=st.floats(0.01, 1.0), momentum=st.floats(0, 0.9), curvature=st.floats(0.1, 1.0), steps=st.integers(1, 30)
)
def test_nesterov_on_a_quadratic_is_a_linear_recurrence(
    step_size: float, momentum: float, curvature: float, steps: int
) -> None:
    # Equation 9 with field -k x: x_{k+1} = (1 - eta k (1 + mu)) x_k + eta k mu x_{k-1}, a power of a 2 x 2 matrix.
    shrink = step_size * curvature
    companion = np.array([[1 - shrink * (1 + momentum), shrink * momentum], [1, 0]])
    factor = np.linalg.matrix_power(companion, steps) @ np.ones(2)  # x_{-1} = x_0: the first step has no momentum
    result = sample(quadratic(curvature), START, SamplingMethod(NesterovGradientDescent(step_size, momentum), steps))
    torch.testing.assert_close(result.samples, factor[0] * START, rtol=1e-10, atol=1e-12)


def test_nesterov_without_momentum_is_gradient_descent() -> None:
    plain = sample(torch.cos, START, SamplingMethod(GradientDescent(0.1), 7))
    assert torch.equal(
        sample(torch.cos, START, SamplingMethod(NesterovGradientDescent(0.1, 0.0), 7)).samples, plain.samples
    )


def test_the_samplers_are_their_equations_to_the_last_bit() -> None:
    start = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x, step = start, torch.zeros_like(start)
    for _ in range(20):
        step = 0.1 * torch.cos(x + 0.3 * step)
        x = x + step
    assert torch.equal(sample(torch.cos, start, SamplingMethod(NesterovGradientDescent(0.1, 0.3), 20)).samples, x)


@given(first=st.floats(0.01, 1.0), last=st.floats(0.001, 1.0), nfe=st.integers(1, 20))
def test_a_decaying_step_on_a_quadratic(first: float, last: float, nfe: int) -> None:
    sizes = np.geomspace(first, last, nfe + 1)[:-1]
    result = sample(quadratic(0.7), START, SamplingMethod(GradientDescent(first, DecayingStep(last)), nfe))
    torch.testing.assert_close(result.samples, float(np.prod(1 - 0.7 * sizes)) * START, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.3])
def test_backtracking_halves_each_samples_step_until_it_descends(momentum: float) -> None:
    curvature = torch.tensor(
        [[1.0], [6.0], [30.0]], dtype=torch.float64
    )  # 2 / 30 is the largest stable step of the last

    def field(x: torch.Tensor) -> torch.Tensor:
        return -curvature * x

    constant = sample(field, START, SamplingMethod(NesterovGradientDescent(0.4, momentum), 60)).samples
    assert (constant[1:].abs() > 1e3).any(1).all()
    policy = BacktrackingStep(rise=0.0)
    careful = sample(field, START, SamplingMethod(NesterovGradientDescent(0.4, momentum, policy), 60))
    assert careful.nfe.tolist() == [60] * 3
    assert (careful.samples.abs() < 1e-4).all()
    torch.testing.assert_close(careful.samples[0], constant[0], rtol=0, atol=0)  # nothing to take back


def test_backtracking_takes_the_step_back_before_it_tries_a_shorter_one() -> None:
    # Curvature 6, step 0.4: the first step multiplies x by -1.4, which is taken back; 0.2 multiplies it by -0.2.
    result = sample(quadratic(6), START, SamplingMethod(GradientDescent(0.4, BacktrackingStep(rise=0.0)), 2))
    torch.testing.assert_close(result.samples, -0.2 * START, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nfe", [1, 7, 40])
def test_adam_is_that_of_torch(nfe: int) -> None:
    x = START.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.05)
    for _ in range(nfe):
        x.grad = -torch.cos(x.detach())
        optimizer.step()
    result = sample(torch.cos, START, SamplingMethod(Adam(0.05), nfe))
    torch.testing.assert_close(result.samples, x.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "stop", [GradientNormStop(norm=0.01), GradientNormStop(ratio=0.01), GradientNormStop(norm=0.01, ratio=0.001)]
)
def test_a_sample_stops_at_the_first_field_below_the_limit(stop: GradientNormStop) -> None:
    start = torch.tensor([[1.0, 1.0], [8.0, -8.0], [0.5, 0.5], [1e4, 1e4]], dtype=torch.float64)
    shrink = 1 - 0.2
    result = sample(quadratic(1.0), start, SamplingMethod(GradientDescent(0.2), 50, stop))
    # Evaluation k + 1 sees shrink^k times the start, whose root mean square is that of either coordinate.
    first = start[:, 0].abs().numpy()
    limit = np.maximum(stop.norm or 0, (stop.ratio or 0) * first)
    expected = np.minimum(50, 2 + np.floor(np.log(limit / first) / np.log(shrink)))
    assert result.nfe.tolist() == expected.tolist()
    assert result.complete.tolist() == (expected < 50).tolist()
    for row, nfe in enumerate(result.nfe.tolist()):  # and is then what a fixed schedule of so many NFE gives
        fixed = sample(quadratic(1.0), start, SamplingMethod(GradientDescent(0.2), nfe)).samples
        assert torch.equal(result.samples[row], fixed[row])


QUEUE = torch.linspace(0.1, 30, 9, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0], dtype=torch.float64)


def pull(x: torch.Tensor, rows: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Every third of the samples has the same curvature."""
    return -x * (1 + rows[:, None] % 3)


@cache
def one_by_one(sampler: Sampler) -> SampleResult:
    stop = GradientNormStop(norm=0.5)
    queues = (
        sample_queue(pull, QUEUE.__getitem__, row, SamplingMethod(sampler, 30, stop=stop), slots=1)
        for row in torch.arange(9).split(1)
    )
    return in_order([part for queue in queues for part in queue])


@pytest.mark.parametrize("sampler", [GradientDescent(0.2), NesterovGradientDescent(0.2, 0.3), Adam(0.05)])
@given(slots=st.integers(1, 12), order=st.permutations(range(9)))
def test_slots_are_refilled_and_change_no_sample(sampler: Sampler, slots: int, order: list[int]) -> None:
    sizes, started = [], []

    def field(x: torch.Tensor, rows: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        assert len(x) == slots or len(started) == len(order)  # no slot is idle while some wait
        return pull(x, rows, time)

    def start(rows: torch.Tensor) -> torch.Tensor:
        started.extend(rows.tolist())
        return QUEUE[rows]

    stop = GradientNormStop(norm=0.5)
    result = in_order(
        list(sample_queue(field, start, torch.tensor(order), SamplingMethod(sampler, 30, stop=stop), slots=slots))
    )
    assert started == order  # each once, in the order of the queue
    assert sum(sizes) == result.nfe.sum()  # an evaluation for every count, none of a sample that has ended
    assert torch.equal(result.samples, one_by_one(sampler).samples)
    assert torch.equal(result.nfe, one_by_one(sampler).nfe)


def test_time_is_the_part_of_the_evaluations_that_lies_behind() -> None:
    times = []

    def field(x: torch.Tensor, rows: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        times.append(time.tolist())
        return -x

    list(sample_queue(field, START.__getitem__, torch.arange(3), SamplingMethod(GradientDescent(0.1), 4), slots=3))
    assert times == [[part] * 3 for part in (0.0, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize("sampler", [GradientDescent(0.1), NesterovGradientDescent(0.1, 0.3), Adam(0.1)])
def test_evaluations_are_counted_where_they_happen(sampler: Sampler) -> None:
    sizes = []

    def field(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return -x

    result = sample(field, START, SamplingMethod(sampler, 5))
    assert sizes == [3] * 5
    assert result.nfe.tolist() == [5, 5, 5]


def test_sampling_records_no_graph_and_leaves_the_start_alone() -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    start = START.clone()
    result = sample(lambda x: -weight * x, start, SamplingMethod(NesterovGradientDescent(0.1, 0.3), 3))
    assert not result.samples.requires_grad
    assert torch.equal(start, START)


def queue(**options: Any) -> list[Any]:
    field: Any = torch.cos
    rows = torch.arange(len(START))
    return list(
        sample_queue(field, START.__getitem__, rows, SamplingMethod(GradientDescent(0.1), 3), **{"slots": 3, **options})
    )


def test_each_sample_goes_its_own_way() -> None:
    whole = sample(torch.cos, START, SamplingMethod(NesterovGradientDescent(0.1, 0.3), 9)).samples
    alone = [
        sample(torch.cos, row[None], SamplingMethod(NesterovGradientDescent(0.1, 0.3), 9)).samples for row in START
    ]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GradientDescent(0.0), "step_size"),
        (lambda: GradientDescent(float("inf")), "step_size"),
        (lambda: NesterovGradientDescent(-0.1, 0.3), "step_size"),
        (lambda: NesterovGradientDescent(0.1, 1.0), "momentum"),
        (lambda: NesterovGradientDescent(0.1, -0.1), "momentum"),
        (lambda: sample(torch.cos, START, SamplingMethod(GradientDescent(0.1), 0)), "nfe"),
        (lambda: Adam(0.0), "step_size"),
        (lambda: DecayingStep(0.0), "final_step_size"),
        (lambda: BacktrackingStep(-0.1), "rise"),
        (lambda: GradientNormStop(), "norm, ratio or both"),
        (lambda: GradientNormStop(norm=0.0), "norm"),
        (lambda: GradientNormStop(ratio=1.0), "ratio"),
        (lambda: queue(slots=0), "slots"),
        (lambda: queue(start_time=0.5), "start_time"),
    ],
)
def test_parameters_out_of_range_are_refused(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make()
