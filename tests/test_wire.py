"""What goes over the wire in a step, counted on two ranks: collectives, their bytes, and waits for the device."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from eqm_dist.build import OpenRun, build_run
from eqm_dist.open_run import open_run
from eqm_dist.train.loop import _update
from tests import tiny
from tests.distributed import run_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.deepspeed]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"engine.kind": "torch"},
    **{f"zero{stage}": {"engine.zero_stage": stage} for stage in range(4)},
    "zero1 halved": {"engine.deepspeed": {"communication_data_type": "bf16"}},
    "zero0 halved in bf16": {
        "engine.zero_stage": 0,
        "engine.deepspeed": {"communication_data_type": "bf16"},
        "train.precision": "bf16",
    },
}
# Bytes a parameter in a step, by the micro-batches of one: the fp32 gradient is summed once (4), under ZeRO 2 and 3 for
# each micro-batch; what was updated in parts is gathered (4).
PREDICTED = {
    "plain": {1: 4, 2: 4},
    "zero0": {1: 4, 2: 4},
    "zero1": {1: 4 + 4, 2: 4 + 4},
    "zero2": {1: 4 + 4, 2: 2 * 4 + 4},
    "zero3": {1: 4 + 4, 2: 2 * 4 + 4},
    "zero1 halved": {1: 2 + 4, 2: 2 + 4},
    "zero0 halved in bf16": {1: 2, 2: 2},
}
# What is no parameter: the norm, and the padding that makes pieces equal, of a model of 10,000 parameters.
TOLERANCE = 0.05


class _Wire(TorchDispatchMode):
    """Counts collectives and the bytes of the whole that each sums or gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives = Counter[str]()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.collectives[func._opname] += 1
            whole = args[1] if func._opname == "_reduce_scatter_base_" else args[0]
            tensors = [leaf for leaf in pytree.tree_leaves(whole) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return func(*args, **(kwargs or {}))


def count(rank: int, runs: list[OpenRun]) -> list[tuple[float, dict[str, int], int]]:
    """Of each run's third step: bytes a parameter, collectives by name, and waits for the device."""
    return [_count(opened) for opened in runs]


def _count(opened: OpenRun) -> tuple[float, dict[str, int], int]:
    from deepspeed.accelerator import get_accelerator

    run = build_run(opened, torch.device("cpu"))
    parameters = sum(shape.numel() for shape in run.engine.shapes.values())
    *first, last = run.loader.batches(0, 3)
    for batch in first:
        _update(run, batch)
        run.state.count_step()
    waits = 0

    def synchronize(*_: Any, **__: Any) -> None:
        nonlocal waits
        waits += 1

    with pytest.MonkeyPatch.context() as patch, _Wire() as wire:
        patch.setattr(type(get_accelerator()), "synchronize", synchronize)
        _update(run, last)
    return wire.bytes / parameters, dict(wire.collectives), waits


def test_a_step_sends_what_was_predicted_and_never_waits_for_the_device(shards: Path, tmp_path: Path) -> None:
    cases = [(name, parts) for name in CASES for parts in (1, 2)]
    runs = [
        open_run(
            tiny.config(
                tmp_path,
                shards,
                **{"run.name": f"{number}", "launch.launcher": "ray", "train.global_batch": 8},
                **{"train.micro_batch": 4 // parts, **CASES[name]},
            )
        )
        for number, (name, parts) in enumerate(cases)
    ]
    for (name, parts), (found, collectives, waits) in zip(cases, run_ranks(2, count, runs)[0], strict=True):
        case = f"{name}, {parts} micro-batches: {collectives}"
        assert found == pytest.approx(PREDICTED[name][parts], abs=TOLERANCE), case
        assert waits == 0, case
        if name == "plain":  # one bucket of all gradients, while the backward pass goes on, at any accumulation
            assert collectives == {"allreduce_": 1}, case
        if name in ("zero1", "zero2"):  # a bucket goes to the rank that keeps its sum; what is all-reduced is the norm
            assert collectives["allreduce_"] == 1, case
            assert collectives["reduce_"] == 2 * (parts if name == "zero2" else 1), case
