"""What a step is made of, counted on tensors without values: kernels, and the bytes that elementwise ones move.

Eager, in bf16 autocast. What one operation of torch's does is one kernel; views are none.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step_cases import CHANNELS, PATCH, SIDE, build_model, flops_per_image
from eqm_dist.config import SIZES
from eqm_dist.train.step import draw_batch

_VIEWS = tuple(
    f"aten.{name}"
    for name in ("view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "unbind", "split", "select",
                 "slice.", "unsqueeze", "t.", "detach", "alias", "as_strided", "squeeze", "chunk")
)  # fmt: skip
_PRODUCTS = ("mm", "bmm", "attention", "flash")


class Counter(TorchDispatchMode):
    """Counts operations that would be kernels, and the bytes that they read and write.

    Attributes:
        kernels: how many.
        elementwise_bytes: of those that are no matrix products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.elementwise_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("aten.") and not name.startswith(_VIEWS) and "empty" not in name:
            self.kernels += 1
            if not any(product in name for product in _PRODUCTS):
                leaves = pytree.tree_leaves((args, kwargs, out))
                self.elementwise_bytes += sum(t.numel() * t.element_size() for t in leaves if isinstance(t, Tensor))
        return out


def counts(size: str, batch: int) -> dict[str, Any]:
    """Kernels and elementwise bytes of a block and of the draws, eager, in bf16 autocast, on tensors without values."""
    width, depth = SIZES[size].hidden_size, SIZES[size].depth
    with FakeTensorMode():
        block: Any = build_model(size).blocks[0]
        tokens = torch.empty(batch, (SIDE // PATCH) ** 2, width, requires_grad=True)
        condition = torch.empty(batch, width, requires_grad=True)
        with Counter() as forward, torch.autocast("cpu", torch.bfloat16):
            out = block(tokens, condition)
        with Counter() as backward:
            out.backward(torch.empty_like(out))
    with Counter() as draws:
        draw_batch(0, torch.arange(batch), (CHANNELS, SIDE, SIDE), 0.1, True)
    return {
        "size": size,
        "batch": batch,
        "block": {
            "forward_kernels": forward.kernels,
            "backward_kernels": backward.kernels,
            "forward_elementwise_mb": round(forward.elementwise_bytes / 1e6),
            "backward_elementwise_mb": round(backward.elementwise_bytes / 1e6),
        },
        "blocks": depth,
        "draws_kernels_eager": draws.kernels,
        "gflop_per_image": round(flops_per_image(size) / 1e9, 1),
    }
