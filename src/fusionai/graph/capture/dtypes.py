"""Torch's dtypes by the names that FusionAI uses."""

from __future__ import annotations

import torch

from fusionai.errors import GraphError
from fusionai.tensor import ITEM_BYTES, DType

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> DType:
    """Return our name of a torch dtype; GraphError when FusionAI does not know it."""
    name = _NAMES.get(dtype)
    if name is None:
        raise GraphError(f"dtype {dtype} is unknown to FusionAI; known: {', '.join(ITEM_BYTES)}")
    return name  # type: ignore[return-value]
