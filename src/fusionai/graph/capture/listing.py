"""An unfinished OP-DAG, and how to read and rewrite its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fusionai.graph.model import Argument, Atom, Node, Ref, TensorType, ValueName, WeightKey


@dataclass
class Listing:
    """An unfinished OP-DAG: operators in order with provisional names, and the type of every value."""

    nodes: list[Node]
    types: dict[ValueName, TensorType]
    symbols: dict[str, tuple[ValueName, int]]
    loss: ValueName
    mutated: set[WeightKey] = field(default_factory=set)
    """Weights that some operator writes to."""


def node_reads(node: Node) -> Iterator[ValueName]:
    """Yield the names of the values that a node takes. A value that it takes twice comes twice."""
    for argument in (*node.args, *node.kwargs.values()):
        for atom in argument if isinstance(argument, tuple) else (argument,):
            if isinstance(atom, Ref):
                yield atom.name


def rewrite_values(node: Node, rename: Callable[[ValueName], ValueName]) -> Node:
    """Return a node with the values it takes renamed; its outputs stay."""

    def atom(value: Atom) -> Atom:
        return Ref(rename(value.name)) if isinstance(value, Ref) else value

    def argument(value: Argument) -> Argument:
        return tuple(atom(each) for each in value) if isinstance(value, tuple) else atom(value)

    return Node(
        node.name,
        node.op,
        tuple(argument(each) for each in node.args),
        {key: argument(each) for key, each in node.kwargs.items()},
        node.outputs,
        node.scope,
    )
