"""A grid of data-parallel pipelines with equal stages, its layout found by a genetic search, as in DT-FM.

Yuan et al., "Decentralized Training of Foundation Models in Heterogeneous Environments" (arXiv 2206.01288, section 3):
all N machines form `stages` groups of N / `stages`; those of a group hold the same stage and sum its gradients, and
each machine sends to one of the next group. A layout is a partition into equal groups. Its cost is communication alone:
the slowest group's sum of gradients, and the cheapest path through all groups, where between two groups machines are
matched so that the slowest pair is as fast as can be. The search is evolutionary: children of two partitions are
improved by swapping machines between groups.

What is ours: the crossover and the swaps are simpler than theirs; the shape of the grid, which they fix by hand, is the
best of all by the estimator's prediction; a path through many groups is a chain of nearest neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise, permutations

import numpy as np

from contenders.planners.one_chain import chain_run
from contenders.planners.proportional_splits import by_compute
from fusionai.errors import PlacementError
from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.chain import hops_of
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.step_bound import least_s
from fusionai.scheduling.search.worked_chains import evaluated_chains

_POPULATION = 16
_GENERATIONS = 120
_SWAPS = 4
"""Swaps tried of each child."""

_MOST_PERMUTED = 6
"""Groups up to which all paths through them are compared."""

_UNLINKED_S = 1e9
_SEED = 0

Layout = tuple[frozenset[int], ...]
"""Groups of places in the list of machines."""


def grid_search(task: TrainingProblem) -> Plan:
    """Return the best grid over all machines. Raises PlacementError when no grid fits their memory."""
    work = costs_in_segments(task)
    if (found := best_grid(work)) is None:
        raise PlacementError(
            f"no grid of equal stages over all {len(task.candidates)} machines fits their memory; use the planner, "
            "which cuts by memory and leaves machines out"
        )
    return found.plan(bound_step_s=least_s(work))


def best_grid(work: SegmentCosts) -> Evaluated | None:
    """Return the best outcome of all shapes of the grid; None when none fits. Needs no owner's stages."""
    count = len(work.problem.candidates)
    found = [
        made
        for stages in range(1, min(count, work.count) + 1)
        if count % stages == 0 and count // stages <= work.problem.microbatches
        if (made := _of_shape(work, stages)) is not None
    ]
    return min(found, key=lambda each: each.step_s, default=None)


def _of_shape(work: SegmentCosts, stages: int) -> Evaluated | None:
    machines, rounds = work.problem.candidates, work.problem.microbatches
    pipelines = len(machines) // stages
    if not _may_hold(work, stages):
        return None
    runs = []
    for row, places in enumerate(_Search(work, stages).best_rows()):
        order = machines[np.asarray(places)]
        share = rounds // pipelines + (row < rounds % pipelines)
        if (made := chain_run(work, order, by_compute(work, order), share)) is None:
            return None
        runs.append(made)
    return evaluated_chains(work, runs)


def _may_hold(work: SegmentCosts, stages: int) -> bool:
    """Whether every machine may hold the smallest stage: whatever the layout, some stage of each size is on it."""
    bounds = by_compute(work, work.problem.candidates[:stages])
    segments = work.segments
    need = segments.fixed_bytes_PP[bounds[:-1], bounds[1:]] + segments.flight_bytes_PP[bounds[:-1], bounds[1:]]
    return bool(need.min() <= work.budget_bytes[work.problem.candidates].min())


@dataclass(slots=True)
class _Search:
    """The genetic search over layouts of one shape. Places count the machines of `work.problem.candidates`."""

    work: SegmentCosts
    stages: int
    hop_s: Floats = field(init=False)
    """(M, M): of a typical cut, there and back."""
    byte_s: Floats = field(init=False)
    """(M, M): seconds for each byte of gradients, the worse direction."""
    delay_s: Floats = field(init=False)
    weight_bytes: float = field(init=False)
    """Of a stage."""
    pairs: dict[frozenset[frozenset[int]], float] = field(default_factory=dict)
    sums: dict[frozenset[int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        task, machines = self.work.problem, self.work.problem.candidates
        hop = np.minimum(hops_of(self.work, machines, 1.0)[:-1, :-1], _UNLINKED_S)
        self.hop_s = self.work.problem.microbatches * self.stages / len(machines) * np.maximum(hop, hop.T)
        rate = task.bandwidths(machines[:, None], machines[None])
        with np.errstate(divide="ignore"):
            self.byte_s = np.minimum(1 / np.minimum(rate, rate.T), _UNLINKED_S)
        self.delay_s = task.delays(machines[:, None], machines[None])
        self.weight_bytes = float(self.work.weights_P[-1]) / self.stages

    def best_rows(self) -> list[list[int]]:
        """Return the pipelines of the best layout found: places by stage."""
        count = len(self.hop_s)
        random = np.random.default_rng(_SEED)
        size = count // self.stages
        if 1 in (size, self.stages):
            # One pipeline's order is the path; machines alone have no stages to lay out.
            return self._rows(tuple(frozenset(part.tolist()) for part in np.arange(count).reshape(self.stages, size)))
        population = [self._layout(np.arange(count))]
        population += [self._layout(random.permutation(count)) for _ in range(_POPULATION - 1)]
        costs = [self._cost_s(each) for each in population]
        for _ in range(_GENERATIONS):
            one, other = (population[int(each)] for each in random.choice(_POPULATION, 2, replace=False))
            child = self._crossed(one, other, random)
            cost = self._cost_s(child)
            for _ in range(_SWAPS):
                swapped = self._swapped(child, random)
                if (after := self._cost_s(swapped)) < cost:
                    child, cost = swapped, after
            worst = int(np.argmax(costs))
            if cost < costs[worst] and child not in population:
                population[worst], costs[worst] = child, cost
        return self._rows(population[int(np.argmin(costs))])

    def _layout(self, order: Indices) -> Layout:
        return tuple(frozenset(part.tolist()) for part in order.reshape(self.stages, -1))

    def _crossed(self, one: Layout, other: Layout, random: np.random.Generator) -> Layout:
        """Return some groups of one parent; the other machines in groups as near to the second parent's as they go."""
        kept = [one[int(each)] for each in random.choice(self.stages, self.stages // 2, replace=False)]
        taken = frozenset[int]().union(*kept)
        rest = [place for group in other for place in sorted(group) if place not in taken]
        size = len(self.hop_s) // self.stages
        return (*kept, *(frozenset(rest[start : start + size]) for start in range(0, len(rest), size)))

    def _swapped(self, layout: Layout, random: np.random.Generator) -> Layout:
        first, second = (int(each) for each in random.choice(self.stages, 2, replace=False))
        one, other = (int(random.choice(sorted(layout[each]))) for each in (first, second))
        groups = list(layout)
        groups[first] = groups[first] - {one} | {other}
        groups[second] = groups[second] - {other} | {one}
        return tuple(groups)

    def _cost_s(self, layout: Layout) -> float:
        """Return the seconds of communication: the slowest sum of gradients, and the path through the groups."""
        path = self._path(layout)
        return max(self._sum_s(group) for group in layout) + sum(self._pair_s(*pair) for pair in pairwise(path))

    def _sum_s(self, group: frozenset[int]) -> float:
        """Return the seconds of summing a stage: each machine exchanges a part with every other (their eq. 1)."""
        if group not in self.sums:
            members = np.asarray(sorted(group))
            table = np.ix_(members, members)
            part_s = 2 * (self.delay_s[table] + self.byte_s[table] * self.weight_bytes / len(members))
            np.fill_diagonal(part_s, 0.0)
            self.sums[group] = float(part_s.sum(axis=1).max())
        return self.sums[group]

    def _pair_s(self, one: frozenset[int], other: frozenset[int]) -> float:
        """Return the slowest hop of the best matching of two groups."""
        key = frozenset((one, other))
        if key not in self.pairs:
            hop = self.hop_s[np.ix_(sorted(one), sorted(other))]
            match = _matched(hop)
            self.pairs[key] = float(hop[np.arange(len(match)), match].max())
        return self.pairs[key]

    def _path(self, layout: Layout) -> Layout:
        """Return the groups in the order of the cheapest path found."""
        if len(layout) <= _MOST_PERMUTED:
            halves = (each for each in permutations(range(len(layout))) if each[0] <= each[-1])
            best = min(halves, key=lambda way: sum(self._pair_s(layout[a], layout[b]) for a, b in pairwise(way)))
            return tuple(layout[index] for index in best)
        left = list(layout)
        path = [left.pop(0)]
        while left:
            # A group goes to the nearer end of the path.
            ends = [(self._pair_s(path[end], each), end, index) for end in (0, -1) for index, each in enumerate(left)]
            _, end, index = min(ends)
            path.insert(0 if end == 0 else len(path), left.pop(index))
        return tuple(path)

    def _rows(self, layout: Layout) -> list[list[int]]:
        path = self._path(layout)
        rows = [[place] for place in sorted(path[0])]
        for group in path[1:]:
            there = sorted(group)
            match = _matched(self.hop_s[np.ix_([row[-1] for row in rows], there)])
            for row, index in zip(rows, match, strict=True):
                row.append(there[index])
        return rows


def _matched(cost: Floats) -> list[int]:
    """Return, by row, the column of a perfect matching whose largest cost is least: thresholds by bisection."""
    values = np.unique(cost)
    low, high = 0, len(values) - 1
    best: list[int] | None = None
    while low < high or best is None:
        middle = (low + high) // 2
        if (found := _perfect(cost <= values[middle])) is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _perfect(allowed: np.ndarray) -> list[int] | None:
    """Return a perfect matching by augmenting paths (Kuhn), by row; None when there is none."""
    choices = [np.flatnonzero(row).tolist() for row in allowed]
    row_of = [-1] * len(allowed)

    def placed(row: int, seen: set[int]) -> bool:
        for column in choices[row]:
            if column not in seen:
                seen.add(column)
                if row_of[column] < 0 or placed(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    if not all(placed(row, set()) for row in range(len(allowed))):
        return None
    found = [0] * len(allowed)
    for column, row in enumerate(row_of):
        found[row] = column
    return found
