"""Blocks and functions compiled by torch's Inductor.

A model is compiled block by block rather than as a whole: one graph serves all blocks, so that it is compiled once, and
gradients appear block by block, so that their reduction over ranks overlaps the rest of the backward pass.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._functorch import config as functorch

from eqm_dist.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


def require_compiler(device: torch.device, option: str) -> None:
    """Compile a small function for a device, to find out whether that can be done there.

    Args:
        device: where the compiled code is to run.
        option: the name of the option that asks for it, for the sentence.

    Raises:
        ConfigError: it cannot.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever torch, Triton or a C++ compiler raises, in a child process or in this one
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        compiler = "Triton" if device.type == "cuda" else "C++"
        raise ConfigError(
            f"{option} needs a compiler that works for {device.type} ({compiler}), and a first function could not"
            f" be compiled ({reason[:200]}); install one, or set {option}=never."
        ) from error


def compile_blocks(
    blocks: Iterable[nn.Module], *, any_size: bool = False, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile blocks in place: the names of their parameters stay, and blocks that are built alike share their graphs.

    Where torch would give up after many graphs and go on without compiling, in silence, it raises an error.

    Args:
        blocks: modules of one class.
        any_size: one graph for batches of all sizes; otherwise each size has its own, a little faster one.
        backend: of ``torch.compile``.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs at the bounds of buckets; blocks are cuts enough
    # Both engines run the backward pass outside of autocast, and a compiled one must do what the eager one does.
    functorch.backward_pass_autocast = "off"  # noqa: S105
    for block in blocks:
        block.compile(fullgraph=True, dynamic=any_size, backend=backend)


def compiled(function: Function) -> Function:
    """A function of tensors as one graph for each shape of its arguments."""
    return cast("Function", torch.compile(function, fullgraph=True, dynamic=False))
