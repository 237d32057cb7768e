"""The best single chains of machines along their links.

The solver's own search goes by machines alone where there are too many to try every set; here chains follow the links.
"""

from __future__ import annotations

from fusionai.scheduling.links import Indices
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.chain_solver import ChainSolver, estimated, refined
from fusionai.scheduling.search.grouping import Grouping, fenced, groupings, scopes
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.segment_tables import costs_in_segments
from fusionai.scheduling.search.selection import UNESTIMATED

_REFINED = 8
"""Groups whose chain is solved."""


def best_single_chains(costs: SegmentCosts, machines: Indices) -> list[Chain]:
    """Return the best chains found of `machines`, about the fastest step first; none if nothing fits.

    The owner's machine is not among theirs. Takes seconds for thousands of machines.
    """
    solver = ChainSolver(costs)
    ways: dict[tuple[int, ...], Grouping] = {}
    for scope in scopes(costs, fenced(costs, machines=machines)):
        for grouping in groupings(costs, scope):
            # The first of many groups is a chain of near machines, too.
            first = grouping.groups[0]
            ways.setdefault(tuple(first.tolist()), Grouping((first,)))
    # What fits nowhere when it is cut by speed may fit when it is cut for memory, and is solved last.
    guesses = [(estimated(costs, way) or UNESTIMATED, way) for way in ways.values()]
    guesses.sort(key=lambda pair: pair[0].step_s)
    found: list[tuple[float, Chain]] = []
    for guess, way in guesses:
        if len(found) == _REFINED:
            break
        if (made := refined(solver, way, guess)) is not None:
            found.append((made.step_s, made.chains[0]))
    return [chain for _, chain in sorted(found, key=lambda pair: pair[0])]


def machines_of_single_chains(problem: TrainingProblem, most: int) -> tuple[int, ...]:
    """Return the numbers of the machines of the best single chain found, in rising order; none if nothing fits.

    Those of the next best chains are added, to choose among, while there are no more than `most` together.
    """
    if not len(problem.candidates):
        return ()
    kept: set[int] = set()
    for chain in best_single_chains(costs_in_segments(problem), problem.candidates):
        if not kept or len(kept.union(chain.machines)) <= most:
            kept.update(chain.machines)
    return tuple(sorted(kept))
