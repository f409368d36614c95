"""A GPU where there is none: a device whose tensors hold their values in host memory, and that minds like a GPU.

A computation on it gives the bits of the CPU. But a tensor of the CPU that meets one of the device fails, and each
place where the host would wait for the device is noted with its line: a value read, a shape that hangs on values, a
copy between the two that is not asynchronous. Device and autocast are those of torch's own interface for backends
written in Python. What it does not know is CUDA's own: streams, events, page-locked memory, the kernels' rounding.

The device must be there before the first backward pass of a process, so it is made in a process of its own:
``rehearsed``.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.distributed import run_ranks

DEVICE = torch.device("privateuseone", 0)  # its name once it is registered: gpu
_PACKAGE = str(Path(__file__).parents[1] / "eqm_dist")
_aten = torch.ops.aten
_READS = {
    _aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten.is_nonzero, _aten._unique2,
    _aten.unique_dim, _aten.unique_consecutive, _aten.bincount, _aten.linalg_eigvals, _aten.linalg_eig,
    _aten.linalg_eigh, _aten._linalg_eigh, _aten._linalg_check_errors,
}  # fmt: skip
"""What gives the host a value, or a tensor whose shape is one."""
_PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "conv2d", "scaled_dot_product_attention")
"""What autocast casts on a GPU, as far as it is used here."""


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the device: the innermost line of the package."""

    file: str
    function: str
    line: int
    operation: str

    @property
    def place(self) -> str:
        """``train/engine.py TorchEngine.step``."""
        return f"{self.file} {self.function}"

    def __str__(self) -> str:
        code = linecache.getline(f"{_PACKAGE}/{self.file}", self.line).strip()
        return f"eqm_dist/{self.file}:{self.line} in {self.function}: {code}  ({self.operation})"


def rehearsed(function: Callable[..., Any], *arguments: Any, waits: Mapping[str, str]) -> Any:
    """What ``function(*arguments)`` gives in a process with the device; fails where the host waits anywhere else.

    Args:
        function: of a module; uses ``DEVICE``.
        waits: the places (``Wait.place``) where the host waits, all of them, each with its reason.
    """
    ((result, found),) = run_ranks(1, _rehearse, function, arguments)
    others = [str(wait) for wait in found if wait.place not in waits]
    assert not others, "the host waits for the device:\n  " + "\n  ".join(others)
    places = {wait.place for wait in found}
    assert places == set(waits), f"it does not wait at {sorted(set(waits) - places)}"
    return result


def _rehearse(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, Counter[Wait]]:
    with fake_gpu() as found:
        result = function(*arguments)
    return pytree.tree_map_only(_OnDevice, lambda tensor: tensor.value, result), found


@contextmanager
def fake_gpu() -> Iterator[Counter[Wait]]:
    """Make the device; inside it can be used, and where the host waited is counted."""
    _register()
    _waits.clear()
    with _Dispatch():
        yield _waits


def waits() -> Mapping[Wait, int]:
    """Where the host has waited so far, and how often."""
    return _waits


@contextmanager
def aside() -> Iterator[None]:
    """What the test itself reads is no wait of the code."""
    before = _waits.copy()
    yield
    _waits.clear()
    _waits.update(before)


_waits: Counter[Wait] = Counter()


class _OnDevice(Tensor):
    """A tensor of the device; ``value`` holds its numbers."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor) -> "_OnDevice":
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
        )

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # lets Module.to exchange parameters
        return ["value"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:  # which torch refuses for a class like this
        _waits[_where("tolist")] += 1
        return self.value.tolist()

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"{type(self).__name__}({list(self.shape)}, {self.dtype})"


class _Dispatch(TorchDispatchMode):
    """Sees what makes tensors too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the values."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, _OnDevice)]
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    makes = device is not None and device.type == DEVICE.type
    if not there and not makes:
        return func(*args, **kwargs)
    copies = func.overloadpacket in (_aten.copy_, _aten._to_copy)
    here = [tensor for tensor in tensors if not isinstance(tensor, _OnDevice)]
    # CUDA's kernels take a number from a CPU tensor without dimensions.
    if there and not copies and any(tensor.ndim for tensor in here):
        raise AssertionError(f"a tensor of the CPU meets one of the device: {_where(func)}")
    if _waits_for_device(func, args, kwargs, makes):
        _waits[_where(func)] += 1
    on_host = {**kwargs, "device": torch.device("cpu")} if makes else kwargs
    values = pytree.tree_map_only(_OnDevice, lambda tensor: tensor.value, (args, on_host))
    result = func(*values[0], **values[1])
    if (device is not None and not makes) or (
        func.overloadpacket == _aten.copy_ and not isinstance(args[0], _OnDevice)
    ):
        return args[0] if func.overloadpacket == _aten.copy_ else result
    wrapped = pytree.tree_map_only(Tensor, _OnDevice, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped


def _waits_for_device(func: Any, args: Any, kwargs: dict[str, Any], makes: bool) -> bool:
    packet = func.overloadpacket
    if packet == _aten._to_copy:
        crosses = kwargs.get("device") is not None and isinstance(args[0], _OnDevice) != makes
        return crosses and not kwargs.get("non_blocking")
    if packet == _aten.copy_:
        crosses = isinstance(args[0], _OnDevice) != isinstance(args[1], _OnDevice)
        return crosses and not (args[2:] and args[2]) and not kwargs.get("non_blocking")
    if packet in (_aten.index, _aten.index_put, _aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return packet in _READS or func == _aten.repeat_interleave.Tensor


def _where(func: Any) -> Wait:
    frame = sys._getframe()
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:  # a thread of the backward pass, or a test
        return Wait("", "elsewhere", 0, str(func))
    file = frame.f_code.co_filename.removeprefix(f"{_PACKAGE}/")
    return Wait(file, frame.f_code.co_qualname, frame.f_lineno, str(func))


_libraries: list[torch.library.Library] = []


def _register() -> None:
    """Tell torch of the device, once in a process."""
    if _libraries:
        return
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Module(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    _setup_privateuseone_for_python_backend("gpu", backend_module=Module())
    # torch.tensor and new_tensor make their tensor below the dispatch to Python.
    made = torch.library.Library("aten", "IMPL")
    made.impl("empty_strided", _empty_strided, "PrivateUse1")
    made.impl("_copy_from", _copy_from, "PrivateUse1")
    through = torch.library.Library("_", "IMPL")
    through.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    cast = torch.library.Library("aten", "IMPL")
    for name in _PRODUCTS:
        cast.impl(name, _autocast(getattr(_aten, name).default), "AutocastPrivateUse1")
    _libraries.extend((made, through, cast))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return _OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: _OnDevice, non_blocking: bool = False) -> Tensor:
    _waits[_where(_aten._copy_from.default)] += 1
    target.value.copy_(source)
    return target


def _autocast(operation: Any) -> Callable[..., Any]:
    def cast(*args: Any, **kwargs: Any) -> Any:
        lower = torch.get_autocast_dtype("gpu")
        key: Any = torch._C.DispatchKey
        keys = torch._C.DispatchKeySet(key.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            args, kwargs = pytree.tree_map_only(
                Tensor, lambda tensor: tensor.to(lower) if tensor.dtype == torch.float32 else tensor, (args, kwargs)
            )
            return operation(*args, **kwargs)

    return cast
