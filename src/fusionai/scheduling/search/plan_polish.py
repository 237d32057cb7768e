"""The last step of planning one pipeline: small changes, each worked through as a schedule."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

from fusionai.scheduling.evaluation import Evaluated, evaluated_one
from fusionai.scheduling.search.segment_costs import SegmentCosts

_WORK = 10_000
"""Operators that may be cut and costed again to improve a candidate: about half a second."""


def polished(costs: SegmentCosts, best: Evaluated, limit: int) -> Evaluated:
    """Change single cuts and pairs of neighbours while that shortens the schedule as worked through.

    The solver's ideal pipeline does not see how passes of unequal stages interlock; the plans around its own do.
    """
    left = _WORK // max(1, len(costs.problem.graph.nodes))
    improved = True
    while improved:
        improved = False
        for cuts, machines in _around(costs, best):
            if left <= 0:
                return best
            left -= 1
            tried = evaluated_one(costs.problem, cuts, machines, limit)
            if tried.possible and tried.step_s < best.step_s:
                best, improved = tried, True
                break
    return best


def _around(costs: SegmentCosts, best: Evaluated) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the pipelines around one: a cut one position before or after, or two neighbours swapped."""
    problem, positions = costs.problem, costs.positions
    place = {position: index for index, position in enumerate(positions)}
    choice = best.pipelines[0].choice
    machines = list(choice.machines)
    for which, by in product(range(len(choice.cuts)), (-1, 1)):
        cuts = list(choice.cuts)
        # The ends are the owner's pins, or those of the graph.
        if cuts[which] in (positions[0], positions[-1]):
            continue
        index = place[cuts[which]] + by
        if 0 < index < len(positions) - 1 and positions[index] not in cuts:
            cuts[which] = positions[index]
            yield cuts, machines
    first, stop = int(problem.front > 0), len(machines) - int(problem.back < len(problem.graph.nodes))
    for which in range(first, stop - 1):
        swapped = [*machines[:which], machines[which + 1], machines[which], *machines[which + 2 :]]
        if all(problem.reachable(one, other) for one, other in pairwise(swapped)):
            yield list(choice.cuts), swapped
