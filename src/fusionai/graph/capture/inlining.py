"""Inlines the regions that torch.export keeps as sub-graphs: regions without gradients, and autocast regions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fusionai.errors import GraphError

_GRADIENT_REGION = "wrap_with_set_grad_enabled"
_AUTOCAST_REGION = "wrap_with_autocast"


def inline_regions(module: fx.GraphModule) -> None:
    """Replace regions by their operators, in place.

    Values that enter a region without gradients are detached, so its operators cannot be differentiated.
    Raises GraphError for a region that enters autocast itself or switches gradients on again.
    """
    for node in list(module.graph.nodes):
        kind = _region(node)
        if kind is None:
            continue
        place = next(
            index for index, each in enumerate(node.args) if isinstance(each, fx.Node) and each.op == "get_attr"
        )
        settings, holder, operands = node.args[:place], node.args[place], node.args[place + 1 :]
        region = getattr(module, holder.target)
        detached = kind == _GRADIENT_REGION and settings[0] is False
        if kind == _AUTOCAST_REGION and settings[2] is not False:
            raise GraphError("the model enters autocast itself; remove it, and set the precision of the job instead")
        _refuse_nested_gradients(region, detached)
        inline_regions(region)
        _inline(module, node, region, operands, detached)
        module.graph.erase_node(node)
        if not holder.users:
            module.graph.erase_node(holder)


def _region(node: fx.Node) -> str | None:
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name if name in (_GRADIENT_REGION, _AUTOCAST_REGION) else None


def _refuse_nested_gradients(region: fx.GraphModule, detached: bool) -> None:
    for node in region.graph.nodes:
        if detached and _region(node) == _GRADIENT_REGION and node.args[0] is True:
            raise GraphError(
                "the model switches gradients on again inside a torch.no_grad region; move that code out of it"
            )


def _inline(
    module: fx.GraphModule, node: fx.Node, region: fx.GraphModule, operands: tuple[Any, ...], detached: bool
) -> None:
    values: dict[fx.Node, Any] = {}
    remaining = iter(operands)
    results: Any = ()
    with module.graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                values[inner] = _entering(module, next(remaining), detached)
            elif inner.op == "output":
                results = inner.args[0]
            elif inner.op == "call_function":
                values[inner] = module.graph.node_copy(inner, lambda each: values[each])
            else:
                raise GraphError(f"the model has a nested {inner.op} in a torch.no_grad region; simplify the region")
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(values[results[user.args[1]]])
        module.graph.erase_node(user)


def _entering(module: fx.GraphModule, operand: Any, detached: bool) -> Any:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not (detached and isinstance(value, Tensor) and value.is_floating_point()):
        return operand
    copy = module.graph.call_function(torch.ops.aten.detach.default, (operand,))
    copy.meta["val"] = value
    copy.meta["nn_module_stack"] = operand.meta.get("nn_module_stack", {})
    return copy
