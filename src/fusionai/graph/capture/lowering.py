"""Turns torch's exported graph into the nodes of an OP-DAG.

This step replaces what an OP-DAG cannot hold. Integers computed from shapes become size expressions. `getitem` becomes
an output of the operator that it reads. Assertions vanish. Devices become "local". An operator that writes to an
activation in place becomes the operator that returns a new tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fusionai.errors import GraphError
from fusionai.graph.capture.buffer_updates import COPY
from fusionai.graph.capture.dtypes import dtype_name
from fusionai.graph.capture.inlining import inline_regions
from fusionai.graph.capture.inputs import ExampleInput
from fusionai.graph.capture.listing import Listing
from fusionai.graph.capture.size_expressions import (
    UnknownSizeError,
    size_expression,
    whole_number_expression,
)
from fusionai.graph.capture.state import ModuleState, value_name
from fusionai.graph.capture.trace_operators import GRAPH_NAMES
from fusionai.graph.capture.tracing import MODULE_PREFIX
from fusionai.graph.model import (
    Argument,
    Atom,
    Dim,
    Keyword,
    Node,
    Ref,
    Size,
    TensorType,
    ValueName,
    WeightKey,
)
from fusionai.graph.vocabulary import VOCABULARY

_MUTATED_BY_POSITION: Mapping[str, tuple[int, ...]] = {"aten.batch_norm.default": (3, 4)}
"""Operators that write to arguments without saying so in torch's schema."""

_DETACH = "aten.detach_.default"
"""In place by name, but it writes to no memory."""

_OTHER_NAMES = frozenset({"aten.detach.default", "aten.alias.default", _DETACH})
"""Operators whose result is the whole of their argument, in the same memory."""

_FILLING = {"aten.zero_.default": "aten.zeros_like.default", "aten.fill_.Scalar": "aten.full_like.default"}
"""Operators that fill a buffer, and those that make a tensor with the same content."""

_WRITTEN_TO: Mapping[str, tuple[str, str]] = {
    "buffer": (
        "a part of the buffer",
        "compute the whole new value (with torch.where, index_copy or scatter) and assign it: self.name = value",
    ),
    "parameter": (
        "the parameter",
        "only the optimizer may change a parameter, so compute the value that you need from it and leave it as it is",
    ),
    "constant_tensor": (
        "the tensor",
        "register it as a buffer, with self.register_buffer in __init__, so that the next step finds what was written",
    ),
    "input": ("the input", "write to a copy"),
}
"""By kind of what must not be written to: how an error calls it, and what to do instead."""

_IGNORED_KEYWORDS = frozenset({"pin_memory"})
"""Keywords about the host's memory. They are left to the execution plane."""


def lower(program: ExportedProgram, inputs: Sequence[ExampleInput], state: ModuleState) -> Listing:
    """Turn an exported program into a listing. Raises GraphError for what an OP-DAG cannot express."""
    inline_regions(program.graph_module)
    return _Lowering(program, inputs, state).run()


class _Lowering:
    def __init__(self, program: ExportedProgram, inputs: Sequence[ExampleInput], state: ModuleState) -> None:
        self._program = program
        self._inputs = inputs
        self._state = state
        self._graph = program.graph_module.graph
        self._names: dict[tuple[fx.Node, int | None], ValueName] = {}
        """The current name of each traced value. The number tells the outputs of one operator apart."""
        self._symbols: dict[str, str] = {}
        """Our symbol for each of the tracer's symbols."""
        self._axes: dict[str, tuple[ExampleInput, int]] = {}
        """By symbol of ours: the axis that first had it."""
        self._sizes: dict[Any, Dim] = {}
        self._root: dict[int, tuple[str, str]] = {}
        """By storage of an input or weight: which of the two it is, and its name."""
        self._types: dict[ValueName, TensorType] = {}
        self._listing = Listing([], self._types, {}, ValueName(""))

    def run(self) -> Listing:
        placeholders = [node for node in self._graph.nodes if node.op == "placeholder"]
        specs = self._program.graph_signature.input_specs
        users = iter(self._inputs)
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                self._take_input(node, next(users))
        for node, spec in zip(placeholders, specs, strict=True):
            if spec.kind is not InputKind.USER_INPUT:
                self._take_weight(node, spec.kind, spec.target)
        for place, node in enumerate(self._graph.nodes):
            if node.op == "call_function":
                self._take_call(node, place)
            elif node.op == "output":
                self._listing.loss = self._names[(node.args[0][0], None)]
            elif node.op not in ("placeholder",) and node.users:
                raise GraphError(f"the model has a {node.op} ({node.target}) that an OP-DAG cannot express")
        return self._listing

    # --- values ---------------------------------------------------------------------------------------------

    def _take_input(self, node: fx.Node, item: ExampleInput) -> None:
        value = node.meta["val"]
        name = ValueName(item.name)
        self._names[(node, None)] = name
        for axis, axis_name in item.axes.items():
            self._take_axis(value.shape[axis], item, axis, axis_name)
        self._types[name] = self._type(value, node)
        self._root[_storage(value)] = ("input", item.name)

    def _take_axis(self, size: Any, item: ExampleInput, axis: int, axis_name: str) -> None:
        """Give the tracer's symbol of an axis a symbol of ours. Axes of one name share a symbol."""
        expression = None if isinstance(size, int) else size.node.expr
        if expression is None or not expression.is_Symbol:
            found = f"fixes it to {size}" if expression is None else f"needs it to be {expression}"
            raise GraphError(
                f"axis {axis} ({axis_name}) of input {item.name!r} cannot take every size: the model {found}; "
                "make the model work for every size, or leave the axis out of dynamic={...}"
            )
        taken = {each.axes[number]: name for name, (each, number) in self._axes.items()}
        ours = taken.get(axis_name) or f"s{len(taken)}"
        if self._symbols.setdefault(expression.name, ours) != ours:
            other = self._axes[self._symbols[expression.name]]
            raise GraphError(
                f"axis {axis} ({axis_name}) of input {item.name!r} must equal axis {other[1]} of input "
                f"{other[0].name!r} in this model; give both axes one name in dynamic={{...}}"
            )
        if ours not in self._axes:
            self._axes[ours] = (item, axis)
            self._listing.symbols[ours] = (ValueName(item.name), axis)

    def _take_weight(self, node: fx.Node, kind: InputKind, target: str) -> None:
        name = target.removeprefix(MODULE_PREFIX)
        if kind in (InputKind.PARAMETER, InputKind.BUFFER):
            key = self._state.canonical[name]
        elif kind is InputKind.CONSTANT_TENSOR:
            key = self._state.add_constant(name, self._program.constants[target])
        else:
            raise GraphError(f"the model holds a {kind.name.lower()} ({target}), which an OP-DAG cannot express")
        value = node.meta["val"]
        self._names[(node, None)] = value_name(key)
        self._types[value_name(key)] = self._type(value, node)
        self._root[_storage(value)] = (kind.name.lower(), key)

    def _type(self, value: Tensor, node: fx.Node) -> TensorType:
        try:
            dtype = dtype_name(value.dtype)
        except GraphError as error:
            where = f"{_operator_name(node)} in {_place(node)}"
            raise GraphError(f"{where} cannot be captured: {error}; compute with one of these instead") from None
        return TensorType(dtype, tuple(self._size(size, node) for size in value.shape))

    def _size(self, size: Any, node: fx.Node) -> Dim:
        if isinstance(size, int):
            return size
        known = self._sizes.get(size.node.expr)
        if known is None:
            try:
                known = size_expression(size, self._symbols)
            except UnknownSizeError as error:
                raise GraphError(
                    f"{_operator_name(node)} in {_place(node)} cannot be captured: {error}; write it without "
                    "data-dependent shapes"
                ) from None
            self._sizes[size.node.expr] = known
        return known

    def _float_size(self, value: torch.SymFloat, node: fx.Node) -> Atom:
        """Return a floating-point number computed from sizes. An OP-DAG can express whole numbers only."""
        try:
            size = whole_number_expression(value, self._symbols)
        except UnknownSizeError as error:
            raise GraphError(
                f"{_operator_name(node)} in {_place(node)} takes a number that is no size: {error}; compute it "
                "with tensors"
            ) from None
        return float(size) if isinstance(size, int) else Size(size)

    # --- operators ------------------------------------------------------------------------------------------

    def _take_call(self, node: fx.Node, place: int) -> None:
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source, index = node.args[0], node.args[1]
            if isinstance(index, int) and (source, index) in self._names:
                self._names[(node, None)] = self._names[(source, index)]
                return
        if not isinstance(value, (Tensor, tuple, list)):
            # An assertion, or a number computed from shapes; the latter is read where it is used.
            return
        if not isinstance(node.target, torch._ops.OpOverload):
            raise GraphError(f"{node.target} in {_place(node)} is no tensor operator; write it with operators of torch")
        function, name = node.target, str(node.target)
        if _writes_in_place(function):
            target = None if name == _DETACH else self._written(node)
            if target is not None:
                self._write_to_buffer(node, target)
                return
            function = _without_writing(node)
            name = str(function)
        for position in _MUTATED_BY_POSITION.get(name, ()):
            self._note_statistics(node.args[position])
        args = tuple(self._argument(each, node) for each in node.args)
        kwargs = {key: self._argument(each, node) for key, each in node.kwargs.items() if key not in _IGNORED_KEYWORDS}
        outputs = self._outputs(node, value)
        self._listing.nodes.append(Node(outputs[0], GRAPH_NAMES.get(name, name), args, kwargs, outputs, _scope(node)))
        if function is not node.target:
            self._redirect(node, outputs[0], place)

    def _outputs(self, node: fx.Node, value: Any) -> tuple[ValueName, ...]:
        if isinstance(value, Tensor):
            name = ValueName(node.name)
            self._names[(node, None)] = name
            self._types[name] = self._type(value, node)
            return (name,)
        names = []
        for index, each in enumerate(value):
            name = ValueName(f"{node.name}.{index}")
            self._names[(node, index)] = name
            self._types[name] = self._type(each, node)
            names.append(name)
        return tuple(names)

    def _argument(self, value: Any, node: fx.Node) -> Argument:
        if isinstance(value, (tuple, list)):
            return tuple(self._atom(each, node) for each in value)
        return self._atom(value, node)

    def _atom(self, value: Any, node: fx.Node) -> Atom:
        if isinstance(value, fx.Node):
            traced = value.meta.get("val")
            if isinstance(traced, torch.SymInt) or (isinstance(traced, int) and not isinstance(traced, bool)):
                size = self._size(traced, node)
                return size if isinstance(size, int) else Size(size)
            if isinstance(traced, torch.SymFloat):
                return self._float_size(traced, node)
            if (value, None) in self._names:
                return Ref(self._names[(value, None)])
        elif isinstance(value, torch.dtype):
            return Keyword("dtype", dtype_name(value))
        elif isinstance(value, torch.device):
            return Keyword("device", "local")
        elif isinstance(value, torch.layout):
            return Keyword("layout", str(value).removeprefix("torch."))
        elif isinstance(value, torch.memory_format):
            return Keyword("memory_format", str(value).removeprefix("torch."))
        elif isinstance(value, float) and not math.isfinite(value):
            return Keyword("float", repr(value))
        elif value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise GraphError(
            f"{_operator_name(node)} in {_place(node)} takes {_describe(value)}, which an OP-DAG cannot express"
        )

    # --- writing in place -------------------------------------------------------------------------------------

    def _written(self, node: fx.Node) -> WeightKey | None:
        """Return the buffer that an in-place operator writes to, or None when it writes to an activation."""
        target = _target(node)
        kind, name = self._root.get(_storage(target.meta["val"]), ("activation", ""))
        if kind == "activation":
            return None
        if kind == "buffer" and _named(target).op == "placeholder":
            return WeightKey(name)
        what, remedy = _WRITTEN_TO[kind]
        raise GraphError(f"{_operator_name(node)} in {_place(node)} writes to {what} {name!r} in place; {remedy}")

    def _write_to_buffer(self, node: fx.Node, key: WeightKey) -> None:
        """Write in place. What the vocabulary has no such operator for is computed, and then copied into the buffer."""
        self._listing.mutated.add(key)
        nodes, scope, op = self._listing.nodes, _scope(node), str(node.target)
        args: tuple[Argument, ...] = (Ref(value_name(key)), *(self._argument(each, node) for each in node.args[1:]))
        kwargs = {word: self._argument(each, node) for word, each in node.kwargs.items()}
        outputs = self._outputs(node, node.meta["val"])
        if op not in VOCABULARY:
            value, plain = ValueName(f"{outputs[0]}.value"), _FILLING.get(op) or str(_without_writing(node))
            self._types[value] = self._types[outputs[0]]
            nodes.append(Node(value, plain, args, kwargs, (value,), scope))
            op, args, kwargs = COPY, (args[0], Ref(value)), {}
        nodes.append(Node(outputs[0], op, args, kwargs, outputs, scope))

    def _note_statistics(self, argument: Any) -> None:
        if isinstance(argument, fx.Node):
            kind, name = self._root.get(_storage(argument.meta["val"]), ("activation", ""))
            if kind == "buffer":
                self._listing.mutated.add(WeightKey(name))

    def _redirect(self, node: fx.Node, name: ValueName, place: int) -> None:
        """Rename the written value, so that later operators read the new value.

        In torch, other views of the same memory would see the write. They must not be read after it.
        """
        target = _target(node)
        storage = _storage(target.meta["val"])
        later = set(list(self._graph.nodes)[place + 1 :])
        for each in self._graph.nodes if str(node.target) != _DETACH else ():
            value = each.meta.get("val")
            if each in (target, node) or not isinstance(value, Tensor) or _storage(value) != storage:
                continue
            if each not in later and later & set(each.users):
                raise GraphError(
                    f"{_operator_name(node)} in {_place(node)} writes in place to memory that is read again "
                    "through another view; use the operator that returns a new tensor"
                )
        self._names[(target, None)] = name


def _target(node: fx.Node) -> fx.Node:
    """Return the value that an in-place operator writes to."""
    target = node.args[0]
    assert isinstance(target, fx.Node)
    return target


def _named(target: fx.Node) -> fx.Node:
    """Return the value that a detached or written one is another name of."""
    while target.op == "call_function" and _is_another_name(target.target):
        source = target.args[0]
        assert isinstance(source, fx.Node)
        target = source
    return target


def _is_another_name(function: object) -> bool:
    return isinstance(function, torch._ops.OpOverload) and (str(function) in _OTHER_NAMES or _writes_in_place(function))


def _writes_in_place(function: torch._ops.OpOverload) -> bool:
    first = function._schema.arguments[0] if function._schema.arguments else None
    return first is not None and first.alias_info is not None and first.alias_info.is_write


def _without_writing(node: fx.Node) -> torch._ops.OpOverload:
    """Return the operator that computes the same and returns a new tensor: add for add_."""
    namespace, name, overload = str(node.target).split(".")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    function = getattr(packet, overload, None) if packet is not None and name.endswith("_") else None
    if not isinstance(function, torch._ops.OpOverload):
        raise GraphError(
            f"{_operator_name(node)} in {_place(node)} writes in place and has no variant that does not; "
            "use an operator that returns a new tensor"
        )
    return function


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _operator_name(node: fx.Node) -> str:
    return str(node.target)


def _scope(node: fx.Node) -> str:
    """Return the path of the module that a node comes from, as in the captured module."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    if path.startswith("_"):
        return ""
    return f"{path}.".removeprefix(MODULE_PREFIX).removesuffix(".")


def _place(node: fx.Node) -> str:
    return f"module {_scope(node)!r}" if _scope(node) else "the model itself"


def _describe(value: Any) -> str:
    if isinstance(value, fx.Node):
        traced: Any = value.meta.get("val")
        return f"a number that is no size ({type(traced).__name__} {traced})"
    return f"a {type(value).__name__} ({value})"
