"""The end of a step: gradients are summed over pipelines, every machine reports and updates its weights.

Each weight's gradients go once around a ring of its holders, one in each pipeline. A ring all-reduce of b bytes over R
holders takes 2 (R - 1) rounds of b / R bytes (Patarasuk and Yuan 2009), each as long as the slowest link of the ring
needs. A machine is in one sum at a time (`scheduling.sums_in_turn`). While plans are searched, what the busiest machine
sums is taken for all of it, latency counted once: no order of the sums takes less.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.sums_in_turn import begin_s
from fusionai.scheduling.swarm.chain import Chain
from fusionai.scheduling.swarm.work import Work


def holders(work: Work, chains: Sequence[Chain]) -> Indices:
    """Return (R, A): the machine that holds segment a in pipeline r; the owner's segments are among them."""
    owner = work.task.owner_index if work.task.owner_index is not None else -1
    after = work.segments.outer_after
    table = np.full((len(chains), work.before + work.count + after), owner, dtype=np.int64)
    machines = [machine for chain in chains for machine in chain.machines]
    lengths = [stop - start for chain in chains for start, stop in pairwise(chain.bounds)]
    table[:, work.before : work.before + work.count] = np.repeat(machines, lengths).reshape(len(chains), work.count)
    return table


def sum_s(work: Work, holders_RA: Indices) -> float:
    """Return the seconds that the busiest machine sums gradients, infinite when neighbours cannot be linked.

    A weight that two stages of a pipeline hold (tied embeddings) has both in its ring.
    """
    task = work.task
    bandwidth_A, delay_A, count_A = _rings(work, holders_RA)
    seconds_N, delay_N = np.zeros(len(task.machines)), np.zeros(len(task.machines))
    single_A = work.single_bytes
    for size, parts in work.tied:
        ring = _tied_ring(holders_RA, parts)
        if (count := len(ring)) > 1:
            after = np.roll(ring, -1)
            rate = float(task.bandwidths(ring, after).min())
            if rate == 0:
                return float("inf")
            seconds_N[ring] += 2 * (count - 1) / count * size / rate
            delay_N[ring] = np.maximum(delay_N[ring], 2 * (count - 1) * float(task.delays(ring, after).max()))
    used = (single_A > 0) & (count_A > 1)
    if (bandwidth_A[used] == 0).any():
        return float("inf")
    rounds_A = 2 * (count_A[used] - 1)
    held_RA = holders_RA[:, used]
    shares_A = rounds_A / count_A[used] * single_A[used] / bandwidth_A[used]
    np.add.at(seconds_N, held_RA, np.broadcast_to(shares_A, held_RA.shape))
    np.maximum.at(delay_N, held_RA, np.broadcast_to(rounds_A * delay_A[used], held_RA.shape))
    return float((seconds_N + delay_N).max())


def _rings(work: Work, holders_RA: Indices) -> tuple[Floats, Floats, Indices]:
    """Return, by segment, the least bandwidth and the largest latency around its ring, and the number of holders."""
    pipelines, parts = holders_RA.shape
    count_A = np.full(parts, pipelines, dtype=np.int64)
    if work.before:
        count_A[0] = 1
    if work.segments.outer_after:
        count_A[-1] = 1
    if pipelines == 1:
        return np.full(parts, np.inf), np.zeros(parts), count_A
    after_RA = np.roll(holders_RA, -1, axis=0)
    return (
        work.task.bandwidths(holders_RA, after_RA).min(axis=0),
        work.task.delays(holders_RA, after_RA).max(axis=0),
        count_A,
    )


def report_s(work: Work, holders_RA: Indices) -> float:
    """Return the seconds in which every machine reports to the driver, hears from it, and updates its weights."""
    task = work.task
    held = np.zeros(len(task.machines))
    size_A = work.single_bytes.copy()
    for size, parts in work.tied:
        size_A[parts[0]] += size
    np.add.at(held, holders_RA, np.broadcast_to(size_A, holders_RA.shape))
    for size, parts in work.tied:
        for part in parts[1:]:
            others = holders_RA[:, part]
            np.add.at(held, others[others != holders_RA[:, parts[0]]], size)
    machines = np.unique(holders_RA)
    passes = 2 + 2 * task.optimizer_states + 3
    rates = work.update_bytes_per_s[machines]
    # The owner's weights are the same in every pipeline.
    times = np.where(machines == (task.owner_index if task.pinned else -1), 1 / len(holders_RA), 1.0)
    seconds = passes * held[machines] * times / rates
    if task.owner_index is not None:
        seconds += 2 * task.delays(np.full(len(machines), task.owner_index), machines)
    return float(seconds.max())


def in_turn_s(work: Work, holders_RA: Indices) -> float:
    """Return the seconds of summing all gradients over several pipelines, all machines free at the same time.

    Weights with the same ring are summed together. All rings must be linked, as `sum_s` says.
    """
    task = work.task
    nbytes: dict[tuple[int, ...], float] = {}
    rings = [(float(size), holders_RA[:, part]) for part, size in enumerate(work.single_bytes) if size > 0]
    rings += [(float(size), _tied_ring(holders_RA, parts)) for size, parts in work.tied]
    for size, ring in rings:
        around = tuple(dict.fromkeys(ring.tolist()))
        if len(around) > 1:
            nbytes[around] = nbytes.get(around, 0.0) + size
    seconds, machines = [], [np.asarray(each) for each in nbytes]
    for ring, size in zip(machines, nbytes.values(), strict=True):
        after, count = np.roll(ring, -1), len(ring)
        round_s = size / count / task.bandwidths(ring, after) + task.delays(ring, after)
        seconds.append(2 * (count - 1) * float(round_s.max()))
    seconds_G = np.asarray(seconds)
    return float((begin_s(np.zeros(len(seconds)), machines, seconds_G) + seconds_G).max(initial=0.0))


def _tied_ring(holders_RA: Indices, parts: Sequence[int]) -> Indices:
    """Return the machines that hold a weight of several segments, pipeline by pipeline."""
    return np.asarray(list(dict.fromkeys(holders_RA[:, list(parts)].ravel().tolist())))


def end_s(work: Work, chains: Sequence[Chain]) -> float:
    """Return the seconds between the last backward and the next step's first forward."""
    table = holders(work, chains)
    busiest_s = sum_s(work, table)
    several = len(chains) > 1 and np.isfinite(busiest_s)
    return (max(busiest_s, in_turn_s(work, table)) if several else busiest_s) + report_s(work, table)
