"""The best single pipeline of a few machines, by every order and every cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations
from math import comb, perm

import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.partition import EXACT_WORK, split
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.worked_chains import evaluated_chains, worked_chain

_MOST_WAYS = 60_000
"""Ways to order and cut that are gone through; each has a bound, and few need their schedule worked through."""

_MOST_WORKED_THROUGH = 1500

_MOST_MACHINES = 12

_SAFE = 0.97
"""Factor of lower bounds: sums over segments count what stages would compute again once for each segment."""


def best_small_chains(costs: SegmentCosts, known_s: float) -> list[Chain]:
    """Return the best single pipelines where there are few enough machines to look at all; else nothing.

    Up to some nine machines the partition solver is exact for an ideal pipeline. For the fewest, all orders and cuts
    are gone through in the order of a lower bound on their schedules, until no bound is below the best schedule, or
    below `known_s`, the step that some other plan makes.
    """
    machines = costs.problem.candidates
    microbatches = costs.problem.microbatches
    size = len(machines)
    if size > _MOST_MACHINES or 2.0**size * size / 2 * (costs.count + 1) ** 2 > EXACT_WORK / 4:
        return []
    line = costs.line(machines, microbatches)
    found = [
        Chain(
            tuple(int(machines[device]) for device in each.devices),
            each.bounds,
            each.latency_s,
            each.bottleneck_s,
            microbatches,
        )
        for each in split(line, list(range(1, size + 1)))
    ]
    known_s = min([known_s, *(_step_s(costs, chain) for chain in found)])
    if (better := best_of_all(costs, known_s)) is not None:
        found.append(better)
    return found


def _step_s(costs: SegmentCosts, chain: Chain) -> float:
    return evaluated_chains(costs, [worked_chain(costs, chain, costs.problem.microbatches)]).step_s


def best_of_all(costs: SegmentCosts, known_s: float, counts: Sequence[int] | None = None) -> Chain | None:
    """Return the chain whose schedule is fastest of all, if faster than `known_s`; None where there are too many.

    `counts`: the numbers of machines that a chain may have; None: any.
    """
    machines = [int(each) for each in costs.problem.candidates]
    counts = [count for count in range(1, min(len(machines), costs.count) + 1) if counts is None or count in counts]
    ways = sum(perm(len(machines), count) * comb(costs.count - 1, count - 1) for count in counts)
    if ways > _MOST_WAYS:
        return None
    bounded: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    for count in counts:
        inner = np.asarray(list(combinations(range(1, costs.count), count - 1)), dtype=np.int64).reshape(
            comb(costs.count - 1, count - 1), count - 1
        )
        ends = np.full((len(inner), 1), costs.count)
        bounds_WB = np.concatenate([np.zeros_like(ends), inner, ends], axis=1)
        for order in permutations(machines, count):
            least_s = _SAFE * _least_s(costs, np.asarray(order), bounds_WB)
            for way in np.flatnonzero(least_s < known_s):
                bounded.append((float(least_s[way]), order, tuple(bounds_WB[way].tolist())))
    bounded.sort()
    best: Chain | None = None
    for lowest_s, order, bounds in bounded[:_MOST_WORKED_THROUGH]:
        if lowest_s >= known_s:
            break
        chain = Chain(order, bounds, 0.0, 0.0, costs.problem.microbatches)
        if (step_s := _step_s(costs, chain)) < known_s:
            best, known_s = chain, step_s
    return best


def _near_bytes(costs: SegmentCosts) -> tuple[Floats, Floats]:
    """Return, by position, the bytes that every cut there sends to the next stage: not those that skip segments."""
    far = {each.value for each in costs.crossings if each.taker != each.maker + 1}
    forward, gradient = np.zeros(costs.count + 1), np.zeros(costs.count + 1)
    for each in costs.crossings:
        if each.value not in far and 0 <= (position := each.taker - costs.before) <= costs.count:
            forward[position] += each.size_bytes
            gradient[position] += each.size_bytes if each.gradient else 0
    return forward, gradient


def _least_s(costs: SegmentCosts, order: Indices, bounds_WB: Indices) -> Floats:
    """Return, by way to cut, a time that no 1F1B schedule goes below.

    A machine or link cannot begin before the first microbatch has come to it, nor be done before the last one has gone
    back to the first stage; in between it is busy with all of them.
    """
    problem, rounds = costs.problem, costs.problem.microbatches
    stages = len(order)
    additive = costs.additive_N[order]

    def passes(work_NS: Floats, starts_NS: Floats) -> Floats:
        seconds = []
        for stage, machine in enumerate(order):
            sums = [np.concatenate([[0.0], np.cumsum(each[machine])]) for each in (work_NS, starts_NS)]
            own = [each[bounds_WB[:, stage + 1]] - each[bounds_WB[:, stage]] for each in sums]
            seconds.append(own[0] + own[1] if additive[stage] else np.maximum(own[0], own[1]))
        return np.stack(seconds)

    forward, backward = (
        passes(costs.forward_NS, costs.forward_starts_NS),
        passes(costs.backward_NS, costs.backward_starts_NS),
    )
    hidden = np.minimum(passes(costs.deferred_NS, np.zeros_like(costs.deferred_NS)), backward)
    here, there = order[:-1], order[1:]
    out = problem.bandwidths(here, there)[:, None]
    home = problem.bandwidths(there, here)[:, None]
    delay = problem.delays(here, there)[:, None]
    places = bounds_WB[:, 1:-1].T
    near_forward_P, near_gradient_P = _near_bytes(costs)
    with np.errstate(divide="ignore", invalid="ignore"):
        sent = np.nan_to_num(near_forward_P[places] / out, nan=0.0, posinf=np.inf)
        returned = np.nan_to_num(near_gradient_P[places] / home, nan=0.0, posinf=np.inf)
    least = np.zeros(len(bounds_WB))
    before, after = np.zeros(len(bounds_WB)), np.zeros(len(bounds_WB))
    for stage in range(stages):
        least = np.maximum(least, before + rounds * (forward[stage] + backward[stage]) + np.maximum(after, 0.0))
        if stage + 1 < stages:
            ready = before + forward[stage]
            least = np.maximum(least, ready + rounds * np.maximum(sent[stage], returned[stage]))
            before = ready + sent[stage] + delay[stage]
            after = after + backward[stage] + returned[stage] + delay[stage] - hidden[stage + 1]
    return least
