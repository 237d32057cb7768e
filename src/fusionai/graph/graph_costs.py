"""Costs of the sub-DAGs of one graph, for planners, which ask for hundreds of sub-DAGs of a few kinds.

Operators are bound once. Sub-DAGs that differ only in names cost the same, so each kind is costed once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

from fusionai.errors import GraphError
from fusionai.graph.calls import StageCalls
from fusionai.graph.cost import NodeCost, StageCost, cost_of_calls, costs_of_nodes, types_fit
from fusionai.graph.model import Argument, Node, Ref, Sizes, SubDag


class GraphCosts:
    """Costs of the sub-DAGs of one graph at one set of sizes.

    `whole` is the uncut graph, as `cuts.cut(graph, [])` returns it. The methods take sub-DAGs that `cuts.cut` made from
    the same graph, and raise GraphError as `cost.stage_cost` does.
    """

    def __init__(self, whole: SubDag, sizes: Sizes) -> None:
        self._subdag, self._sizes = whole, sizes
        self._likeness = Likeness()
        self._known: dict[Hashable, StageCost] = {}

    def __len__(self) -> int:
        """Return how many kinds of sub-DAG were costed."""
        return len(self._known)

    @cached_property
    def _calls(self) -> StageCalls:
        with types_fit(self._subdag):
            return StageCalls(self._subdag, self._sizes)

    @cached_property
    def _shared(self) -> StageCalls | None:
        """The bound calls of the whole graph, or None when some call cannot be bound; that stage may never run."""
        try:
            return self._calls
        except GraphError:
            return None

    @cached_property
    def whole(self) -> StageCost:
        """Cost of the graph as one stage."""
        with types_fit(self._subdag):
            return cost_of_calls(self._calls)

    @cached_property
    def nodes(self) -> dict[str, NodeCost]:
        """Cost of each node of the uncut graph, by its name."""
        with types_fit(self._subdag):
            return dict(zip((node.name for node in self._subdag.nodes), costs_of_nodes(self._calls), strict=True))

    def stages(self, subdags: Sequence[SubDag]) -> list[StageCost]:
        """Return the cost of each sub-DAG."""
        found = []
        for subdag in subdags:
            key = self._likeness(subdag)
            if key not in self._known:
                with types_fit(subdag):
                    self._known[key] = cost_of_calls(StageCalls(subdag, self._sizes, self._shared))
            found.append(self._known[key])
        return found


class Likeness:
    """Makes keys for sub-DAGs of one graph. Two keys are equal when only names of values and weights differ.

    Names of graph inputs are part of the key, because `StageCost` lists bytes by input name.
    """

    def __init__(self) -> None:
        self._forms: dict[Hashable, int] = {}
        self._nodes: dict[str, tuple[int, tuple[str, ...]]] = {}
        """By node: the number of its form, and the values that it names, in order."""

    def __call__(self, subdag: SubDag) -> Hashable:
        """Return the key of a sub-DAG."""
        numbers: dict[str, int] = {}
        keys: dict[str, int] = {}

        def number(name: str) -> int:
            return numbers.setdefault(name, len(numbers))

        received = tuple((number(each.value), each.type, each.gradient) for each in subdag.receives)
        inputs = tuple((number(each.name), each) for each in subdag.inputs)
        weights = tuple(
            (
                number(each.name),
                keys.setdefault(each.key, len(keys)),
                each.type,
                each.kind,
                each.trainable,
                not each.aliases,
            )
            for each in subdag.weights
        )
        nodes: list[int] = []
        for node in subdag.nodes:
            form, names = self._nodes.get(node.name) or self._form(node, subdag)
            nodes.append(form)
            nodes += [numbers.setdefault(name, len(numbers)) for name in names]
        sent = tuple((number(each.value), each.type, each.gradient) for each in subdag.sends)
        return received, inputs, weights, tuple(nodes), sent, None if subdag.loss is None else number(subdag.loss)

    def _form(self, node: Node, subdag: SubDag) -> tuple[int, tuple[str, ...]]:
        """Return the number of a node's form (the node without names), and the names."""
        names: list[str] = []

        def plain(argument: Argument) -> Hashable:
            if isinstance(argument, tuple):
                return tuple(plain(each) for each in argument)
            if isinstance(argument, Ref):
                names.append(argument.name)
                return Ref
            # Python calls 1, 1.0 and True equal, but operators treat them differently.
            return type(argument), argument

        form = (
            node.op,
            tuple(plain(argument) for argument in node.args),
            tuple((name, plain(argument)) for name, argument in node.kwargs.items()),
            tuple(subdag.types[output] for output in node.outputs),
        )
        found = self._forms.setdefault(form, len(self._forms)), (*names, *node.outputs)
        self._nodes[node.name] = found
        return found
