"""Finds the operators that must stay with the owner of the data, and arranges the graph so that they can.

The owner runs the front: every operator that reads raw inputs, or values made from them before a weight is mixed in.
The owner also runs the back: the head, the loss and everything between, so that no logits travel. Anybody may run the
middle. So raw inputs and labels are not sent. They are not hidden by that: whoever runs the middle of a model with
public weights can reconstruct nearly all of them from the boundary tensors (docs/guarantees.md).
"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from fusionai.errors import GraphError
from fusionai.graph.dependencies import (
    ancestors,
    descendants,
    producers,
    reads,
    weight_values,
    weighted_nodes,
)
from fusionai.graph.evaluation import evaluated
from fusionai.graph.evaluation_places import Pinned, placed
from fusionai.graph.model import Dim, OpDag, ValueName, WeightKey
from fusionai.graph.vocabulary import FLOP_CLASSES, operator
from fusionai.graph.written_state import check_state_together, keep_state_together, stored_values
from fusionai.tensor import FLOATING

_OPEN = 'use placement.privacy = "open" if the compnodes may see the data'


def arrange_private(graph: OpDag) -> tuple[OpDag, int, int]:
    """Return (graph, front, back): the graph reordered so that the owner runs nodes [0, front) and [back, N).

    The nodes of an evaluation graph are placed so that the same holds in evaluation.

    Raises GraphError when an operator in the middle reads raw inputs, in training or in evaluation, when nothing is
    left for compnodes, or when a trained weight is used on both sides, whose gradient would have to be exchanged.
    """
    search, evaluation = _readers(graph)
    front = search.front()
    behind = search.behind() - front
    while True:
        count = len(front) + len(behind)
        keep_state_together(graph, front, behind, _OPEN)
        middle = set(range(len(graph.nodes))) - front - behind
        own = search.made_of_weights_of(front | behind) & middle
        own -= ancestors(graph, middle - own)
        behind |= own
        if len(front) + len(behind) == count:
            break
    if not any(place in search.heavy for place in middle):
        raise GraphError(
            f"a private job leaves nothing of {graph.name!r} for compnodes: every large operator reads raw inputs or "
            f"is the head; {_OPEN}, or take a deeper model"
        )
    both = search.trained_weights(front | behind) & search.trained_weights(middle)
    if both:
        raise GraphError(
            f"the weight {min(both)!r} of {graph.name!r} is trained by operators that read raw data or are the head, "
            "and by others that compnodes would run. Its gradient, which they would have to exchange, shows the data; "
            f"freeze or untie it, or {_OPEN}"
        )
    order = [*sorted(front), *sorted(middle), *sorted(behind)]
    arranged = msgspec.structs.replace(graph, nodes=tuple(graph.nodes[place] for place in order))
    back = len(front) + len(middle)
    if graph.evaluation is not None and evaluation is not None:
        before = evaluation.front()
        pinned = Pinned(len(front), back, before, evaluation.behind() - before)
        arranged = msgspec.structs.replace(arranged, evaluation=placed(arranged, graph.evaluation, pinned))
        check_state_together(arranged, len(front), back, _OPEN)
    return arranged, len(front), back


def raw_values(graph: OpDag, *, train: bool) -> frozenset[ValueName]:
    """Return the private inputs, and the values that show them: none of these is ever sent in a private job.

    Values are those of training, or of the evaluation graph where there is one.
    """
    training, evaluation = _readers(graph)
    return frozenset(training.raw if train or evaluation is None else evaluation.raw)


def _readers(graph: OpDag) -> tuple[_RawDataReaders, _RawDataReaders | None]:
    """Return who reads raw data in training, and in evaluation where that has a graph of its own.

    A buffer that raw data is written to in one mode shows it in the other mode too.
    """
    shown, labels = _Stored(), _Stored()
    while True:
        training = _RawDataReaders(graph, shown, labels)
        evaluation = None
        if graph.evaluation is not None:
            evaluation = _RawDataReaders(evaluated(graph), shown, labels, mode="in evaluation mode ")
        faces = [each for each in (training, evaluation) if each is not None]
        more = frozenset().union(*(each.stored for each in faces))
        more_labels = frozenset().union(*(each.stored_labels for each in faces))
        if more <= shown and more_labels <= labels:
            return training, evaluation
        shown, labels = shown | more, labels | more_labels


_Stored = frozenset[ValueName]
"""Buffers that values are written to."""


class _RawDataReaders:
    """Finds the nodes that read raw data, and the end of the graph where each of them can go.

    All sets hold places of nodes.
    """

    def __init__(self, graph: OpDag, shown: _Stored, shown_labels: _Stored, mode: str = "") -> None:
        """Find the nodes.

        Args:
            graph: one mode's.
            shown: buffers that show raw inputs of an earlier microbatch.
            shown_labels: buffers that show its labels.
            mode: begins the errors.
        """
        self._graph = graph
        self._mode = mode
        self._made = producers(graph.nodes)
        self._weighted = weighted_nodes(graph)
        values = weight_values(graph)
        self._of_weights = {place for place, node in enumerate(graph.nodes) if not values.isdisjoint(node.outputs)}
        """Nodes that compute something of weights alone."""
        self.heavy = {place for place in self._weighted if operator(graph.nodes[place].op).op_class in FLOP_CLASSES}
        """Products of activations with weights, trained or frozen: the work that a job is distributed for."""
        self.raw: set[ValueName] = set()
        """Values that show raw data."""
        self._pinned: set[int] = set()
        self._of_labels: set[int] = set()
        of_labels = self._mark_raw(shown, shown_labels)
        stored = stored_values(graph)
        self.stored = frozenset(buffer for buffer, values in stored if not values.isdisjoint(self.raw))
        """Buffers that values which show raw data are written to."""
        self.stored_labels = frozenset(buffer for buffer, values in stored if not values.isdisjoint(of_labels))
        # A node that depends on a compnode's product cannot be in front.
        self._late = descendants(graph, self.heavy - self._pinned)

    def _mark_raw(self, shown: _Stored, shown_labels: _Stored) -> set[ValueName]:
        """Mark what shows private inputs or the buffers `shown`; return the values made from labels.

        The result of a product with weights no longer shows its input. Neither does a looked-up embedding, nor raw data
        mixed with such results. Integers, booleans, and every value made from labels do show it. So does raw data mixed
        with what does not depend on it, such as an embedding of positions.
        """
        private = [item for item in self._graph.inputs if item.private]
        labels = {item.name for item in private if item.role == "labels"}.union(shown_labels)
        self.raw = {item.name for item in private}.union(shown)
        self._pinned, self._of_labels = set(), set()
        activations: set[ValueName] = set()
        """Values that depend on raw data and do not show it."""
        for place, node in enumerate(self._graph.nodes):
            taken = set(reads(node))
            mixed = not taken.isdisjoint(activations)
            if not taken.isdisjoint(self.raw):
                self._pinned.add(place)
                showing = set(node.outputs)
                if not taken.isdisjoint(labels):
                    self._of_labels.add(place)
                    labels |= showing
                elif mixed or place in self.heavy or (place in self._weighted and node.op in _LOOK_UPS):
                    showing = {output for output in showing if self._graph.types[output].dtype not in FLOATING}
                self.raw |= showing
                activations.update(output for output in node.outputs if output not in showing)
            elif mixed:
                activations.update(node.outputs)
        return labels

    def made_of_weights_of(self, places: Set[int]) -> set[int]:
        """Return the nodes that make something of the weights of these nodes, and of weights alone.

        They are to run where these nodes run: the gradients of their weights pass through them, and a penalty on a
        weight would otherwise be the only reason for another machine to hold it.
        """
        made = self._made_for(places)
        values = {name for place in places | made for name in reads(self._graph.nodes[place])}
        held = {weight.key for weight in self._graph.weights if weight.name in values}
        values = {weight.name for weight in self._graph.weights if weight.key in held}
        for place in sorted(self._of_weights):
            if not values.isdisjoint(reads(self._graph.nodes[place])):
                made.add(place)
                values.update(self._graph.nodes[place].outputs)
        return made

    def _made_for(self, places: Set[int]) -> set[int]:
        """Return the nodes that make of weights alone what these nodes read.

        Scalars are left out: a penalty that is added to the loss has a gradient that does not depend on the data.
        """
        found: set[int] = set()
        waiting = list(places)
        while waiting:
            makers = (self._makers(waiting.pop()) & self._of_weights) - found
            makers = {place for place in makers if any(self._shape(name) for name in self._graph.nodes[place].outputs)}
            found |= makers
            waiting += makers
        return found

    def _shape(self, name: ValueName) -> tuple[Dim, ...]:
        return self._graph.types[name].shape

    def trained_weights(self, places: Set[int]) -> set[WeightKey]:
        """Return the keys of the trained weights that these nodes read, as they are or made into something else."""
        read = {name for place in places | self._made_for(places) for name in reads(self._graph.nodes[place])}
        return {weight.key for weight in self._graph.weights if weight.trainable and weight.name in read}

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
