"""The best single chains of machines found by the planner of swarms, for the planner of one pipeline.

That one's own search goes by machines alone where there are too many to try every set; here chains follow the links.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusionai.scheduling.swarm.candidates import ChainSolver, estimated, refined
from fusionai.scheduling.swarm.costing import make_work
from fusionai.scheduling.swarm.grouping import Grouping, fenced, groupings, scopes
from fusionai.scheduling.swarm.selection import NO_GUESS
from fusionai.scheduling.swarm.task import SwarmTask

_REFINED = 8
"""Groups whose chain is solved."""


@dataclass(frozen=True, slots=True)
class SingleChain:
    """Machines by number, in their order, and the node positions between their stages."""

    machines: tuple[int, ...]
    cuts: tuple[int, ...]
    step_s: float
    """As an ideal pipeline."""


def best_single_chains(task: SwarmTask) -> list[SingleChain]:
    """Return the best chains found, the fastest first; none if nothing fits.

    The owner's machine is not among theirs. Takes seconds for thousands of machines.
    """
    if not len(task.candidates):
        return []
    work = make_work(task)
    solver = ChainSolver(work)
    ways: dict[tuple[int, ...], Grouping] = {}
    for scope in scopes(work, fenced(work)):
        for grouping in groupings(work, scope):
            # The first of many groups is a chain of near machines, too.
            first = grouping.groups[0]
            ways.setdefault(tuple(first.tolist()), Grouping((first,)))
    # What fits nowhere when it is cut by speed may fit when it is cut for memory, and is solved last.
    guesses = [(estimated(work, way) or NO_GUESS, way) for way in ways.values()]
    guesses.sort(key=lambda pair: pair[0].step_s)
    found: list[SingleChain] = []
    for guess, way in guesses:
        if len(found) == _REFINED:
            break
        if (made := refined(solver, way, guess)) is not None:
            (chain,) = made.chains
            inner = tuple(work.positions[bound] for bound in chain.bounds[1:-1])
            found.append(SingleChain(chain.machines, inner, made.step_s))
    return sorted(found, key=lambda each: each.step_s)


def single_chains(task: SwarmTask, most: int) -> tuple[int, ...]:
    """Return the numbers of the machines of the best single chain found, in rising order; none if nothing fits.

    Those of the next best chains are added, to choose among, while there are no more than `most` together.
    """
    kept: set[int] = set()
    for chain in best_single_chains(task):
        if not kept or len(kept.union(chain.machines)) <= most:
            kept.update(chain.machines)
    return tuple(sorted(kept))
