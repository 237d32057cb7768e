"""Operators that take a tensor for its shape only, written without that tensor.

`mask.expand_as(scores)` depends on the mask, not on the scores. Written with sizes, it can be computed from inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from fusionai.graph.model import Argument, Keyword, Node, Size, TensorType, ValueName
from fusionai.graph.vocabulary import operator

_LIKE_ANOTHER = {
    "aten.expand_as.default": "aten.expand.default",
    "aten.view_as.default": "aten.reshape.default",
    "aten.reshape_as.default": "aten.reshape.default",
}
_CREATED = {
    "aten.zeros_like.default": "aten.zeros.default",
    "aten.ones_like.default": "aten.ones.default",
    "aten.full_like.default": "aten.full.default",
    "aten.new_zeros.default": "aten.zeros.default",
    "aten.new_ones.default": "aten.ones.default",
    "aten.new_full.default": "aten.full.default",
}


def with_sizes(node: Node, types: Mapping[ValueName, TensorType]) -> Node:
    """Return a call that computes the same and reads no tensor for its shape only; `types` has the output's."""
    op = _LIKE_ANOTHER.get(node.op) or _CREATED.get(node.op)
    if op is None:
        return node
    made = types[node.outputs[0]]
    shape: Argument = tuple(size if isinstance(size, int) else Size(size) for size in made.shape)
    arguments = operator(node.op).bind(node)
    args: tuple[Argument, ...]
    kwargs: dict[str, Argument]
    if node.op in _LIKE_ANOTHER:
        args, kwargs = (arguments["self"], shape), {}
    else:
        filled = (arguments["fill_value"],) if "fill_value" in arguments else ()
        args, kwargs = (shape, *filled), {"dtype": Keyword("dtype", made.dtype)}
    return Node(node.name, op, args, kwargs, node.outputs, node.scope)
