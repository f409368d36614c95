"""A compiled step: how many graphs and kernels it takes, and that it is the step it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor

from eqm_dist.build import build_run
from eqm_dist.compiled import compile_blocks, compiled, require_compiler
from eqm_dist.errors import ConfigError
from eqm_dist.models.sit import SiT
from eqm_dist.open_run import open_run
from eqm_dist.train.step import draw_batch
from tests.distributed import run_ranks
from tests.test_engines import assert_same, config, run_engines

# Torch's own: Dynamo looks at the gradients of all tensors, and Inductor imports what torch has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning", "ignore:`torch.jit:DeprecationWarning"
)

MOST_KERNELS_OF_DRAWS = 20
SHAPE = (4, 8, 8)


def model(**changes: Any) -> SiT:
    return SiT(
        **{"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 3, "num_heads": 2,
           "num_classes": 10, "zero_init": False, **changes}
    )  # fmt: skip


def gradients(trained: nn.Module, size: int, bf16: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    x, labels = torch.randn(size, *SHAPE, generator=generator), torch.arange(size) % 10
    trained.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = trained(x, labels).float().square().mean()
    loss.backward()
    return {name: param.grad.clone() for name, param in trained.named_parameters() if param.grad is not None}


@pytest.fixture(autouse=True)
def forget_graphs() -> None:
    torch._dynamo.reset()


# --- what is counted; aot_eager makes the same graphs as Inductor and runs them operation by operation ---


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_all_blocks_share_one_graph_for_each_size_of_a_micro_batch(bf16: bool, checkpointed: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    eager, compiled = model(), model(checkpoint_blocks=checkpointed)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(compiled.blocks, backend=counter)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for size in (4, 5, 4, 5):
        expected, found = gradients(eager, size, bf16), gradients(compiled, size, bf16)
        assert list(found) == list(expected)
        for name, gradient in found.items():
            # The same operations, but for some that a graph takes apart: sums in another order, in the type they had.
            relative = 2e-2 if bf16 else 1e-5
            assert (gradient - expected[name]).norm() <= relative * expected[name].norm(), name
    assert counter.frame_count == 2


def test_samples_leave_a_compiled_batch_without_another_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    eager, compiled_model = model(), model()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(compiled_model.blocks, any_size=True, backend=counter)
    x, labels = torch.randn(25, *SHAPE), torch.arange(25) % 10
    with torch.no_grad():
        compiled_model(x, labels)
        graphs = counter.frame_count
        for size in (*range(25, 1, -1), 24):
            torch.testing.assert_close(compiled_model(x[:size], labels[:size]), eager(x[:size], labels[:size]))
    assert counter.frame_count == graphs


def test_a_size_too_many_is_an_error_and_not_a_silent_return_to_eager() -> None:
    compiled = model(depth=1)
    compile_blocks(compiled.blocks, backend="eager")
    for size in range(1, 9):
        gradients(compiled, size)
    with pytest.raises(Exception, match="recompile_limit"):
        gradients(compiled, 9)


def test_a_cpu_trains_eager_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    run = build_run(open_run(config(tmp_path, "eager", **{"engine.kind": "torch"})), torch.device("cpu"))
    blocks = [part for part in run.engine._module.modules() if type(part).__name__ == "_Block"]  # type: ignore[attr-defined]
    assert blocks
    assert not any(block._compiled_call_impl for block in blocks)


@pytest.mark.parametrize(
    ("cannot", "sentence"),
    [
        ({"objective.energy": "dot"}, "objective.energy=dot, which needs the second derivative"),
        ({"engine.zero_stage": 3}, "engine.zero_stage=3, which fetches weights"),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path: Path, cannot: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"train.compile=always cannot be with {sentence}.*leave it out"):
        config(tmp_path, "refused", **{"train.compile": "always", **cannot})


def test_an_energy_is_not_sampled_compiled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler.compile=always cannot be with objective.energy=dot.*leave it out"):
        config(tmp_path, "refused", **{"sampler.compile": "always", "objective.energy": "dot"})


def test_a_machine_without_a_compiler_is_told_so() -> None:
    with (
        inductor.patch({"cpp.cxx": (None, "/nonexistent/c++")}),
        pytest.raises(ConfigError, match=r"needs a compiler that works for cpu \(C\+\+\).*train.compile=never"),
    ):
        require_compiler(torch.device("cpu"), "train.compile")


# --- what Inductor makes of it; a minute of a C++ compiler ---


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 32, 32)])
def test_the_draws_are_a_few_kernels_with_the_same_bits(shape: tuple[int, int, int]) -> None:
    from torch._inductor import metrics

    metrics.reset()
    positions, seed = 2**33 + 7 * torch.arange(6), 2**63 + 5
    found = compiled(draw_batch)(seed, positions, shape, 0.1, True)
    for name, expected in draw_batch(seed, positions, shape, 0.1, True)._asdict().items():
        assert torch.equal(getattr(found, name), expected), name
    assert metrics.generated_kernel_count <= MOST_KERNELS_OF_DRAWS


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.deepspeed
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_engines_give_the_run_of_the_eager_ones(world: int, tmp_path: Path) -> None:
    engines = {"torch": {"engine.kind": "torch"}} | {f"zero{stage}": {"engine.zero_stage": stage} for stage in range(3)}
    compile_it = {"train.compile": "always", "train.activation_checkpointing": True}
    eager = open_run(config(tmp_path, "eager", **engines["torch"]))
    runs = [open_run(config(tmp_path, name, **engine, **compile_it)) for name, engine in engines.items()]
    reference, *curves = run_ranks(world, run_engines, [eager, *runs], None)[0]
    for name, curve in zip(engines, curves, strict=True):
        assert_same(curve, reference, f"{name}, compiled, on {world} workers")  # to the engines' own tolerance
