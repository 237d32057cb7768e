"""The last step of planning: small changes to a plan, each worked through as a schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product

from fusionai.scheduling.evaluation import Evaluated, Task, evaluate
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.segments import Segments, reachable

_WORK = 10_000
"""Operators that may be cut and costed again to improve a candidate: about half a second."""


def polished(task: Task, segments: Segments, best: Evaluated, limit: int) -> Evaluated:
    """Change single cuts and pairs of neighbours while that shortens the schedule as worked through.

    The solver's ideal pipeline does not see how passes of unequal stages interlock; the plans around its own do.
    """
    left = _WORK // max(1, len(task.graph.nodes))
    improved = True
    while improved:
        improved = False
        for cuts, peers in _around(task, segments, best.plan):
            if left <= 0:
                return best
            left -= 1
            tried = evaluate(task, cuts, peers, limit)
            if not tried.overloaded(task) and tried.plan.predicted_step_s < best.plan.predicted_step_s:
                best, improved = tried, True
                break
    return best


def _around(task: Task, segments: Segments, plan: Plan) -> Iterator[tuple[list[int], list[str]]]:
    """Yield cuts and peers of the plans around one: a cut one position before or after, or two neighbours swapped."""
    place = {position: index for index, position in enumerate(segments.positions)}
    peers = [stage.peer for stage in plan.stages]
    for which, by in product(range(len(plan.cuts)), (-1, 1)):
        cuts = list(plan.cuts)
        # The ends are the owner's pins, or those of the graph.
        if cuts[which] in (segments.positions[0], segments.positions[-1]):
            continue
        index = place[cuts[which]] + by
        if 0 < index < len(segments.positions) - 1 and segments.positions[index] not in cuts:
            cuts[which] = segments.positions[index]
            yield cuts, peers
    first, stop = int(task.front > 0), len(peers) - int(task.back < len(task.graph.nodes))
    for which in range(first, stop - 1):
        swapped = [*peers[:which], peers[which + 1], peers[which], *peers[which + 2 :]]
        if _in_a_row(task, swapped):
            yield list(plan.cuts), swapped


def _in_a_row(task: Task, peers: Sequence[str]) -> bool:
    """Whether each machine can be linked with the next."""
    return all(reachable(task.member(one), task.member(other)) for one, other in pairwise(peers))
