"""Files of weights from anybody: read without executing anything, and for no more memory than the file is large."""

import argparse
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from eqm_dist.errors import CheckpointError

PICKLES = 5
"""In a file of the time before torch wrote zips, one after the other."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or those of a ``.pt`` file: of the official code its EMA.

    Raises:
        CheckpointError: another kind of file, or one that claims more than it holds.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        _check_pickles(path)
        # Official checkpoints hold their arguments as a Namespace; nothing but that and tensors is let in.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        content = content if isinstance(content, Mapping) else {}
        weights = content.get("ema", content.get("model", content))
        found = {name: each for name, each in weights.items() if isinstance(name, str) and isinstance(each, Tensor)}
        _check_tensors(found, path.stat().st_size)
    except Exception as error:  # whatever a damaged or a hostile file makes torch raise, it is the file that is bad
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{path} must be a file of weights that torch.save wrote, and cannot be read as one without executing"
            f" what is in it ({reason}); convert it to .safetensors where you trust it."
        ) from None
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file.

    Raises:
        CheckpointError: it cannot be read as one.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore it, or use another file.") from None


def _check_pickles(path: Path) -> None:
    """Refuse what would take memory before a tensor is there to be looked at.

    Raises:
        ValueError: there is some.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            for _ in range(PICKLES):
                _check_globals(file)
        return
    with zipfile.ZipFile(path) as archive:
        # torch compresses nothing, but reads what is compressed.
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("it would unpack to more than its size")
        for name in archive.namelist():
            if name.endswith(".pkl"):
                with archive.open(name) as file:
                    _check_globals(file)


def _check_globals(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        # weights_only lets it be called, with any number of bytes.
        if "GLOBAL" in opcode.name and "bytearray" in str(argument or "bytearray"):
            raise ValueError("it makes a bytearray")


def _check_tensors(tensors: Mapping[str, Tensor], most: int) -> None:
    """Refuse tensors that are larger than what the file holds of them.

    Raises:
        ValueError: there is one.
    """
    storages = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"{name} of shape {list(tensor.shape)} is larger than what the file has of it")
    if sum(storages.values()) > most:
        raise ValueError("its tensors are larger than the file")
