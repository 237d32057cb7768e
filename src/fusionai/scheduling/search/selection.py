"""Which of many chains run: each brings speed, and each makes the sum at the end of a step slower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.end_of_step import committed_s
from fusionai.scheduling.links import Indices
from fusionai.scheduling.search.chain import Chain, measured
from fusionai.scheduling.search.end_estimate import estimated_sum_s, holders
from fusionai.scheduling.search.rings import rings
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.search.shares import shared_out, slowest_s

_GROWTH = 1.4
"""From one number of pipelines tried to the next."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Chains that run, their shares of the microbatches, and the step they make as ideal pipelines."""

    chains: tuple[Chain, ...]
    shares: tuple[int, ...]
    step_s: float
    pipelines_s: float = math.inf
    """Seconds of the step that the slowest pipeline takes."""
    sum_s_per_byte: float = 0.0
    """Seconds of summing gradients at the end of the step for each byte that the machine with most weights holds."""


UNESTIMATED = Selection((), (), math.inf)
"""Stands for a grouping without an estimate: cut in proportion to speed, its chains fit nowhere. It sorts last."""


def weighed(costs: SegmentCosts, chains: Sequence[Chain], below_s: float = math.inf) -> Selection | None:
    """Share a step's microbatches out over chains; who gets none does not run.

    None if rings cannot be linked, or the step takes `below_s` or longer.
    """
    if not chains:
        return None
    if costs.problem.pinned:
        # The fewer pipelines, the more of the owner's machine each has.
        chains = [
            measured(costs, np.asarray(each.machines), np.asarray(each.bounds), len(chains), each.in_flight_limit)
            for each in chains
        ]
    latency = np.asarray([each.latency_s for each in chains])
    period = np.asarray([each.period_s for each in chains])
    possible = np.isfinite(latency) & np.isfinite(period)
    if not possible.any():
        return None
    kept = [each for each, usable in zip(chains, possible, strict=True) if usable]
    latency, period = latency[possible], period[possible]
    shares = shared_out(latency, period, costs.problem.microbatches)
    last_s = slowest_s(latency, period, shares)
    if last_s >= below_s:
        return None
    running = [each for each, share in zip(kept, shares, strict=True) if share > 0]
    table = holders(costs, running)
    summing_s = estimated_sum_s(costs, table)
    if np.isinf(summing_s) and len(running) > 1:
        running, shares = _interleaved(costs, kept, shares)
        table = holders(costs, running)
        summing_s = estimated_sum_s(costs, table)
    if np.isinf(summing_s):
        return None
    step_s = last_s + summing_s + committed_s(costs.problem, costs.trained, table)
    if step_s >= below_s:
        return None
    most_bytes = max(costs.most_weight_bytes(each.bounds) for each in running)
    per_byte = summing_s / most_bytes if most_bytes else 0.0
    return Selection(tuple(running), tuple(int(share) for share in shares if share > 0), step_s, last_s, per_byte)


def _interleaved(costs: SegmentCosts, chains: Sequence[Chain], shares: Indices) -> tuple[list[Chain], Indices]:
    """Return the chains that run, those of undialable machines between the others, so that rings can be linked.

    The shares come back in the new order, without zeros.
    """
    pairs = [(chain, int(share)) for chain, share in zip(chains, shares, strict=True) if share > 0]
    open_ones = [pair for pair in pairs if all(costs.problem.dialable[list(pair[0].machines)])]
    closed = [pair for pair in pairs if not all(costs.problem.dialable[list(pair[0].machines)])]
    mixed = []
    while open_ones or closed:
        if closed:
            mixed.append(closed.pop(0))
        if open_ones:
            mixed.append(open_ones.pop(0))
    return [chain for chain, _ in mixed], np.asarray([share for _, share in mixed])


def selected(
    costs: SegmentCosts, chains: Sequence[Chain], *, growth: float = _GROWTH, below_s: float = math.inf
) -> Selection | None:
    """Return the best of several selections: the fastest few chains, or those best linked with them, or all.

    Numbers of chains rise by `growth`; then those next to the best are tried. None if no step is below `below_s`.
    """
    usable = [each for each in chains if np.isfinite(each.period_s) and np.isfinite(each.latency_s)]
    if not usable:
        return None
    microbatches = costs.problem.microbatches
    by_speed = sorted(range(len(usable)), key=lambda index: usable[index].seconds(max(1, microbatches)))
    heads = np.asarray([each.machines[0] for each in usable])
    best_heads = heads[by_speed[:4]]
    near = costs.problem.bandwidths(heads[:, None], best_heads[None])
    near = np.where(np.isinf(near), 0.0, near).max(axis=1) if len(usable) > 1 else np.zeros(len(usable))
    rank = {index: place for place, index in enumerate(by_speed)}
    by_link = sorted(range(len(usable)), key=lambda index: (-round(float(np.log2(near[index] + 1)), 1), rank[index]))
    best: Selection | None = None
    tried: dict[tuple[int, ...], None] = {}

    def weigh(order: Sequence[int], count: int) -> bool:
        nonlocal best
        members = tuple(sorted(order[:count]))
        if not 0 < count <= most or members in tried:
            return False
        tried[members] = None
        found = weighed(costs, [usable[index] for index in members], below_s if best is None else best.step_s)
        best = found or best
        return found is not None

    most = min(len(usable), microbatches)
    for order in (by_speed, by_link):
        counts = [count for count in _counts(most, growth) if weigh(order, count)]
        if counts and growth == _GROWTH:
            for step in (1, -1):
                count = counts[-1] + step
                while weigh(order, count):
                    count += step
    if len(usable) > 2 and microbatches > 1:
        for ring in rings(costs, usable):
            best = weighed(costs, [usable[index] for index in ring], below_s if best is None else best.step_s) or best
    return best


def _counts(most: int, growth: float) -> list[int]:
    found, count = [], 1.0
    while count < most:
        found.append(round(count))
        count = max(count + 1, count * growth)
    return [*found, most]
