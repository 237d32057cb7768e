"""Finds the operators that must stay with the owner of the data, and arranges the graph so that they can.

The owner runs the front: every operator that reads raw inputs, or values made from them before a weight is mixed in.
The owner also runs the back: the head, the loss and everything between, so that no logits travel. Anybody may run the
middle. What boundary tensors of the middle give away about the data is another question (docs/guarantees.md).
"""

from __future__ import annotations

import msgspec

from fusionai.errors import GraphError
from fusionai.graph.dependencies import (
    ancestors,
    descendants,
    producers,
    reads,
    weighted_nodes,
)
from fusionai.graph.evaluation import evaluated
from fusionai.graph.evaluation_places import Pinned, placed
from fusionai.graph.model import OpDag, ValueName
from fusionai.graph.vocabulary import FLOP_CLASSES, operator
from fusionai.tensor import FLOATING

_OPEN = 'use placement.privacy = "open" if the compnodes may see the data'


def arrange_private(graph: OpDag) -> tuple[OpDag, int, int]:
    """Return (graph, front, back): the graph reordered so that the owner runs nodes [0, front) and [back, N).

    The nodes of an evaluation graph are placed so that the same holds in evaluation. Raises GraphError when an operator
    in the middle reads raw inputs, in training or in evaluation, or when nothing is left for compnodes.
    """
    search = _RawDataReaders(graph)
    front, behind = search.front(), search.behind()
    behind -= front
    middle = [place for place in range(len(graph.nodes)) if place not in front and place not in behind]
    if not any(place in search.heavy for place in middle):
        raise GraphError(
            f"a private job leaves nothing of {graph.name!r} for compnodes: every large operator reads raw inputs or "
            f"is the head; {_OPEN}, or take a deeper model"
        )
    order = [*sorted(front), *middle, *sorted(behind)]
    arranged = msgspec.structs.replace(graph, nodes=tuple(graph.nodes[place] for place in order))
    back = len(front) + len(middle)
    if graph.evaluation is not None:
        evaluation = _RawDataReaders(evaluated(graph), mode="in evaluation mode ")
        before = evaluation.front()
        pinned = Pinned(len(front), back, before, evaluation.behind() - before)
        arranged = msgspec.structs.replace(arranged, evaluation=placed(arranged, graph.evaluation, pinned))
    return arranged, len(front), back


class _RawDataReaders:
    """Finds the nodes that read raw data, and the end of the graph where each of them can go.

    All sets hold places of nodes.
    """

    def __init__(self, graph: OpDag, mode: str = "") -> None:
        """`mode` begins the errors."""
        self._graph = graph
        self._mode = mode
        self._made = producers(graph.nodes)
        self._weighted = weighted_nodes(graph)
        self.heavy = {place for place in self._weighted if operator(graph.nodes[place].op).op_class in FLOP_CLASSES}
        """Products of activations with weights: the work that a job is distributed for."""
        self._raw: set[ValueName] = set()
        """Values that show raw data."""
        self._pinned: set[int] = set()
        self._of_labels: set[int] = set()
        self._find_raw()
        # A node that depends on a compnode's product cannot be in front.
        self._late = descendants(graph, self.heavy - self._pinned)

    def _find_raw(self) -> None:
        """Find the nodes that read private inputs, or values that still show them.

        The result of a product with weights no longer shows its input. Neither does a looked-up embedding, nor raw data
        mixed with activations. Integers, booleans, and every value made from labels do show it.
        """
        private = [item for item in self._graph.inputs if item.private]
        labels = {item.name for item in private if item.role == "labels"}
        self._raw = {item.name for item in private}
        activations: set[ValueName] = set()
        for place, node in enumerate(self._graph.nodes):
            taken = set(reads(node))
            mixed = not taken.isdisjoint(activations)
            if not taken.isdisjoint(self._raw):
                self._pinned.add(place)
                showing = set(node.outputs)
                if not taken.isdisjoint(labels):
                    self._of_labels.add(place)
                    labels |= showing
                elif mixed or place in self.heavy or (place in self._weighted and node.op in _LOOK_UPS):
                    showing = {output for output in showing if self._graph.types[output].dtype not in FLOATING}
                self._raw |= showing
            if mixed or place in self._weighted:
                activations.update(output for output in node.outputs if output not in self._raw)

    def front(self) -> set[int]:
        """Return the readers of raw data that can come first, and all nodes that they depend on."""
        return ancestors(self._graph, self._pinned - self._of_labels - self._late)

    def behind(self) -> set[int]:
        """Return the loss, the other readers of raw data, and the nodes between the heads and them.

        Raises GraphError for a reader that has products with weights before and after it.
        """
        loss = {self._made[self._graph.loss]}
        readers = self._of_labels | (self._pinned & self._late)
        before_heavy = ancestors(self._graph, {each for place in self.heavy for each in self._makers(place)})
        for place in sorted(readers & before_heavy & self._late):
            node = self._graph.nodes[place]
            where = f" (in {node.scope})" if node.scope else ""
            raise GraphError(
                f"{self._mode}operator {node.name!r} ({node.op}){where} reads raw inputs in the middle of the model, "
                f"so the model cannot be cut privately; {_OPEN}"
            )
        return descendants(self._graph, self._heads(readers or loss) | readers | loss)

    def _heads(self, readers: set[int]) -> set[int]:
        """Return the last products with weights on every path to the readers."""
        heads, seen = set(), set(readers)
        waiting = [place for place in readers if place not in self.heavy]
        heads |= readers & self.heavy
        while waiting:
            for maker in self._makers(waiting.pop()):
                if maker in seen or maker in self._pinned - self._late:
                    continue
                seen.add(maker)
                if maker in self.heavy:
                    heads.add(maker)
                else:
                    waiting.append(maker)
        return heads

    def _makers(self, place: int) -> set[int]:
        """Return the nodes whose outputs a node reads."""
        return {self._made[name] for name in reads(self._graph.nodes[place]) if name in self._made}


_LOOK_UPS = frozenset({"aten.embedding.default"})
