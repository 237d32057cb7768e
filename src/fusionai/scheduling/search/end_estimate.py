"""The end of a step of chains that are only compared: an estimate that is soon reckoned, and the exact seconds.

Array suffixes: A = segments, R = pipelines, N = machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fusionai.scheduling.end_of_step import end_of_step, gradient_sums, rates_of, ring_of, summed_s
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.segment_costs import SegmentCosts


def holders(costs: SegmentCosts, chains: Sequence[Chain]) -> Indices:
    """Return (R, A): the machine that holds each segment in each pipeline; the owner's segments are among them."""
    owner = costs.problem.owner_index if costs.problem.owner_index is not None else -1
    after = costs.segments.outer_after
    table = np.full((len(chains), costs.before + costs.count + after), owner, dtype=np.int64)
    machines = [machine for chain in chains for machine in chain.machines]
    lengths = [stop - start for chain in chains for start, stop in pairwise(chain.bounds)]
    table[:, costs.before : costs.before + costs.count] = np.repeat(machines, lengths).reshape(len(chains), costs.count)
    return table


def end_s(costs: SegmentCosts, chains: Sequence[Chain]) -> float:
    """Return the seconds between the last backward and the next step's first forward, as the evaluator has them."""
    return end_of_step(costs.problem, costs.trained, holders(costs, chains)).seconds


def estimated_sum_s(costs: SegmentCosts, holders_RA: Indices) -> float:
    """Return about the seconds in which all gradients are summed, infinite when neighbours cannot be linked.

    For one pipeline that is exactly what `end_of_step.summed_s` says. For several it is what the busiest machine sums,
    with the longest latency of its rings counted once and no sum waiting for another one. So it is at most
    `summed_s`, but for rings whose slowest link is not the farthest one too: there it may be above it by the
    difference in latency, times the rounds of a ring.
    """
    problem = costs.problem
    if len(holders_RA) == 1:
        return summed_s(gradient_sums(costs.trained, holders_RA), rates_of(problem))
    bandwidth_A, delay_A, count_A = _rings(costs, holders_RA)
    seconds_N, delay_N = np.zeros(len(problem.machines)), np.zeros(len(problem.machines))
    single_A = costs.single_bytes
    for size, parts in costs.tied:
        ring = np.asarray(ring_of(holders_RA, parts))
        if (count := len(ring)) > 1:
            after = np.roll(ring, -1)
            rate = float(problem.bandwidths(ring, after).min())
            if rate == 0:
                return float("inf")
            seconds_N[ring] += 2 * (count - 1) / count * size / rate
            delay_N[ring] = np.maximum(delay_N[ring], 2 * (count - 1) * float(problem.delays(ring, after).max()))
    used = (single_A > 0) & (count_A > 1)
    if (bandwidth_A[used] == 0).any():
        return float("inf")
    rounds_A = 2 * (count_A[used] - 1)
    held_RA = holders_RA[:, used]
    shares_A = rounds_A / count_A[used] * single_A[used] / bandwidth_A[used]
    np.add.at(seconds_N, held_RA, np.broadcast_to(shares_A, held_RA.shape))
    np.maximum.at(delay_N, held_RA, np.broadcast_to(rounds_A * delay_A[used], held_RA.shape))
    return float((seconds_N + delay_N).max())


def _rings(costs: SegmentCosts, holders_RA: Indices) -> tuple[Floats, Floats, Indices]:
    """Return, by segment, the least bandwidth and the largest latency around its ring, and the number of holders."""
    pipelines, parts = holders_RA.shape
    count_A = np.full(parts, pipelines, dtype=np.int64)
    if costs.before:
        count_A[0] = 1
    if costs.segments.outer_after:
        count_A[-1] = 1
    after_RA = np.roll(holders_RA, -1, axis=0)
    return (
        costs.problem.bandwidths(holders_RA, after_RA).min(axis=0),
        costs.problem.delays(holders_RA, after_RA).max(axis=0),
        count_A,
    )
