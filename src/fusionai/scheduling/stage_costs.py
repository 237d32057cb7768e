"""What stages of one graph cost at one size. Each way to cut the graph is worked out once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from fusionai.graph.cost import StageCost
from fusionai.graph.cuts import Cutter, boundary_bytes
from fusionai.graph.model import OpDag, Sizes, SubDag, Weight, WeightKey
from fusionai.graph.sizes import type_bytes
from fusionai.scheduling.links import Floats


@dataclass(frozen=True, slots=True)
class StageWeights:
    """The weights that a stage reads."""

    weights: tuple[Weight, ...]

    @property
    def keys(self) -> frozenset[WeightKey]:
        """Return their keys."""
        return frozenset(each.key for each in self.weights)


@dataclass(frozen=True, eq=False)
class TrainedWeights:
    """Where a graph's trained weights are, the graph being cut into parts. Array suffix: A = parts."""

    bounds: tuple[int, ...]
    """Part a is nodes [bounds[a], bounds[a + 1]) of the graph."""
    single_bytes: Floats
    """(A,): bytes of the weights that only this part reads."""
    tied: tuple[tuple[int, tuple[int, ...]], ...]
    """Bytes of each weight that several parts read, and these parts in rising order."""


def trained_weights(bounds: Sequence[int], parts: Iterable[StageWeights], sizes: Sizes) -> TrainedWeights:
    """Return where the trained weights are; `parts` are those between `bounds`."""
    readers: dict[WeightKey, tuple[int, list[int]]] = {}
    for number, part in enumerate(parts):
        for weight in {each.key: each for each in part.weights if each.trainable}.values():
            readers.setdefault(weight.key, (type_bytes(weight.type, sizes), []))[1].append(number)
    single = np.zeros(len(bounds) - 1)
    for size, numbers in readers.values():
        if len(numbers) == 1:
            single[numbers[0]] += size
    tied = tuple((size, tuple(numbers)) for size, numbers in readers.values() if len(numbers) > 1)
    return TrainedWeights(tuple(bounds), single, tied)


@dataclass(frozen=True, eq=False)
class CutGraph:
    """A graph cut into stages."""

    bounds: tuple[int, ...]
    """Stage k is nodes [bounds[k], bounds[k + 1])."""
    costs: tuple[StageCost, ...]
    crossing: dict[tuple[int, int], tuple[int, int]]
    """Bytes of one microbatch between stages, by (source, target): values forward, gradients backward."""
    stages: tuple[StageWeights, ...]
    sizes: Sizes

    @cached_property
    def trained(self) -> TrainedWeights:
        """Return where the trained weights are, by stage."""
        return trained_weights(self.bounds, self.stages, self.sizes)


class StageCosts:
    """Ways to cut one graph at one size."""

    def __init__(self) -> None:
        self._costs: dict[tuple[object, ...], StageCost] = {}
        self._known: dict[tuple[int, ...], CutGraph] = {}
        self._cutter: Cutter | None = None

    def cutter(self, graph: OpDag) -> Cutter:
        """Return what cuts the graph, which is the same in every call."""
        if self._cutter is None:
            self._cutter = Cutter(graph)
        return self._cutter

    def cut(self, graph: OpDag, sizes: Sizes, cuts: Sequence[int]) -> CutGraph:
        """Return the graph cut at node positions `cuts`. Raises GraphError for positions that cannot be cut at."""
        key = tuple(cuts)
        if key not in self._known:
            subdags = self.cutter(graph).cut(cuts)
            bounds = (0, *cuts, len(graph.nodes))
            self._known[key] = CutGraph(
                bounds,
                tuple(
                    self._of(graph, subdag, *ends, sizes)
                    for subdag, ends in zip(subdags, pairwise(bounds), strict=True)
                ),
                boundary_bytes(subdags, sizes),
                tuple(StageWeights(subdag.weights) for subdag in subdags),
                sizes,
            )
        return self._known[key]

    def _of(self, graph: OpDag, subdag: SubDag, start: int, stop: int, sizes: Sizes) -> StageCost:
        # What crosses a stage's ends depends on the other cuts, where a value passes over a stage.
        ends = tuple((each.value, each.gradient) for each in (*subdag.receives, *subdag.sends))
        key = (start, stop, len(subdag.receives), ends)
        if key not in self._costs:
            (self._costs[key],) = self.cutter(graph).costs(sizes).stages([subdag])
        return self._costs[key]
