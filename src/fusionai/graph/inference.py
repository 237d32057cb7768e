"""Operators in inference mode: what evaluation runs of a graph that was captured in training mode."""

from __future__ import annotations

from collections.abc import Mapping

from fusionai.graph.model import Argument, Node, Ref, ValueName
from fusionai.graph.vocabulary import operator

_INFERENCE: Mapping[str, tuple[str, Argument]] = {
    "aten.dropout.default": ("train", False),
    "aten.feature_dropout.default": ("train", False),
    "aten.alpha_dropout.default": ("train", False),
    "aten.scaled_dot_product_attention.default": ("dropout_p", 0.0),
    "aten.batch_norm.default": ("training", False),
    "aten.instance_norm.default": ("use_input_stats", False),
}
"""The argument that puts an operator into inference mode, and its value there."""


def written_values(node: Node) -> frozenset[ValueName]:
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
    """Return the form of a call in inference mode, or None for a call that only serves training.

    Dropout does nothing, normalisation uses the running statistics where the model keeps them, and those stay as
    they are.
    """
    if node.op not in _INFERENCE:
        return None if written_values(node) else node
    kind = operator(node.op)
    if kind.mutates and not written_values(node):
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
