"""Cutting an OP-DAG into stages where few bytes cross.

A cut at position p parts nodes [0, p) from nodes [p, N). A value that any stage can compute by itself (see
`dependencies.local_nodes`) is computed again in each stage that needs it, and never sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import msgspec

from fusionai.errors import GraphError
from fusionai.graph.dependencies import (
    consumers,
    gradient_values,
    local_nodes,
    mutated_values,
    producers,
    reads,
    weighted_nodes,
)
from fusionai.graph.evaluation import evaluated
from fusionai.graph.graph_costs import GraphCosts
from fusionai.graph.model import OpDag, Sizes, StageEvaluation, SubDag, Transfer, ValueName
from fusionai.graph.sizes import type_bytes
from fusionai.graph.vocabulary import operator
from fusionai.graph.written_state import parting_positions

_TOLERANCE = 1.001
"""Positions whose bytes differ by less than this factor count as equally good. A larger factor offers more positions,
some of which cost more."""

_COARSEST = 1 / 12
"""Neighbouring cut points are no further apart than this share of the whole work, where operators allow it. A larger
share leaves the planner too few ways to balance stages; a smaller one makes planning slower."""

_FLOPS_PER_BYTE = 10
"""Work of moving a byte, in FLOPs: the usual ratio of CPUs and GPUs. It only decides how far apart two positions count
as being, so a wrong value moves cut points a little and changes no cost."""

_NEVER = 1 << 62
"""Bytes that stand for a position where no cut may be."""


def crossing_bytes(graph: OpDag, sizes: Sizes, local: frozenset[int] | None = None) -> list[int]:
    """Return, for each position 0..N, the bytes of one microbatch that cross a cut there in the forward direction.

    `local`: the places of the nodes whose outputs never travel, where the caller knows them already.
    """
    local = local_nodes(graph) if local is None else local
    changes = [0] * (len(graph.nodes) + 2)
    taken = consumers(graph.nodes)
    for place, node in enumerate(graph.nodes):
        if place in local:
            continue
        for output in node.outputs:
            last = taken.get(output, [place])[-1]
            if last > place:
                size = type_bytes(graph.types[output], sizes)
                changes[place + 1] += size
                changes[last + 1] -= size
    return list(accumulate(changes[: len(graph.nodes) + 1]))


def cut_points(
    graph: OpDag, sizes: Sizes, within: tuple[int, int] | None = None, *, cutter: Cutter | None = None
) -> list[int]:
    """Return the positions worth cutting at, strictly between the ends of `within` (default: the whole graph).

    A position is worth cutting at when no position before it, or none after it, has fewer bytes crossing. In a
    transformer these are the positions between blocks. In a network whose activations shrink, they are the positions
    after each shrinking. Where two such positions have much work between them, the best positions in between are added.
    Where nothing is computed between several positions, only one of them is returned, so every stretch between
    neighbours (and between the ends and their neighbours) has work.

    `cutter`: the graph's cutter, where the caller has one.
    """
    start, stop = within or (0, len(graph.nodes))
    cutter = cutter or Cutter(graph)
    local, weighted = cutter.local, weighted_nodes(graph)
    idle = [place in local or operator(node.op).op_class == "view" for place, node in enumerate(graph.nodes)]
    # Few bytes cross before the first weight and after the last one, but a cut there would give a stage without work.
    ends = [place for place in range(start, stop) if place in weighted] or [
        place for place in range(start, stop) if not idle[place]
    ]
    if len(ends) < 2:
        return []
    crossing = crossing_bytes(graph, sizes, local)
    parting = parting_positions(graph)
    for position in parting:
        crossing[position] = _NEVER
    search = _CutSearch(crossing, _work_before(graph, cutter.costs(sizes)), idle)
    # The ends of `within` are cuts in any case, so the other positions are compared with them too.
    before = crossing[start] if start > 0 else None
    after = crossing[stop] if stop < len(graph.nodes) else None
    points = search.points(ends[0] + 1, ends[-1] + 1, before, after)
    return [point for point in points if point not in parting]


def thinned(graph: OpDag, sizes: Sizes, points: Sequence[int], most: int) -> list[int]:
    """Return at most `most` cut points: the cheapest of each stretch, so that good ones remain all over the graph."""
    if len(points) <= most:
        return list(points)
    crossing = crossing_bytes(graph, sizes)
    step = len(points) / most
    stretches = [points[int(k * step) : int((k + 1) * step)] for k in range(most)]
    return [min(stretch, key=lambda point: crossing[point]) for stretch in stretches if stretch]


def _work_before(graph: OpDag, costs: GraphCosts) -> list[float]:
    """Return, for each position, the work of all nodes before it, as FLOPs of forward and backward."""
    work = {
        name: cost.forward_flops + cost.backward_flops + _FLOPS_PER_BYTE * (cost.forward_bytes + cost.backward_bytes)
        for name, cost in costs.nodes.items()
    }
    return [0.0, *accumulate(float(work.get(node.name, 0)) for node in graph.nodes)]


@dataclass(frozen=True, slots=True)
class _CutSearch:
    """Chooses cut points from what is known of each position."""

    crossing: Sequence[int]
    work: Sequence[float]
    """Work of all nodes before each position."""
    idle: Sequence[bool]
    """By place: whether the node computes nothing by itself."""

    def points(self, first: int, stop: int, before: int | None, after: int | None) -> list[int]:
        """Return the cut points among positions [first, stop), given the bytes at fixed cuts before and after."""
        bytes_there = self.crossing[first:stop]
        least_before = _running_least(bytes_there, before)
        least_after = _running_least(bytes_there[::-1], after)[::-1]
        chosen = [
            first + offset
            for offset, (here, *least) in enumerate(zip(bytes_there, least_before, least_after, strict=True))
            if here <= _TOLERANCE * max(least)
        ]
        found = self._apart(chosen)
        edges = [first, *found, stop - 1]
        for low, high in pairwise(edges):
            found += self._between(low, high)
        return sorted(set(found))

    def _apart(self, positions: Iterable[int]) -> list[int]:
        """Return the positions; of neighbours with nothing computed in between, only the first one."""
        kept: list[int] = []
        for position in positions:
            if not kept or not all(self.idle[kept[-1] : position]):
                kept.append(position)
        return kept

    def _between(self, low: int, high: int) -> list[int]:
        """Return further points strictly between two positions, if much work lies between them."""
        if self.work[high] - self.work[low] <= _COARSEST * self.work[-1]:
            return []
        margin = (self.work[high] - self.work[low]) / 8  # nearer to an end, a point adds little choice
        inner = [
            position
            for position in range(low + 1, high)
            if self.work[low] + margin < self.work[position] < self.work[high] - margin
        ]
        if not inner:
            return []
        # Of the cheapest positions take the one in the middle of the work, then search both halves.
        least = min(self.crossing[position] for position in inner)
        half = (self.work[low] + self.work[high]) / 2
        cheap = [position for position in inner if self.crossing[position] <= _TOLERANCE * least]
        best = min(cheap, key=lambda position: abs(self.work[position] - half))
        return [*self._between(low, best), best, *self._between(best, high)]


def _running_least(values: Sequence[int], first: int | None) -> list[int]:
    """Return, for each value, the least of `first` and all values up to and including it."""
    found: list[int] = []
    for value in values:
        found.append(min(value, found[-1] if found else value if first is None else first))
    return found


def cut(graph: OpDag, positions: Sequence[int]) -> tuple[SubDag, ...]:
    """Return the sub-DAGs of the stages between `positions`, which rise strictly within 1..N-1.

    Raises GraphError for other positions, for a stage that would compute nothing, and for a cut that parts the users
    of a tensor which training changes in place.
    """
    return Cutter(graph).cut(positions)


class Cutter:
    """Cuts one graph many times. What does not depend on the cuts is computed once."""

    def __init__(self, graph: OpDag) -> None:
        self._graph = graph
        whole = evaluated(graph)
        # What either face writes to is no constant for the other one.
        written = mutated_values(graph.nodes)
        if whole is not graph:
            written |= mutated_values(whole.nodes)
        self._weights = whole.weights
        self._written = [weight for weight in whole.weights if weight.name in written]
        changed = frozenset(weight.name for weight in self._written)
        self.local = local_nodes(graph, changed)
        """Places of the nodes that every stage computes for itself."""
        self._training = _Slicer(graph, self.local, gradient_values(graph))
        self._evaluation = None
        if whole is not graph:
            self._evaluation = _Slicer(whole, local_nodes(whole, changed), frozenset())
        self._costs: tuple[Sizes, GraphCosts] | None = None

    def costs(self, sizes: Sizes) -> GraphCosts:
        """Return the costs of the graph's sub-DAGs at these sizes. The object is kept for further calls with them."""
        if self._costs is None or self._costs[0] != sizes:
            self._costs = dict(sizes), GraphCosts(self.cut([])[0], sizes)
        return self._costs[1]

    def cut(self, positions: Sequence[int]) -> tuple[SubDag, ...]:
        """Return the sub-DAGs of the stages between `positions`, as the function `cut` does."""
        graph = self._graph
        bounds = [0, *positions, len(graph.nodes)]
        if any(early >= late for early, late in pairwise(bounds)):
            raise GraphError(
                f"cuts must rise strictly between 0 and {len(graph.nodes)} (the number of operators), got "
                f"{list(positions)}"
            )
        stage_of = [stage for stage, (early, late) in enumerate(pairwise(bounds)) for _ in range(early, late)]
        stages = len(bounds) - 1
        held = self._training.held(stage_of, stages)
        empty = [stage for stage, places in enumerate(held) if not places - self.local]
        if empty:
            raise GraphError(
                f"stage {empty[0]} (operators {bounds[empty[0]]} to {bounds[empty[0] + 1]}) would compute nothing; "
                "move the cut"
            )
        subdags = self._training.subdags(held, stage_of)
        if graph.evaluation is not None and self._evaluation is not None:
            # Places never fall, so no value goes back to an earlier stage.
            beside = [stage_of[place] for place in graph.evaluation.places]
            own = self._evaluation.subdags(self._evaluation.held(beside, stages), beside)
            subdags = tuple(self._together(*each) for each in zip(subdags, own, strict=True))
        self._refuse_parted_state(subdags)
        return subdags

    def _together(self, training: SubDag, evaluation: SubDag) -> SubDag:
        """Return a stage's sub-DAG with what it runs in evaluation."""
        names = {weight.name for part in (training, evaluation) for weight in part.weights}
        return msgspec.structs.replace(
            training,
            weights=tuple(weight for weight in self._weights if weight.name in names),
            evaluation=StageEvaluation(
                evaluation.inputs,
                evaluation.nodes,
                evaluation.types,
                evaluation.receives,
                evaluation.sends,
                evaluation.loss,
            ),
        )

    def _refuse_parted_state(self, subdags: Sequence[SubDag]) -> None:
        for weight in self._written:
            holders = [subdag.index for subdag in subdags if weight in subdag.weights]
            if len(holders) > 1:
                raise GraphError(
                    f"the cut parts the users of {weight.key!r}, which training changes in place, over stages "
                    f"{holders}; move the cut"
                )


class _Slicer:
    """Divides one face of a graph, that of training or that of evaluation, among stages."""

    def __init__(self, graph: OpDag, local: frozenset[int], gradients: frozenset[ValueName]) -> None:
        self._graph = graph
        self._local = local
        self._gradients = gradients
        self._made = producers(graph.nodes)
        self._reads = [tuple(dict.fromkeys(reads(node))) for node in graph.nodes]

    def held(self, stage_of: Sequence[int], stages: int) -> list[set[int]]:
        """Return the places that each stage runs: its own nodes, and the local nodes that they need."""
        own: list[set[int]] = [set() for _ in range(stages)]
        for place, stage in enumerate(stage_of):
            if place not in self._local:
                own[stage].add(place)
        return [self._closure(places) for places in own]

    def subdags(self, held: Sequence[set[int]], stage_of: Sequence[int]) -> tuple[SubDag, ...]:
        """Return what each stage runs, with the tensors that go between them."""
        transfers = self._transfers(held, stage_of)
        return tuple(self._subdag(stage, sorted(places), transfers) for stage, places in enumerate(held))

    def _closure(self, own: set[int]) -> set[int]:
        places = set(own)
        waiting = list(own)
        while waiting:
            for name in self._reads[waiting.pop()]:
                place = self._made.get(name)
                if place is not None and place in self._local and place not in places:
                    places.add(place)
                    waiting.append(place)
        return places

    def _transfers(self, held: Sequence[set[int]], stage_of: Sequence[int]) -> list[Transfer]:
        """Return every boundary tensor: one transfer from the stage that makes it to each stage that takes it."""
        made, types = self._made, self._graph.types
        found: dict[tuple[ValueName, int], Transfer] = {}
        for stage, places in enumerate(held):
            for place in sorted(places):
                for name in self._reads[place]:
                    maker = made.get(name)
                    if maker is None or maker in self._local or stage_of[maker] == stage:
                        continue
                    found[name, stage] = Transfer(name, stage_of[maker], stage, types[name], name in self._gradients)
        return sorted(found.values(), key=lambda each: (made[each.value], each.value, each.target))

    def _subdag(self, stage: int, places: Sequence[int], transfers: Sequence[Transfer]) -> SubDag:
        graph = self._graph
        nodes = tuple(graph.nodes[place] for place in places)
        taken = {name for place in places for name in self._reads[place]}
        outputs = {output for node in nodes for output in node.outputs}
        return SubDag(
            index=stage,
            symbols=graph.symbols,
            inputs=tuple(item for item in graph.inputs if item.name in taken),
            weights=tuple(weight for weight in graph.weights if weight.name in taken),
            nodes=nodes,
            types={output: graph.types[output] for node in nodes for output in node.outputs},
            receives=tuple(each for each in transfers if each.target == stage),
            sends=tuple(each for each in transfers if each.source == stage),
            loss=graph.loss if graph.loss in outputs else None,
        )


def boundary_bytes(subdags: Sequence[SubDag], sizes: Sizes) -> dict[tuple[int, int], tuple[int, int]]:
    """Return the bytes of one microbatch between stages, by (source, target): values forward, gradients backward."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    for subdag in subdags:
        for transfer in subdag.sends:
            size = type_bytes(transfer.type, sizes)
            forward, backward = found.get((transfer.source, transfer.target), (0, 0))
            found[transfer.source, transfer.target] = (
                forward + size,
                backward + (size if transfer.gradient else 0),
            )
    return found
