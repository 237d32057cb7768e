"""Finds the values that share memory: for each view, the value that owns the bytes.

`reshape`, `contiguous` and similar operators return a view where the layout in memory allows it, else a copy. Strides
are no part of an OP-DAG, but with concrete sizes they follow from the operators, by the rules that torch uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fusionai.graph.bound_call import BoundCall
from fusionai.graph.model import Ref, ValueName
from fusionai.graph.operators.normalisation import drops
from fusionai.graph.operators.schema import ConcreteCall, Operand

Shape = tuple[int, ...]
Strides = tuple[int, ...]
"""Elements between neighbours along each axis."""


def memory_roots(calls: Sequence[BoundCall]) -> tuple[dict[ValueName, ValueName], dict[ValueName, Strides]]:
    """Return, for every output, the value whose memory it uses (itself, unless it is a view), and its strides."""
    root: dict[ValueName, ValueName] = {}
    layout: dict[ValueName, Strides] = {}
    for bound in calls:
        node, source, view = bound.node, bound.viewed, bound.traits.view
        found = None
        if source is not None and view is not None:
            tensor = bound.call.tensor(view)
            found = _view(bound, tensor, layout.get(source, dense(tensor.shape)))
        if found is not None and source is not None:
            root.update((output, root.get(source, source)) for output in node.outputs)
            layout.update(zip(node.outputs, found, strict=True))
        else:
            for output, operand in zip(node.outputs, bound.call.outputs, strict=True):
                root[output] = output
                layout[output] = _fresh(bound, operand, layout)
    return root, layout


def dense(shape: Shape) -> Strides:
    """Return the strides of a row-major tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def reshaped(shape: Shape, strides: Strides, new: Shape) -> Strides | None:
    """Return the strides that show a tensor in shape `new` without copying, or None when there are none."""
    if math.prod(shape) == 0:
        return dense(new)
    # Neighbouring axes without a gap in memory act as one block. The new axes must divide the blocks.
    blocks: list[tuple[int, int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if blocks and blocks[-1][1] == size * stride:
            blocks[-1] = (blocks[-1][0] * size, stride)
        else:
            blocks.append((size, stride))
    found: list[int] = []
    left, step = blocks.pop() if blocks else (1, 1)
    for size in reversed(new):
        if size != 1 and left == 1 and blocks:
            left, step = blocks.pop()
        if left % size:
            return None
        found.append(step)
        left //= size
        step *= size
    return tuple(reversed(found))


def _view(bound: BoundCall, tensor: Operand, strides: Strides) -> list[Strides] | None:
    """Return the outputs' strides when they are views of a tensor with these strides, else None."""
    call, family = bound.call, bound.node.op.split(".")[1]
    shape = tensor.shape
    outputs = [output.shape for output in call.outputs]
    if family in _DROPOUTS:
        return None if drops(call) else [strides]
    if family in _CASTS:
        copies = bool(call.arguments.get("copy")) or call.outputs[0].dtype != tensor.dtype
        return None if copies else [strides]
    if family == "contiguous":
        wanted = _wanted(call, shape)
        same = all(size == 1 or have == want for size, have, want in zip(shape, strides, wanted, strict=True))
        return [strides] if same else None
    if family in _RESHAPES:
        found = reshaped(shape, strides, outputs[0])
        return None if found is None else [found]
    if family in _EXPANSIONS:
        return [_expanded(shape, strides, outputs[0])]
    if family in _SQUEEZES:
        return [_squeezed(call, shape, strides)]
    rule = _RULES.get(family)
    if rule is not None:
        return [rule(call, strides)] * len(outputs)
    return [strides if len(output) == len(shape) else dense(output) for output in outputs]


_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout"})
_CASTS = frozenset({"to", "type_as"})
_RESHAPES = frozenset({"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten"})
_EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to"})
_SQUEEZES = frozenset({"squeeze"})


def _wanted(call: ConcreteCall, shape: Shape) -> Strides:
    if call.arguments.get("memory_format") == "channels_last" and len(shape) == 4:
        _, channels, height, width = shape
        return (channels * height * width, 1, width * channels, channels)
    return dense(shape)


def _expanded(shape: Shape, strides: Strides, new: Shape) -> Strides:
    added = len(new) - len(shape)
    kept = (0 if size != wide else stride for size, wide, stride in zip(shape, new[added:], strides, strict=True))
    return (*(0,) * added, *kept)


def _squeezed(call: ConcreteCall, shape: Shape, strides: Strides) -> Strides:
    named = {axis % len(shape) for axis in call.integers("dim")} if "dim" in call.arguments and shape else None
    return tuple(
        stride
        for axis, (size, stride) in enumerate(zip(shape, strides, strict=True))
        if size != 1 or (named is not None and axis not in named)
    )


def _swapped(first: str, second: str) -> Callable[[ConcreteCall, Strides], Strides]:
    def rule(call: ConcreteCall, strides: Strides) -> Strides:
        swapped = list(strides)
        one, other = int(call.number(first)), int(call.number(second))
        if swapped:
            swapped[one], swapped[other] = swapped[other], swapped[one]
        return tuple(swapped)

    return rule


def _matrix_swapped(_: ConcreteCall, strides: Strides) -> Strides:
    return (*strides[:-2], *reversed(strides[-2:]))


def _permuted(call: ConcreteCall, strides: Strides) -> Strides:
    return tuple(strides[axis] for axis in call.integers("dims"))


def _moved(call: ConcreteCall, strides: Strides) -> Strides:
    count = len(strides)
    sources = [axis % count for axis in call.integers("source")]
    places = [axis % count for axis in call.integers("destination")]
    rest = iter(axis for axis in range(count) if axis not in sources)
    order = [sources[places.index(place)] if place in places else next(rest) for place in range(count)]
    return tuple(strides[axis] for axis in order)


def _inserted(call: ConcreteCall, strides: Strides) -> Strides:
    axis = int(call.number("dim")) % (len(strides) + 1)
    return (*strides[:axis], 1, *strides[axis:])


def _stepped(call: ConcreteCall, strides: Strides) -> Strides:
    axis = int(call.number("dim")) % len(strides)
    return (*strides[:axis], strides[axis] * int(call.number("step")), *strides[axis + 1 :])


def _dropped(call: ConcreteCall, strides: Strides) -> Strides:
    axis = int(call.number("dim")) % len(strides)
    return (*strides[:axis], *strides[axis + 1 :])


def _diagonal(call: ConcreteCall, strides: Strides) -> Strides:
    count = len(strides)
    axes = {int(call.number("dim1")) % count, int(call.number("dim2")) % count}
    kept = (stride for axis, stride in enumerate(strides) if axis not in axes)
    return (*kept, sum(strides[axis] for axis in axes))


def _unfolded(call: ConcreteCall, strides: Strides) -> Strides:
    axis = int(call.number("dimension")) % len(strides)
    step = int(call.number("step"))
    return (*strides[:axis], strides[axis] * step, *strides[axis + 1 :], strides[axis])


_RULES: Mapping[str, Callable[[ConcreteCall, Strides], Strides]] = {
    "transpose": _swapped("dim0", "dim1"),
    "swapdims": _swapped("dim0", "dim1"),
    "swapaxes": _swapped("axis0", "axis1"),
    "t": lambda _, strides: strides[::-1],
    "numpy_T": lambda _, strides: strides[::-1],
    "mT": _matrix_swapped,
    "adjoint": _matrix_swapped,
    "permute": _permuted,
    "movedim": _moved,
    "unsqueeze": _inserted,
    "slice": _stepped,
    "select": _dropped,
    "unbind": _dropped,
    "diagonal": _diagonal,
    "unfold": _unfolded,
}
"""Views whose strides are computed from the source's strides. All other views keep the source's strides."""


def _fresh(bound: BoundCall, output: Operand, layout: Mapping[ValueName, Strides]) -> Strides:
    """Return the strides of a newly made tensor."""
    call, traits, shape = bound.call, bound.traits, output.shape
    if traits.op_class == "attention" and not call.arguments.get("softcap"):
        # The fused kernels give their result the query's order of axes; its last axis may have another size.
        query = bound.arguments["query"]
        known = layout.get(query.name) if isinstance(query, Ref) else None
        return _in_order_of(known or dense(call.tensor("query").shape), shape)
    if traits.op_class == "elementwise" or traits.name == "aten.batch_norm.default":
        # Elementwise operators keep the order of axes of their first operand of full shape.
        for name, value in bound.arguments.items():
            operand = call.arguments[name]
            if isinstance(value, Ref) and isinstance(operand, Operand) and operand.shape == shape:
                return _in_order_of(layout.get(value.name, dense(shape)), shape)
    return dense(shape)


def _in_order_of(strides: Strides, shape: Shape) -> Strides:
    """Return the strides of a dense tensor whose axes lie in memory in the order that `strides` gives."""
    inner_first = sorted(range(len(shape)), key=lambda axis: (strides[axis], -axis))
    found, step = [0] * len(shape), 1
    for axis in inner_first:
        found[axis] = step
        step *= max(1, shape[axis])
    return tuple(found)
