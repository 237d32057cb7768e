"""The best single pipeline in which every machine takes part: the setting in which OP-Fence was published.

FusionLLM (arXiv 2410.12707) trains over all machines as one pipeline. The planner would leave machines out
and run several pipelines; this is for comparing orders and cuts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, permutations

import numpy as np

from fusionai.scheduling.evaluation import Evaluated
from fusionai.scheduling.links import Indices
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier
from fusionai.scheduling.search.chain import hops_of, measured, ordered, proportional
from fusionai.scheduling.search.chain_polish import polished
from fusionai.scheduling.search.grouping import fenced
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain

_TOLERANCE = 5e-3

_LIMITS = (1 << 30, 8, 3, 1)
"""Microbatches in flight that cuts leave room for."""

_HELD = (1 << 30, 8)
"""Limits on microbatches in flight with which schedules are worked through."""

_MOST_CLUSTERS = 7
"""Clusters up to which all their orders are compared."""


def everyone_in_one_chain(work: SegmentCosts) -> Evaluated | None:
    """Return the fastest pipeline found that all candidates take part in; None if none fits. Needs no owner's stages.

    A few orders along the fence are tried; cuts are the best ones for an ideal pipeline of each, and in
    proportion to speed. All are polished and their schedules worked through.
    """
    machines, rounds = work.problem.candidates, work.problem.microbatches
    if len(machines) > work.count:
        return None
    best: Evaluated | None = None
    for order in _orders(work, machines):
        line = work.line(order, rounds)
        quick = proportional(work, [order], 1.0, rounds)[0].bounds
        solved = (_cuts(replace(line, in_flight_limit=limit)) for limit in _LIMITS)
        starts = [quick, *(found.bounds for found in solved if found is not None)]
        for start in dict.fromkeys(starts):
            chain = polished(work, measured(work, order, np.asarray(start), 1.0, rounds), rounds)
            for held in _HELD:
                made = worked_chain(work, replace(chain, in_flight_limit=min(rounds, held)), rounds)
                if made.possible:
                    whole = evaluated_chains(work, [made])
                    best = whole if best is None or whole.step_s < best.step_s else best
    return best


def _cuts(line: Line) -> Split | None:
    everyone = tuple(range(line.devices))
    found = frontier(line, lambda limit_s: best_of_order(line, everyone, limit_s), _TOLERANCE)
    return min(found, key=lambda each: each.objective_s(line.microbatches), default=None)


def _orders(work: SegmentCosts, machines: Indices) -> Iterator[Indices]:
    """Yield orders: by hops alone, along the fence, and those with machines of most memory first in each cluster."""
    fences = [_least_crossing(work, fenced(work), closed) for closed in (False, True)]
    ways = [ordered(work, machines)]
    for fence in fences:
        by_memory = [each[np.argsort(-work.budget_bytes[each], kind="stable")] for each in fence]
        ways += [np.concatenate(each) for each in (fence, fence[::-1], by_memory, by_memory[::-1])]
    yield from {order.tobytes(): order for order in ways}.values()


def _least_crossing(work: SegmentCosts, fence: list[Indices], closed: bool) -> list[Indices]:
    """Return clusters in the order whose links hold a step up least: each delays once, the slowest every microbatch.

    `closed`: the chain ends in the cluster where it begins, so that tied weights of both ends are summed within it.
    """
    if not 1 < len(fence) <= _MOST_CLUSTERS:
        return fence
    hop = hops_of(work, np.asarray([each[0] for each in fence]), 1.0)
    rounds = work.problem.microbatches

    def held_up_s(order: tuple[int, ...]) -> float:
        path = (*order, order[0]) if closed else order
        crossed = [max(hop[one, other], hop[other, one]) for one, other in pairwise(path)]
        return float(sum(crossed) + (rounds - 1) * max(crossed))

    ways = (way for way in permutations(range(len(fence))) if not closed or len(fence[way[0]]) > 1)
    found = [fence[index] for index in min(ways, key=held_up_s, default=range(len(fence)))]
    return [found[0][:-1], *found[1:], found[0][-1:]] if closed and len(found[0]) > 1 else found
