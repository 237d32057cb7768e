"""The best single pipeline in which every machine takes part: the setting in which OP-Fence was published.

FusionLLM (arXiv 2410.12707) trains over all machines as one pipeline. The planner of swarms would leave machines out
and run several pipelines; this is for comparing orders and cuts alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import numpy as np

from fusionai.scheduling.links import Indices
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier
from fusionai.scheduling.swarm.chain import hops_of, measured, ordered
from fusionai.scheduling.swarm.grouping import fenced
from fusionai.scheduling.swarm.outcome import Outcome, outcome
from fusionai.scheduling.swarm.running import run
from fusionai.scheduling.swarm.work import Work

_TOLERANCE = 5e-3

_LIMITS = (1 << 30, 8, 3, 1)
"""Microbatches in flight that cuts leave room for."""

_MOST_CLUSTERS = 7
"""Clusters up to which all their orders are compared."""


def everyone_in_one_chain(work: Work) -> Outcome | None:
    """Return the fastest pipeline found that all candidates take part in; None if none fits. Needs no owner's stages.

    A few orders along the fence are tried; cuts are the best ones for an ideal pipeline of each, and their schedules
    are worked through.
    """
    machines, rounds = work.task.candidates, work.task.microbatches
    if len(machines) > work.count:
        return None
    best: Outcome | None = None
    for order in _orders(work, machines):
        line = work.line(order, rounds)
        tried: set[tuple[int, ...]] = set()
        for limit in _LIMITS:
            found = _cuts(replace(line, in_flight_limit=limit))
            if found is None or found.bounds in tried:
                continue
            tried.add(found.bounds)
            for held in dict.fromkeys((rounds, min(rounds, limit))):
                made = run(work, measured(work, order, np.asarray(found.bounds), 1.0, held), rounds)
                if made.possible:
                    whole = outcome(work, [made])
                    best = whole if best is None or whole.step_s < best.step_s else best
    return best


def _cuts(line: Line) -> Split | None:
    everyone = tuple(range(line.devices))
    found = frontier(line, lambda limit_s: best_of_order(line, everyone, limit_s), _TOLERANCE)
    return min(found, key=lambda each: each.objective_s(line.microbatches), default=None)


def _orders(work: Work, machines: Indices) -> Iterator[Indices]:
    """Yield orders: by hops alone, along the fence, and those with machines of most memory first in each cluster."""
    fence = _least_crossing(work, fenced(work))
    by_memory = [each[np.argsort(-work.budget_bytes[each], kind="stable")] for each in fence]
    ways = [
        ordered(work, machines),
        np.concatenate(fence),
        np.concatenate(fence)[::-1],
        np.concatenate(by_memory),
        np.concatenate(by_memory[::-1]),
    ]
    yield from {order.tobytes(): order for order in ways}.values()


def _least_crossing(work: Work, fence: list[Indices]) -> list[Indices]:
    """Return clusters in the order whose links hold a step up least: each delays once, the slowest every microbatch."""
    if not 2 < len(fence) <= _MOST_CLUSTERS:
        return fence
    hop = hops_of(work, np.asarray([each[0] for each in fence]), 1.0)
    rounds = work.task.microbatches

    def held_up_s(order: tuple[int, ...]) -> float:
        crossed = [max(hop[one, other], hop[other, one]) for one, other in zip(order, order[1:], strict=False)]
        return float(sum(crossed) + (rounds - 1) * max(crossed))

    return [fence[index] for index in min(permutations(range(len(fence))), key=held_up_s)]
