"""Tensors as plain data: what crosses a wire, a file or the border of an execution plane.

No framework object ever leaves an execution plane. A plane takes and returns `TensorData`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

DType = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]

ITEM_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element, by dtype. The keys are the dtypes FusionAI knows."""

FLOATING: frozenset[str] = frozenset({"float64", "float32", "float16", "bfloat16"})
assert set(ITEM_BYTES) == set(get_args(DType))


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a dense tensor of `dtype` and `shape`."""
    return ITEM_BYTES[dtype] * math.prod(shape)


@dataclass(frozen=True, slots=True)
class TensorData:
    """A dense, row-major (C-contiguous), little-endian tensor in host memory.

    `data` is any buffer of exactly `tensor_bytes(dtype, shape)` bytes. A receiver may keep the buffer
    without copying, so the sender must not write to it afterwards.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"dtype {self.dtype!r} is unknown; known: {', '.join(ITEM_BYTES)}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative size")
        found, needed = memoryview(self.data).nbytes, tensor_bytes(self.dtype, self.shape)
        if found != needed:
            raise ValueError(f"a {self.dtype} tensor of shape {self.shape} takes {needed} bytes, got {found}")

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return tensor_bytes(self.dtype, self.shape)
