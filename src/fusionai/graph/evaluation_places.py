"""Where the nodes of an evaluation graph run: each beside a node of training, so that one cut divides both.

A node that training computes in the same way runs where training computes it. Another node runs at the first place that
holds its weights and comes no earlier than its arguments. What depends on inputs only runs where it is first needed, so
that labels, for example, do not travel through the pipeline.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from fusionai.errors import GraphError
from fusionai.graph.dependencies import consumers, local_nodes, mutated_values, producers, reads, weight_views
from fusionai.graph.evaluation import as_graph
from fusionai.graph.model import EvaluationGraph, Node, OpDag, ValueName, WeightKey
from fusionai.graph.structure import structure
from fusionai.graph.vocabulary import operator

_NOWHERE: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Pinned:
    """Nodes of an evaluation graph that must stay with the owner, by place, and where the owner's training nodes end.

    The owner runs the training nodes [0, front) and [back, N).
    """

    front: int
    back: int
    before: AbstractSet[int] = _NOWHERE
    """Readers of raw data, and all nodes that they depend on."""
    behind: AbstractSet[int] = _NOWHERE
    """The heads, the loss, and all nodes that depend on them."""


def placed(graph: OpDag, evaluation: EvaluationGraph, pinned: Pinned | None = None) -> EvaluationGraph:
    """Return the evaluation graph of `graph` with its nodes placed, and in the order of their places.

    Raises GraphError for a node that must stay with the owner, where the owner has no stage for it.
    """
    places = _Placing(graph, evaluation, pinned or Pinned(len(graph.nodes), len(graph.nodes))).places()
    order = sorted(range(len(places)), key=lambda place: (places[place], place))
    return EvaluationGraph(
        weights=evaluation.weights,
        nodes=tuple(evaluation.nodes[place] for place in order),
        places=tuple(places[place] for place in order),
        types=evaluation.types,
        loss=evaluation.loss,
    )


class _Placing:
    """The state of placing one evaluation graph. "Place" alone is that of an evaluation node in its graph."""

    def __init__(self, graph: OpDag, evaluation: EvaluationGraph, pinned: Pinned) -> None:
        self._graph = graph
        self._pinned = pinned
        whole = as_graph(graph, evaluation)
        self._nodes = whole.nodes
        self._made = producers(whole.nodes)
        self._taken = consumers(whole.nodes)
        self._digests = structure(whole, inference=False).values
        self._shown = _shown_weights(whole)
        written = mutated_values(graph.nodes) | mutated_values(whole.nodes)
        self._written = {weight.key for weight in whole.weights if weight.name in written}
        self._local = local_nodes(whole, frozenset(weight.name for weight in whole.weights if weight.name in written))
        self._equal, self._readers = _training_places(graph)
        self._inputs_only = self._of_inputs_only()

    def places(self) -> list[int]:
        """Return a place of training for each node."""
        found = [0] * len(self._nodes)  # local nodes run wherever they are needed
        touched: dict[WeightKey, int] = {}
        for place, node in enumerate(self._nodes):
            if place in self._local or place in self._inputs_only:
                continue
            earliest = max((found[each] for each in self._makers(node) if each not in self._inputs_only), default=0)
            # Reads and writes of a tensor that changes keep their order.
            changing = self._touches(node) & self._written
            earliest = max([earliest, *(touched.get(key, 0) for key in changing)])
            found[place] = self._for_owner(place, self._beside(node, earliest), earliest)
            touched.update(dict.fromkeys(changing, found[place]))
        last = len(self._graph.nodes) - 1
        for place in sorted(self._inputs_only, reverse=True):
            users = {each for output in self._nodes[place].outputs for each in self._taken.get(output, ())}
            found[place] = self._for_owner(place, min((found[each] for each in users), default=last), 0)
        return found

    def _beside(self, node: Node, earliest: int) -> int:
        """Return the place of training that suits a node best, at or after `earliest`."""
        equal = _from(self._equal.get(self._digests[node.outputs[0]], ()), earliest)
        if equal is not None:
            return equal
        holders = [_from(self._readers.get(key, ()), earliest) for key in self._touches(node)]
        return max((each for each in holders if each is not None), default=earliest)

    def _for_owner(self, place: int, chosen: int, earliest: int) -> int:
        """Return the place, moved to a stage of the owner where the node must stay there."""
        pinned = self._pinned
        if place in pinned.behind:
            return max(chosen, pinned.back)
        if place not in pinned.before or chosen >= pinned.back:
            return chosen
        if earliest >= pinned.front:
            node = self._nodes[place]
            where = f" (in {node.scope})" if node.scope else ""
            raise GraphError(
                f"in evaluation mode operator {node.name!r} ({node.op}){where} reads raw inputs where in training the "
                'compnodes compute, so the model cannot be cut privately; use placement.privacy = "open" if the '
                "compnodes may see the data, or train without held-out data"
            )
        return min(chosen, pinned.front - 1)

    def _makers(self, node: Node) -> set[int]:
        return {self._made[name] for name in reads(node) if name in self._made}

    def _touches(self, node: Node) -> set[WeightKey]:
        """Return the weights that a node reads, directly or through views."""
        return {key for name in reads(node) for key in self._shown.get(name, ())}

    def _of_inputs_only(self) -> set[int]:
        """Return the nodes that depend on inputs and on nothing that a stage holds."""
        found: set[int] = set()
        for place, node in enumerate(self._nodes):
            if place in self._local or self._touches(node):
                continue
            if all(each in found or each in self._local for each in self._makers(node)):
                found.add(place)
        return found


def _shown_weights(graph: OpDag) -> dict[ValueName, frozenset[WeightKey]]:
    """Return the weights that each value is or shows: weights themselves, and views of them."""
    found = {weight.name: frozenset({weight.key}) for weight in graph.weights}
    for node in graph.nodes:
        if operator(node.op).op_class == "view":
            keys = frozenset(key for name in reads(node) for key in found.get(name, ()))
            if keys:
                found.update(dict.fromkeys(node.outputs, keys))
    return found


def _training_places(graph: OpDag) -> tuple[Mapping[bytes, Sequence[int]], Mapping[WeightKey, Sequence[int]]]:
    """Return the training nodes by digest, and the training nodes that read a weight, each in rising order."""
    digests = structure(graph, inference=True).values
    shown, local, views = _shown_weights(graph), local_nodes(graph), weight_views(graph)
    equal: dict[bytes, list[int]] = {}
    readers: dict[WeightKey, list[int]] = {}
    for place, node in enumerate(graph.nodes):
        if place not in local:
            equal.setdefault(digests[node.outputs[0]], []).append(place)
        if place not in views:
            for key in {key for name in reads(node) for key in shown.get(name, ())}:
                readers.setdefault(key, []).append(place)
    return equal, readers


def _from(places: Sequence[int], earliest: int) -> int | None:
    """Return the first of some rising places that is not before `earliest`."""
    at = bisect_left(places, earliest)
    return places[at] if at < len(places) else None
