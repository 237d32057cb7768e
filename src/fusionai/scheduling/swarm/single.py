"""The machines of a large pool that serve one pipeline best, for a planner whose tables grow with the machines."""

from __future__ import annotations

from fusionai.scheduling.swarm.candidates import ChainSolver, estimated, refined
from fusionai.scheduling.swarm.grouping import Grouping, fenced, groupings, scopes
from fusionai.scheduling.swarm.selection import Selection
from fusionai.scheduling.swarm.task import SwarmTask
from fusionai.scheduling.swarm.work import make_work

_REFINED = 8
"""Groups whose chain is solved."""


def single_chains(task: SwarmTask, most: int) -> tuple[int, ...]:
    """Return the numbers of the machines of the best single chain found, in rising order; none if nothing fits.

    Those of the next best chains are added, to choose among, while there are no more than `most` together. The owner's
    machine is not among them. Takes seconds for thousands of machines.
    """
    if not len(task.candidates):
        return ()
    work = make_work(task)
    solver = ChainSolver(work)
    ways: dict[tuple[int, ...], Grouping] = {}
    for scope in scopes(work, fenced(work)):
        for grouping in groupings(work, scope):
            # The first of many groups is a chain of near machines, too.
            first = grouping.groups[0]
            ways.setdefault(tuple(first.tolist()), Grouping((first,)))
    guesses = [(guess, way) for way in ways.values() if (guess := estimated(work, way)) is not None]
    guesses.sort(key=lambda pair: pair[0].step_s)
    found: list[Selection] = []
    for guess, way in guesses:
        if len(found) == _REFINED:
            break
        if (made := refined(solver, way, guess)) is not None:
            found.append(made)
    if not found:
        return ()
    kept: set[int] = set()
    for selection in sorted(found, key=lambda each: each.step_s):
        machines = {machine for chain in selection.chains for machine in chain.machines}
        if not kept or len(kept | machines) <= most:
            kept |= machines
    return tuple(sorted(kept))
