"""Runs an OP-DAG node by node in torch, for checking a capture; training runs on the execution planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusionai.errors import GraphError
from fusionai.graph.capture.dtypes import TORCH_DTYPES, dtype_name
from fusionai.graph.capture.listing import node_reads
from fusionai.graph.model import Argument, Atom, Keyword, Node, OpDag, Ref, Size, Sizes, ValueName
from fusionai.graph.sizes import concrete, evaluate
from fusionai.graph.vocabulary import operator

_GROUPED = "aten._grouped_mm.default"


def interpret(graph: OpDag, inputs: Mapping[str, Tensor], weights: Mapping[ValueName, Tensor]) -> Tensor:
    """Return the loss of a graph, and check the dtype and shape of every value on the way.

    `weights` are by value name; all tensors are on one device, and on the meta device nothing is computed.
    Buffers that the graph writes to are written to. Raises GraphError where a value is not of its declared
    type.
    """
    sizes = {symbol: inputs[source].shape[axis] for symbol, (source, axis) in graph.symbols.items()}
    values: dict[ValueName, Tensor] = {item.name: inputs[item.name] for item in graph.inputs}
    values.update(weights)
    device = next(iter(values.values())).device
    last_use = {name: place for place, node in enumerate(graph.nodes) for name in node_reads(node)}
    for place, node in enumerate(graph.nodes):
        result = _run(node, values, sizes, device)
        for name, tensor in zip(node.outputs, result, strict=True):
            _check(node, name, tensor, graph, sizes)
            values[name] = tensor
        for name in {*node_reads(node), *node.outputs}:
            if last_use.get(name, -1) <= place and name != graph.loss:
                values.pop(name, None)
    return values[graph.loss]


def _check(node: Node, name: ValueName, tensor: Tensor, graph: OpDag, sizes: Sizes) -> None:
    declared = graph.types[name]
    shape = concrete(declared, sizes)
    if tuple(tensor.shape) != shape or dtype_name(tensor.dtype) != declared.dtype:
        raise GraphError(
            f"{node.op} in module {node.scope!r} gives {dtype_name(tensor.dtype)} {list(tensor.shape)} at sizes "
            f"{sizes}, but was traced as {declared.dtype} {list(shape)}: the model's shapes do not follow from "
            "its dynamic axes"
        )


def _run(node: Node, values: Mapping[ValueName, Tensor], sizes: Sizes, device: torch.device) -> tuple[Tensor, ...]:
    def atom(value: Atom) -> Any:
        if isinstance(value, Ref):
            return values[value.name]
        if isinstance(value, Size):
            return evaluate(value.expression, sizes)
        if isinstance(value, Keyword):
            return device if value.kind == "device" else _word(value)
        return value

    def argument(value: Argument) -> Any:
        return [atom(each) for each in value] if isinstance(value, tuple) else atom(value)

    args = [argument(each) for each in node.args]
    kwargs = {key: argument(each) for key, each in node.kwargs.items()}
    result = _function(node, device)(*args, **kwargs)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _function(node: Node, device: torch.device) -> Callable[..., Any]:
    if node.op == "fusion.attention":
        return attend
    if node.op == _GROUPED and device.type == "meta":
        # torch's own shape rule refuses every dtype but bfloat16.
        return lambda rows, matrices, ends: rows.new_empty((rows.shape[0], matrices.shape[2]))
    operator(node.op)
    namespace, name, overload = node.op.split(".")
    function: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return function


def _word(keyword: Keyword) -> Any:
    if keyword.kind == "float":
        return float(keyword.word)
    return TORCH_DTYPES[keyword.word] if keyword.kind == "dtype" else getattr(torch, keyword.word)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scale: float,
    window: int,
    softcap: float,
    causal: bool,
) -> Tensor:
    """Compute `fusion.attention` plainly: (B, H, T, D) against (B, G, T, D) keys, each shared by H/G heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    distance = (
        torch.arange(query.shape[2], device=query.device)[:, None]
        - torch.arange(key.shape[2], device=query.device)[None, :]
    )
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden = hidden | (distance < 0)
    if window:
        hidden = hidden | (distance >= window if causal else distance.abs() > window)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
