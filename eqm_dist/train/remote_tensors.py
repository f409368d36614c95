"""Tensors in a safetensors file on S3, of which only the ranges that are asked for are read."""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eqm_dist.documents import mapping_from_json
from eqm_dist.storage.folder import Folder

FIRST_BYTES = 256 << 10
"""Read with the first request; most headers have fewer."""
MOST_HEADER_BYTES = 100_000_000
"""The limit of the format."""


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor in a file; indexed with a slice of its flattened elements, it reads them.

    Attributes:
        folder, file: where it lies.
        at: its first byte in the file.
        shape: of the tensor.
        dtype: as safetensors calls it; only F32 is read.
    """

    folder: Folder
    file: str
    at: int
    shape: tuple[int, ...]
    dtype: str

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Its type, as safetensors calls it."""
        return self.dtype

    def __getitem__(self, elements: slice) -> Tensor:
        """The elements [start, stop), one-dimensional.

        Raises:
            ValueError: the file ends before.
            StorageError: S3 does not answer.
        """
        start, stop, _ = elements.indices(math.prod(self.shape))
        content = bytearray(self.folder.read(self.file, self.at + 4 * start, self.at + 4 * stop))
        if len(content) != 4 * (stop - start):
            raise ValueError(f"{self.folder.url}/{self.file} ends before its byte {self.at + 4 * stop:,}")
        return torch.frombuffer(content, dtype=torch.float32) if content else torch.empty(0)


def read_header(folder: Folder, file: str) -> dict[str, RemoteTensor]:
    """The tensors of a file by name, by one request, or two where its header is long.

    Raises:
        ValueError: it is no safetensors file.
        StorageError: S3 does not answer.
    """
    first = folder.read(file, 0, FIRST_BYTES)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > MOST_HEADER_BYTES:
        raise ValueError(f"{folder.url}/{file} is no safetensors file")
    begin = 8 + length
    text = first[8:begin] if begin <= len(first) else first[8:] + folder.read(file, len(first), begin)
    header = mapping_from_json(text)
    header.pop("__metadata__", None)
    return {name: _tensor(folder, file, begin, name, record) for name, record in header.items()}


def _tensor(folder: Folder, file: str, begin: int, name: str, record: Any) -> RemoteTensor:
    try:
        start, stop = record["data_offsets"]
        shape, dtype = tuple(record["shape"]), record["dtype"]
        fits = stop - start == 4 * math.prod(shape) and start >= 0
        if not all(type(number) is int and number >= 0 for number in shape) or (dtype == "F32" and not fits):
            raise ValueError(f"{json.dumps(record)[:100]} for {name}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the header of {folder.url}/{file} holds {error}") from None
    return RemoteTensor(folder, file, begin + start, shape, dtype)
