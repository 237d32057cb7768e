"""A sub-DAG at concrete sizes: every call bound, which values take part in backward, and which share memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fusionai.graph.dependencies import differentiable_ancestors, reads, recomputable, requiring_gradient
from fusionai.graph.layouts import memory_roots
from fusionai.graph.model import Argument, Atom, Node, Ref, Size, Sizes, SubDag, TensorType, ValueName
from fusionai.graph.operators.schema import Call, CallValue, Operand
from fusionai.graph.sizes import concrete, evaluate, type_bytes
from fusionai.graph.vocabulary import Operator, operator


class BoundCall:
    """One call: its node, its operator, and its arguments at concrete sizes."""

    __slots__ = ("arguments", "call", "node", "reads", "traits")

    def __init__(self, node: Node, traits: Operator, arguments: dict[str, Argument], call: Call) -> None:
        self.node = node
        self.traits = traits
        self.arguments = arguments
        self.call = call
        self.reads = tuple(dict.fromkeys(reads(node)))
        """The values that the call takes, each once."""

    def values(self, parameter: str) -> list[ValueName]:
        """Return the values that one argument consists of."""
        argument = self.arguments[parameter]
        atoms: Sequence[Atom] = argument if isinstance(argument, tuple) else (argument,)
        return [atom.name for atom in atoms if isinstance(atom, Ref)]


class StageCalls:
    """The calls of a sub-DAG at concrete sizes. Raises GraphError where a size cannot be computed."""

    def __init__(self, subdag: SubDag, sizes: Sizes) -> None:
        self.subdag = subdag
        types: dict[ValueName, TensorType] = dict(subdag.types)
        types |= {item.name: item.type for item in subdag.inputs}
        types |= {weight.name: weight.type for weight in subdag.weights}
        types |= {each.value: each.type for each in subdag.receives}
        self.nbytes = {name: type_bytes(type, sizes) for name, type in types.items()}
        """Bytes of each value."""
        self.weights = frozenset(weight.name for weight in subdag.weights)
        self.graded = _graded(subdag, types)
        """Values that a gradient is computed for."""
        self._operands = {
            name: Operand(type.dtype, concrete(type, sizes), name in self.graded) for name, type in types.items()
        }
        self._sizes = sizes
        every = [self._bind(node) for node in subdag.nodes]
        self.root = memory_roots(subdag.nodes, [bound.call for bound in every])
        """For outputs that are views, the value whose memory they use; for others, themselves."""
        fixed = recomputable(subdag)
        self.calls = [bound for place, bound in enumerate(every) if place not in fixed]
        """The calls of every microbatch."""
        self.fixed_calls = [bound for place, bound in enumerate(every) if place in fixed]
        """Calls that a plane makes once for all microbatches of these sizes."""

    def owner(self, value: ValueName) -> ValueName:
        """Return the value whose memory `value` uses."""
        return self.root.get(value, value)

    def is_alias(self, bound: BoundCall) -> bool:
        """Return whether a call only gives another view of memory."""
        return all(self.root[output] != output for output in bound.node.outputs)

    def is_graded(self, bound: BoundCall) -> bool:
        """Return whether backward passes through a call."""
        return any(output in self.graded for output in bound.node.outputs)

    def _bind(self, node: Node) -> BoundCall:
        traits = operator(node.op)
        arguments = traits.bind(node)
        values = {name: self._value(argument) for name, argument in arguments.items()}
        outputs = tuple(self._operands[output] for output in node.outputs)
        return BoundCall(node, traits, arguments, Call(values, outputs))

    def _value(self, argument: Argument) -> CallValue:
        if isinstance(argument, tuple):
            return tuple(self._atom(atom) for atom in argument)
        return self._atom(argument)

    def _atom(self, atom: Atom) -> CallValue:
        if isinstance(atom, Ref):
            return self._operands[atom.name]
        if isinstance(atom, Size):
            return evaluate(atom.expression, self._sizes)
        if atom is None or isinstance(atom, (bool, int, float, str)):
            return atom
        return float(atom.word) if atom.kind == "float" else atom.word


def _graded(subdag: SubDag, types: dict[ValueName, TensorType]) -> frozenset[ValueName]:
    sources = [weight.name for weight in subdag.weights if weight.trainable]
    sources += [each.value for each in subdag.receives if each.gradient]
    targets = [each.value for each in subdag.sends if each.gradient]
    if subdag.loss is not None:
        targets.append(subdag.loss)
    dtypes = {name: type.dtype for name, type in types.items()}
    depending = requiring_gradient(subdag.nodes, sources, dtypes)
    return depending & differentiable_ancestors(subdag.nodes, targets, dtypes)


def total_bytes(nbytes: dict[ValueName, int], values: Iterable[ValueName]) -> int:
    """Return the bytes of several values."""
    return sum(nbytes[value] for value in values)
