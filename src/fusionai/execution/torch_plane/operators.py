"""Operators of the vocabulary as torch callables.

An operator is looked up in torch's registry only after the vocabulary has admitted its name: the registry also holds
operators that a peer must never be able to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusionai.errors import GraphError
from fusionai.execution.torch_plane.attention import attention
from fusionai.execution.torch_plane.experts import grouped_matmul
from fusionai.graph.vocabulary import operator

ATTENTION = "fusion.attention"


def _divided(dividend: Any, divisor: Any, *, rounding_mode: str | None) -> Any:
    """Divide. The least integer divided by -1 gives itself, as negation does; the processor would stop the process."""
    whole = [
        not each.is_floating_point() if isinstance(each, Tensor) else isinstance(each, int)
        for each in (dividend, divisor)
    ]
    if rounding_mode != "trunc" or not all(whole):
        return torch.ops.aten.div.Tensor_mode(dividend, divisor, rounding_mode=rounding_mode)
    if not isinstance(divisor, Tensor):
        return -dividend if divisor == -1 else torch.ops.aten.div.Tensor_mode(dividend, divisor, rounding_mode="trunc")
    negated = divisor == -1
    safe = torch.ops.aten.div.Tensor_mode(dividend, divisor.masked_fill(negated, 1), rounding_mode="trunc")
    return torch.where(negated, -safe, safe)


_OWN: Mapping[str, Callable[..., Any]] = {
    ATTENTION: attention,
    "transformers.grouped_mm_fallback.default": grouped_matmul,
    "aten.div.Tensor_mode": _divided,
}
"""Operators that this plane implements itself."""


def _grouped_shape(tokens: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
    if tokens.dim() != 2 or weights.dim() != 3:
        raise GraphError(f"grouped products take 2 and 3 axes here, got {tokens.dim()} and {weights.dim()}")
    return tokens.new_empty(tokens.shape[0], weights.shape[2])


_SHAPES: Mapping[str, Callable[..., Any]] = {
    "transformers.grouped_mm_fallback.default": _grouped_shape,
    "aten._grouped_mm.default": _grouped_shape,
}
"""Functions that give the result's type of operators which torch cannot run on tensors without values."""


@cache
def torch_callable(name: str) -> Callable[..., Any]:
    """Resolve an operator. Raises GraphError when the vocabulary or this torch does not have it."""
    operator(name)
    if name in _OWN:
        return _OWN[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload, None) if namespace == "aten" else None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(
            f"operator {name!r} is in the vocabulary, but torch {torch.__version__} does not have it; "
            "install the torch version that FusionAI names, or let another machine run this stage"
        )
    return found


def shape_callable(name: str) -> Callable[..., Any]:
    """Resolve an operator for tensors without memory. Raises GraphError like `torch_callable`."""
    return _SHAPES.get(name) or torch_callable(name)
