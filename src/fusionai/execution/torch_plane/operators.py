"""Operators of the vocabulary as torch callables, and what changes in inference mode.

An operator is resolved only after the vocabulary has admitted its name: torch's own registry also holds
operators that must never run on a peer's say-so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from fusionai.errors import GraphError
from fusionai.execution.torch_plane.attention import attention
from fusionai.execution.torch_plane.experts import grouped_matmul
from fusionai.graph.model import Argument, Node, Ref, ValueName
from fusionai.graph.vocabulary import operator

ATTENTION = "fusion.attention"

_OWN: Mapping[str, Callable[..., Any]] = {
    ATTENTION: attention,
    "transformers.grouped_mm_fallback.default": grouped_matmul,
}
"""Operators that are functions of this plane."""

_INFERENCE: Mapping[str, tuple[str, Argument]] = {
    "aten.dropout.default": ("train", False),
    "aten.feature_dropout.default": ("train", False),
    "aten.alpha_dropout.default": ("train", False),
    "aten.scaled_dot_product_attention.default": ("dropout_p", 0.0),
    "aten.batch_norm.default": ("training", False),
    "aten.instance_norm.default": ("use_input_stats", False),
}
"""The argument that puts an operator into inference mode, and its value there."""


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


def mutated_values(node: Node) -> frozenset[ValueName]:
    """Return the values that a call writes to."""
    kind = operator(node.op)
    if not kind.mutates or _is_inference(node):
        return frozenset()
    bound = kind.bind(node)
    found = (bound[name] for name in kind.mutates)
    return frozenset(item.name for item in found if isinstance(item, Ref))


def draws(node: Node) -> bool:
    """Whether a call's result depends on random numbers."""
    return operator(node.op).random and not _is_inference(node)


def in_inference(node: Node) -> Node | None:
    """Return a call as it is in inference mode, or None when it only serves training.

    Dropout does nothing, normalisation uses the running statistics where the model keeps them, and those stay as
    they are.
    """
    if node.op not in _INFERENCE:
        return None if mutated_values(node) else node
    kind = operator(node.op)
    if kind.mutates and not mutated_values(node):
        return node  # a normalisation without running statistics
    name, value = _INFERENCE[node.op]
    positions = [parameter.name for parameter in kind.parameters if not parameter.keyword_only]
    position = positions.index(name)
    if position < len(node.args):
        args, kwargs = (*node.args[:position], value, *node.args[position + 1 :]), node.kwargs
    else:
        args, kwargs = node.args, {**node.kwargs, name: value}
    return Node(node.name, node.op, args, kwargs, node.outputs, node.scope)


def _is_inference(node: Node) -> bool:
    if node.op not in _INFERENCE:
        return False
    name, value = _INFERENCE[node.op]
    return operator(node.op).bind(node)[name] == value
