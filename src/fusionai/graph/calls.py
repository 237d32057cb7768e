"""A sub-DAG at concrete sizes: every call bound, which values take part in backward, and which share memory."""

from __future__ import annotations

from collections.abc import Iterable

from fusionai.graph.bound_call import BoundCall
from fusionai.graph.dependencies import differentiable_ancestors, reads, recomputable, requiring_gradient
from fusionai.graph.layouts import dense, memory_roots
from fusionai.graph.model import Argument, Atom, Node, Ref, Size, Sizes, SubDag, TensorType, ValueName
from fusionai.graph.operators.schema import CallValue, ConcreteCall, Operand
from fusionai.graph.sizes import concrete, evaluate, type_bytes
from fusionai.graph.vocabulary import operator


class StageCalls:
    """The calls of a sub-DAG at concrete sizes. Raises GraphError where a size cannot be computed.

    `whole` holds the calls of the same graph uncut, at the same sizes. Calls that are bound there are reused, which
    saves most of the time when one graph is cut many times.
    """

    _dense: frozenset[ValueName]
    """Outputs of the whole graph that own their memory (they are no views) and are row-major in it."""

    def __init__(self, subdag: SubDag, sizes: Sizes, whole: StageCalls | None = None) -> None:
        self.subdag = subdag
        self.weights = frozenset(weight.name for weight in subdag.weights)
        self._sizes = sizes
        self._operands: dict[ValueName, Operand] = {}
        if whole is None:
            self._types = _types(subdag)
            self._dtypes = {name: type.dtype for name, type in self._types.items()}
            self.nbytes = {name: type_bytes(type, sizes) for name, type in self._types.items()}
            """Bytes of each value; values of other sub-DAGs may be among them."""
            self._fixed = frozenset(subdag.nodes[place].name for place in recomputable(subdag))
            self.graded = self._graded({})
            """Values for which backward computes a gradient."""
            every = [self._bind(node) for node in subdag.nodes]
        else:
            # A node that any stage can compute is such a node in every sub-DAG: `cut` never parts the users of a
            # tensor that is written in place.
            self._types, self._dtypes, self.nbytes, self._fixed = (
                whole._types,
                whole._dtypes,
                whole.nbytes,
                whole._fixed,
            )
            self.graded = self._graded(whole._by_name)
            every = self._taken(whole)
        self._by_name: dict[str, BoundCall] = {bound.node.name: bound for bound in every}
        self.root = self._memory_roots(every, whole)
        """By output: the value whose memory it uses. An output that is no view owns its memory."""
        self._graded_calls = frozenset(
            bound.node.name for bound in every if not self.graded.isdisjoint(bound.node.outputs)
        )
        self.calls = [bound for bound in every if bound.node.name not in self._fixed]
        """Calls that run once for each microbatch."""
        self.fixed_calls = [bound for bound in every if bound.node.name in self._fixed]
        """Calls that a plane makes once for all microbatches of these sizes."""

    def owner(self, value: ValueName) -> ValueName:
        """Return the value whose memory `value` uses."""
        return self.root.get(value, value)

    def is_alias(self, bound: BoundCall) -> bool:
        """Return whether a call only gives another view of memory."""
        return all(self.root[output] != output for output in bound.node.outputs)

    def is_graded(self, bound: BoundCall) -> bool:
        """Return whether backward passes through a call."""
        return bound.node.name in self._graded_calls

    def _graded(self, known: dict[str, BoundCall]) -> frozenset[ValueName]:
        subdag, dtypes = self.subdag, self._dtypes
        sources = [weight.name for weight in subdag.weights if weight.trainable]
        sources += [each.value for each in subdag.receives if each.gradient]
        targets = [each.value for each in subdag.sends if each.gradient]
        if subdag.loss is not None:
            targets.append(subdag.loss)

        def taken(node: Node) -> Iterable[ValueName]:
            return known[node.name].reads if known else reads(node)

        depending = requiring_gradient(subdag.nodes, sources, dtypes, taken)
        return depending & differentiable_ancestors(subdag.nodes, targets, dtypes, taken)

    def _taken(self, whole: StageCalls) -> list[BoundCall]:
        """Return the calls as they are bound in the whole graph. Calls whose gradients differ here are bound anew."""
        elsewhere = self.graded ^ whole.graded
        return [
            bound
            if elsewhere.isdisjoint((bound := whole._by_name[node.name]).reads) and elsewhere.isdisjoint(node.outputs)
            else self._bind(node)
            for node in self.subdag.nodes
        ]

    def _memory_roots(self, every: list[BoundCall], whole: StageCalls | None) -> dict[ValueName, ValueName]:
        # A received tensor is dense in memory. If it was dense where it was made, too, then everything computed from it
        # has the same layout as in the whole graph.
        if whole is not None and all(each.value in whole._dense for each in self.subdag.receives):
            return {output: whole.root[output] for bound in every for output in bound.node.outputs}
        root, layout = memory_roots(every)
        self._dense = frozenset(
            output
            for bound in every
            for output, operand in zip(bound.node.outputs, bound.call.outputs, strict=True)
            if root[output] == output and layout[output] == dense(operand.shape)
        )
        return root

    def _bind(self, node: Node) -> BoundCall:
        traits = operator(node.op)
        arguments = traits.bind(node)
        values = {name: self._value(argument) for name, argument in arguments.items()}
        outputs = tuple(self._operand(output) for output in node.outputs)
        return BoundCall(node, traits, arguments, ConcreteCall(values, outputs))

    def _operand(self, name: ValueName) -> Operand:
        if name not in self._operands:
            type = self._types[name]
            self._operands[name] = Operand(type.dtype, concrete(type, self._sizes), name in self.graded)
        return self._operands[name]

    def _value(self, argument: Argument) -> CallValue:
        if isinstance(argument, tuple):
            return tuple(self._atom(atom) for atom in argument)
        return self._atom(argument)

    def _atom(self, atom: Atom) -> CallValue:
        if isinstance(atom, Ref):
            return self._operand(atom.name)
        if isinstance(atom, Size):
            return evaluate(atom.expression, self._sizes)
        if atom is None or isinstance(atom, (bool, int, float, str)):
            return atom
        return float(atom.word) if atom.kind == "float" else atom.word


def _types(subdag: SubDag) -> dict[ValueName, TensorType]:
    """Return the types of all values of a sub-DAG."""
    found: dict[ValueName, TensorType] = dict(subdag.types)
    found |= {item.name: item.type for item in subdag.inputs}
    found |= {weight.name: weight.type for weight in subdag.weights}
    return found | {each.value: each.type for each in subdag.receives}


def total_bytes(nbytes: dict[ValueName, int], values: Iterable[ValueName]) -> int:
    """Return the bytes of several values."""
    return sum(nbytes[value] for value in values)
