"""Training compiled by torch's Inductor: each block of the model by itself, and the draws of a batch in one piece.

By block rather than as a whole: one graph serves all blocks, so that it is compiled once, and gradients appear block
by block, so that their reduction over ranks overlaps the rest of the backward pass.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch

from eqm_dist.errors import ConfigError
from eqm_dist.train.step import DrawBatch, draw_batch


def require_compiler(device: torch.device) -> None:
    """Compile a small function for a device, to find out whether that can be done there.

    Raises:
        ConfigError: it cannot.
    """
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:  # whatever torch, Triton or a C++ compiler raises, in a child process or in this one
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        compiler = "Triton" if device.type == "cuda" else "C++"
        raise ConfigError(
            f"train.compile needs a compiler that works for {device.type} ({compiler}), and a first function could not"
            f" be compiled ({reason[:200]}); install one, or set train.compile=never."
        ) from error


def compile_blocks(blocks: Iterable[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile blocks in place: the names of their parameters stay, and blocks that are built alike share their graphs.

    A batch of another size is another graph; a step has two sizes at most. Where torch would give up after many and
    go on without compiling, in silence, it raises an error.

    Args:
        blocks: modules of one class.
        backend: of ``torch.compile``.
    """
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs at the bounds of buckets; blocks are cuts enough
    # Both engines run the backward pass outside of autocast, and a compiled one must do what the eager one does.
    functorch.backward_pass_autocast = "off"  # noqa: S105
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False, backend=backend)


def compiled_draw() -> DrawBatch:
    """``draw_batch`` in a few kernels instead of hundreds, with the same bits."""
    return torch.compile(draw_batch, fullgraph=True, dynamic=False)
