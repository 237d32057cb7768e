"""Torch calls as nodes of an OP-DAG, so that both can be asked the same question."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fusionai.graph.model import (
    Argument,
    Atom,
    Input,
    Keyword,
    Node,
    OpDag,
    Ref,
    SubDag,
    TensorType,
    Transfer,
    ValueName,
    Weight,
    WeightKey,
)

KINDS = {torch.dtype: "dtype"}


def tensor_type(tensor: Tensor) -> TensorType:
    """Return a tensor's type."""
    return TensorType(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))  # type: ignore[arg-type]


def function(name: str) -> Any:
    """Return torch's operator of that name."""
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def one_call(name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[SubDag, tuple[Tensor, ...]]:
    """Return a sub-DAG of one call, whose differentiable arguments it receives, and torch's outputs of the call."""
    tensors: list[Tensor] = []

    def atom(value: Any) -> Atom:
        if isinstance(value, Tensor):
            place = next((i for i, known in enumerate(tensors) if known is value), len(tensors))
            if place == len(tensors):
                tensors.append(value)
            return Ref(ValueName(f"x{place}"))
        if isinstance(value, torch.dtype):
            return Keyword("dtype", str(value).removeprefix("torch."))
        return value  # type: ignore[no-any-return]

    def argument(value: Any) -> Argument:
        return tuple(atom(item) for item in value) if isinstance(value, list) else atom(value)

    made = function(name)(*args, **kwargs)
    outputs = tuple(made) if isinstance(made, tuple | list) else (made,)
    names = tuple(ValueName(f"y{place}") for place in range(len(outputs)))
    node = Node(
        str(names[0]),
        name,
        tuple(argument(each) for each in args),
        {key: argument(each) for key, each in kwargs.items()},
        names,
    )
    received = [tensor for tensor in tensors if tensor.requires_grad]
    subdag = SubDag(
        index=1,
        symbols={},
        inputs=(),
        weights=tuple(
            Weight(ValueName(f"x{place}"), WeightKey(f"x{place}"), tensor_type(tensor), "parameter", False)
            for place, tensor in enumerate(tensors)
            if not tensor.requires_grad
        ),
        nodes=(node,),
        types={each: tensor_type(output) for each, output in zip(names, outputs, strict=True)},
        receives=tuple(
            Transfer(ValueName(f"x{place}"), 0, 1, tensor_type(tensor), True)
            for place, tensor in enumerate(tensors)
            if tensor.requires_grad
        ),
        sends=tuple(
            Transfer(each, 1, 2, tensor_type(output), bool(output.is_floating_point() and received))
            for each, output in zip(names, outputs, strict=True)
        ),
        loss=None,
    )
    return subdag, outputs


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of each distinct memory that tensors use."""
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


__all__ = ["Input", "OpDag", "function", "one_call", "storages", "tensor_type"]
