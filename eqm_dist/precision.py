"""In what arithmetic matrix products and convolutions run: the one place that says it, for all that a GPU does.

fp32   every product and sum in fp32, also where a GPU would take TF32 by itself, as cuDNN's convolutions do
tf32   the inputs of products rounded to 10 bits, sums in fp32; GPUs only
bf16   the inputs of products rounded to 7 bits by autocast, sums in fp32

Weights, and the state that a sampler or an optimizer carries on, are fp32 in all three.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from eqm_dist.errors import ConfigError

logger = logging.getLogger(__name__)

_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
"""As Linux names them on x86 and, the last one, on Arm."""

Precision = Literal["fp32", "tf32", "bf16"]


def in_effect(asked: Precision | Literal["auto"], device: torch.device, option: str) -> Precision:
    """The precision on a device; auto is what is fast there: bf16 on a GPU that has it, else TF32, and fp32 on a CPU.

    Args:
        asked: the value of the option.
        device: where the products are computed.
        option: its name, for the sentence.

    Raises:
        ConfigError: TF32 elsewhere than on a GPU.
    """
    on_gpu = device.type == "cuda"
    if asked == "auto":
        if not on_gpu:
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "tf32"
    if asked == "bf16" and device.type == "cpu" and not cpu_has_bf16():
        _warn_of_emulation(option)
    if asked == "tf32" and not on_gpu:
        raise ConfigError(f"{option}=tf32 needs a GPU, and this process has {device.type}; use fp32.")
    return asked


@cache
def cpu_has_bf16(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor multiplies bf16 numbers in hardware; True where the system does not say."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpu_info.read_text(), flags=re.MULTILINE)
    except OSError:
        return True
    return not flags or not _BF16_INSTRUCTIONS.isdisjoint(flags[0].split())


@cache
def _warn_of_emulation(option: str) -> None:
    logger.warning(
        "warning: %s=bf16 is over ten times slower than fp32 on this processor, which has no bf16 instructions;"
        " use fp32", option,
    )  # fmt: skip


def set_products(precision: Precision) -> None:
    """Have products of fp32 tensors computed so on GPUs from here on, in this process."""
    # Beside bf16 few products are left, and TF32 keeps more of them.
    found = "ieee" if precision == "fp32" else "tf32"
    for switch in _switches():
        switch.fp32_precision = found


@contextmanager
def products(precision: Precision) -> Iterator[None]:
    """Inside, products of fp32 tensors are computed so on GPUs."""
    before = [switch.fp32_precision for switch in _switches()]
    set_products(precision)
    try:
        yield
    finally:
        for switch, value in zip(_switches(), before, strict=True):
            switch.fp32_precision = value


def computed_in(precision: Precision, model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A model (x, ...) -> [B, ...] whose products are cast to bf16 where that is the precision, and its value back."""
    if precision != "bf16":
        return model

    def cast(x: Tensor, *others: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            value = model(x, *others)
        return value.to(x.dtype)

    return cast


def with_products(precision: Precision, field: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A field that sets how its products are computed, those of its own backward pass too, and sets it back."""

    def inside(*arguments: Tensor) -> Tensor:
        with products(precision):
            return field(*arguments)

    return inside


def _switches() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn  # its attributes are made at import
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
