"""Converts between `TensorData` and torch tensors, without a copy where that is safe."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fusionai.tensor import ITEM_BYTES, DType, TensorData

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_NAMES: dict[torch.dtype, DType] = {dtype: name for name, dtype in TORCH_DTYPES.items()}  # type: ignore[misc]

_ALIGNMENT_BYTES = 64
"""The alignment that torch's CPU allocator guarantees. Matrix kernels may round differently on other alignments, so a
buffer at another address is copied. Otherwise results would depend on where a tensor came from."""

# Received tensors are never written to, so a read-only buffer does no harm.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def dtype_name(tensor: Tensor) -> DType:
    """Return FusionAI's name of a tensor's dtype."""
    return _NAMES[tensor.dtype]


def from_data(data: TensorData, device: torch.device) -> Tensor:
    """Return a tensor on `device` with the contents of `data`.

    On the CPU it shares `data`'s memory where that is aligned: it must not be written to. The buffer lives as
    long as the tensor does.
    """
    dtype = TORCH_DTYPES[data.dtype]
    if data.nbytes == 0:
        return torch.empty(data.shape, dtype=dtype, device=device)
    flat = torch.frombuffer(data.data, dtype=torch.uint8)
    alignment = _ALIGNMENT_BYTES if device.type == "cpu" else dtype.itemsize
    if flat.data_ptr() % alignment:
        flat = flat.clone()
    return flat.view(dtype).view(data.shape).to(device)


def to_data(tensor: Tensor, *, copy: bool = False) -> TensorData:
    """Return a tensor's contents as row-major host memory.

    A contiguous CPU tensor is shared, not copied, unless `copy` is set; the memory lives as long as the result.
    """
    host = tensor.detach().to("cpu").contiguous()
    if copy and host.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
        host = host.clone()
    data: Any = host.reshape(-1).view(torch.uint8).numpy()  # numpy's stubs do not say that an array is a buffer
    return TensorData(dtype_name(host), tuple(host.shape), memoryview(data))


def storage_address(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor and its views share."""
    return tensor.untyped_storage().data_ptr()


def storage_bytes(tensor: Tensor) -> int:
    """Return the bytes of the memory that a tensor and its views share."""
    return tensor.untyped_storage().nbytes()
