"""One call of an OP-DAG, with its operator's schema and its arguments at concrete sizes."""

from __future__ import annotations

from collections.abc import Sequence

from fusionai.graph.dependencies import reads
from fusionai.graph.model import Argument, Atom, Node, Ref, ValueName
from fusionai.graph.operators.schema import ConcreteCall
from fusionai.graph.vocabulary import Operator


class BoundCall:
    """One call: its node, its operator, and its arguments by name, at concrete sizes."""

    __slots__ = ("arguments", "call", "node", "reads", "traits")

    def __init__(self, node: Node, traits: Operator, arguments: dict[str, Argument], call: ConcreteCall) -> None:
        self.node = node
        self.traits = traits
        self.arguments = arguments
        self.call = call
        self.reads = tuple(dict.fromkeys(reads(node)))
        """The values that the call takes, without repetitions."""

    def values(self, parameter: str) -> list[ValueName]:
        """Return the values that one argument refers to."""
        argument = self.arguments[parameter]
        atoms: Sequence[Atom] = argument if isinstance(argument, tuple) else (argument,)
        return [atom.name for atom in atoms if isinstance(atom, Ref)]

    @property
    def viewed(self) -> ValueName | None:
        """Return the value that the outputs may be views of."""
        argument = None if self.traits.view is None else self.arguments[self.traits.view]
        return argument.name if isinstance(argument, Ref) else None
