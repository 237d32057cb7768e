"""Which clusters' pipelines sum their gradients with each other, and in which order around the ring.

A ring is as slow as its slowest link. Pipelines of one cluster stay next to each other; between clusters the order is
searched so that the slowest link is fast, and clusters that only slow links lead to are left out, one after the other.

Array suffixes: R = chains, K = knots (chains of the same clusters), A = segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.swarm.chain import Chain, shortest_order
from fusionai.scheduling.swarm.end_of_step import holders
from fusionai.scheduling.swarm.work import Work

_MOST_KNOTS = 32
"""Those of most pipelines' pace are looked at."""

_SLOWEST_COUNTS = 4
"""Power of a link's seconds in the length of a ring: the higher, the more the slowest link alone decides."""

_MOST_RINGS = 4
"""Rings that are offered, best first."""

_MOST_CHANGED = 2
"""Rings that are changed by one cluster."""

_LEAST_GAIN = 1e-4
"""Share of the step that a change must save."""


@dataclass(frozen=True, slots=True)
class _Knots:
    """What rings are weighed by. Pipelines that end together share M microbatches out as their paces are."""

    members: tuple[tuple[int, ...], ...]
    """By knot, its chains."""
    count_K: Indices
    pace_K: Floats
    """Microbatches a second of its chains."""
    filling_K: Floats
    """Microbatches that its chains could pass while each is filled with its first."""
    nbytes_K: Floats
    """The most weights that a machine of the knot holds."""
    byte_s_KK: Floats
    """Seconds for a byte between two knots, the slower way; on the diagonal, within a knot."""
    delay_s_KK: Floats

    def step_s(self, order_WL: Indices, microbatches: int) -> Floats:
        """Return (W,): about what a step takes if these L knots run, their rings closed in this order."""
        after_WL = np.roll(order_WL, -1, axis=1)
        count_W = self.count_K[order_WL].sum(axis=1)
        passes_W = (microbatches + self.filling_K[order_WL].sum(axis=1)) / self.pace_K[order_WL].sum(axis=1)
        byte_s, delay_s = (
            np.maximum(table[order_WL, order_WL], table[order_WL, after_WL]).max(axis=1)
            for table in (self.byte_s_KK, self.delay_s_KK)
        )
        nbytes_W = self.nbytes_K[order_WL].max(axis=1)
        return np.asarray(passes_W + 2 * (count_W - 1) * (nbytes_W / count_W * byte_s + delay_s))


def rings(work: Work, chains: Sequence[Chain]) -> list[list[int]]:
    """Return sets of chains (indices) in the order of their ring, about the best first; none where all are one cluster.

    From the ring of all clusters the one is left out without which the step is shortest, until one is left; the best
    of these rings are then changed by one cluster, out or in, while that helps.
    """
    knots = _knots(work, chains)
    if len(knots.members) < 2:
        return []
    rounds = work.task.microbatches
    order = _ring(knots, np.arange(len(knots.members)))
    found: dict[tuple[int, ...], float] = {}
    while len(order) > 1:
        found[tuple(order.tolist())] = float(knots.step_s(order[None], rounds)[0])
        fewer = _without_one(order)
        order = _ring(knots, fewer[int(np.argmin(knots.step_s(fewer, rounds)))])
    for each in sorted(found, key=lambda each: found[each])[:_MOST_CHANGED]:
        better, step_s = _changed(knots, np.asarray(each), rounds)
        found[tuple(better.tolist())] = step_s
    best = sorted(found, key=lambda each: found[each])[:_MOST_RINGS]
    return [[chain for knot in each for chain in knots.members[knot]] for each in best]


def _changed(knots: _Knots, order: Indices, rounds: int) -> tuple[Indices, float]:
    """Return the ring with knots taken out and put in between others, one at a time, while the step gets shorter."""
    best_s = float(knots.step_s(order[None], rounds)[0])
    while True:
        missing = np.setdiff1d(np.arange(len(knots.members)), order)
        ways = [np.asarray([np.insert(order, place, knot) for knot in missing for place in range(len(order))])]
        ways += [_without_one(order)] if len(order) > 1 else []
        found = best_s * (1 - _LEAST_GAIN)
        better: Indices | None = None
        for each in (each for each in ways if len(each)):
            seconds = knots.step_s(each, rounds)
            if seconds.min() < found:
                found, better = float(seconds.min()), each[int(np.argmin(seconds))]
        if better is None:
            return order, best_s
        order, best_s = better, found


def _without_one(order: Indices) -> Indices:
    """Return (L, L - 1): the order of L without each of its places."""
    return np.asarray([np.delete(order, place) for place in range(len(order))])


def _ring(knots: _Knots, members: Indices) -> Indices:
    """Return knots in an order around which the slowest link is fast."""
    if len(members) < 4:  # There is only one ring of them.
        return members
    seconds = knots.byte_s_KK[np.ix_(members, members)] ** _SLOWEST_COUNTS
    np.fill_diagonal(seconds, 0.0)
    return members[[*shortest_order(seconds), len(members) - 1]]


def _knots(work: Work, chains: Sequence[Chain]) -> _Knots:
    """Return the knots of chains, those of most pace if there are too many."""
    by_clusters: dict[tuple[int, ...], list[int]] = {}
    for index, chain in enumerate(chains):
        by_clusters.setdefault(tuple(np.unique(work.cluster_N[list(chain.machines)]).tolist()), []).append(index)
    pace_R = np.asarray([1 / max(each.period_s, 1e-15) for each in chains])
    groups = sorted(by_clusters.values(), key=lambda each: -float(pace_R[each].sum()))[:_MOST_KNOTS]
    table = holders(work, [chains[each[0]] for each in groups] + [chains[each[-1]] for each in groups])
    used = work.single_bytes > 0
    first, last = table[: len(groups), used], table[len(groups) :, used]
    # Around a ring, a knot's last chain sends to the next one's first; either may stand before the other.
    rate = work.task.bandwidths(last[:, None], first[None]).min(axis=2)
    rate = np.minimum(rate, rate.T)
    delay = work.task.delays(last[:, None], first[None]).max(axis=2)
    with np.errstate(divide="ignore"):
        byte_s = np.where(rate > 0, 1 / rate, 1.0)
    alone = [k for k, each in enumerate(groups) if len(each) == 1]
    byte_s[alone, alone] = delay[alone, alone] = 0.0
    latency_R = np.asarray([each.latency_s for each in chains])
    most_R = np.asarray([float(work.stage_weight_bytes(np.asarray(each.bounds)).max()) for each in chains])
    return _Knots(
        members=tuple(tuple(each) for each in groups),
        count_K=np.asarray([len(each) for each in groups]),
        pace_K=np.asarray([float(pace_R[each].sum()) for each in groups]),
        filling_K=np.asarray([float((latency_R[each] * pace_R[each] - 1).sum()) for each in groups]),
        nbytes_K=np.asarray([float(most_R[each].max()) for each in groups]),
        byte_s_KK=byte_s,
        delay_s_KK=np.maximum(delay, delay.T),
    )
