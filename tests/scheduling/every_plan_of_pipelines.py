"""Every plan of a few machines, gone through: what the planner's plans of small pools are held against."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations

import numpy as np

from fusionai.scheduling.search.chain import Chain, measured
from fusionai.scheduling.search.end_estimate import end_s
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain

_SAFE = 0.97
"""Factor of lower bounds: sums over segments count what stages would compute again once for each segment."""


def chains_of(work: SegmentCosts, most_machines: int) -> Iterator[Chain]:
    """Yield every pipeline of up to so many of the machines: all sets, orders and cuts."""
    machines = [int(each) for each in work.problem.candidates]
    for stages in range(1, min(most_machines, work.count) + 1):
        for order in permutations(machines, stages):
            for inner in combinations(range(1, work.count), stages - 1):
                yield Chain(order, (0, *inner, work.count), 0.0, 0.0, work.problem.microbatches)


def best_single_step_s(work: SegmentCosts) -> float:
    """Return the step of the fastest single pipeline."""
    rounds = work.problem.microbatches
    return min(
        evaluated_chains(work, [worked_chain(work, chain, rounds)]).step_s
        for chain in chains_of(work, len(work.problem.candidates))
    )


def best_step_of_several_s(work: SegmentCosts, known_s: float) -> float:
    """Return the step of the fastest plan of two or more pipelines, all shares included; infinite if over `known_s`.

    A pipeline counts only while it is done before `known_s`: which cuts down what is worked through, and loses nothing.
    """
    rounds = work.problem.microbatches
    machines = len(work.problem.candidates)
    usable: list[tuple[Chain, list[float]]] = []
    for chain in chains_of(work, machines - 1):
        made = _seconds(work, chain, known_s, rounds - 1)
        if made:
            usable.append((chain, made))
    best = known_s
    for found in _disjoint(usable, frozenset(), 0, min(machines, rounds)):
        if len(found) < 2 or sum(len(seconds) for _, seconds in found) < rounds:
            continue
        slowest = _shared_s([seconds for _, seconds in found], rounds)
        if slowest < best:
            first, *others = [chain for chain, _ in found]
            # Gradients go around in the order of the pipelines.
            rings = ([first, *rest] for rest in permutations(others))
            best = min(best, slowest + min(end_s(work, ring) for ring in rings))
    return best if best < known_s else float("inf")


def _seconds(work: SegmentCosts, chain: Chain, known_s: float, most: int) -> list[float]:
    """Return the seconds of 1, 2, ... microbatches, as long as they are below `known_s`."""
    ideal = measured(work, np.asarray(chain.machines), np.asarray(chain.bounds), 1.0, most)
    found: list[float] = []
    for count in range(1, most + 1):
        if _SAFE * count * ideal.period_s >= known_s:
            break
        if (seconds := worked_chain(work, chain, count).times.makespan_s) >= known_s:
            break
        found.append(seconds)
    return found


def _disjoint(
    usable: list[tuple[Chain, list[float]]], taken: frozenset[int], start: int, most: int
) -> Iterator[list[tuple[Chain, list[float]]]]:
    """Yield every choice of up to `most` pipelines without a common machine."""
    yield []
    if not most:
        return
    for index in range(start, len(usable)):
        chain, _ = usable[index]
        if taken.isdisjoint(chain.machines):
            for rest in _disjoint(usable, taken | frozenset(chain.machines), index + 1, most - 1):
                yield [usable[index], *rest]


def _shared_s(seconds: list[list[float]], rounds: int) -> float:
    """Return the least time in which pipelines with these seconds by count do all microbatches, each at least one."""
    counts = [1] * len(seconds)
    for _ in range(rounds - len(seconds)):
        further = [
            each[count] if count < len(each) else float("inf") for each, count in zip(seconds, counts, strict=True)
        ]
        counts[int(np.argmin(further))] += 1
    return max(each[count - 1] for each, count in zip(seconds, counts, strict=True))
