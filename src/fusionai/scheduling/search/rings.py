"""Which clusters' pipelines sum their gradients with each other, and in which order around the ring.

A ring is as slow as its slowest link. Pipelines of one cluster stay next to each other. Between clusters the order is
the one whose slowest link is fastest, found for every set of clusters at once as Held and Karp (1962) find the shortest
round trip: here a trip is as long as its longest hop. The sets with the shortest steps are offered.

Array suffixes: R = chains, K = knots (chains of the same clusters), S = 2 ** K sets of them, L = knots of a ring,
W = ways that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.end_estimate import holders
from fusionai.scheduling.search.segment_costs import SegmentCosts

_MOST_KNOTS = 12
"""Up to so many of the fastest machines, all sets are compared; the others join one by one."""

_MOST_OTHERS = 32
"""Knots that are looked at in all."""

_MOST_RINGS = 3
"""Rings that are offered, best first."""

_LEAST_GAIN = 1e-4
"""Share of the step that a change must save."""


@dataclass(frozen=True, slots=True)
class _Knots:
    """What rings are weighed by. Pipelines that end together share the microbatches out as their paces are."""

    members: tuple[tuple[int, ...], ...]
    """By knot, its chains."""
    count_K: Floats
    """How many chains it has."""
    pace_K: Floats
    """Microbatches a second of its chains."""
    filling_K: Floats
    """Microbatches that its chains could pass while each is filled with its first."""
    nbytes_K: Floats
    """The most weights that a machine of the knot holds."""
    byte_s_KK: Floats
    """Seconds for a byte between two knots, the slower way, delays spread over bytes; on the diagonal, within a knot.
    """

    def step_s(self, order_WL: Indices, rounds: int) -> Floats:
        """Return (W,): about what a step of `rounds` takes if these knots run, their rings closed in this order."""
        byte_s = np.maximum(self.byte_s_KK[order_WL, order_WL], self.byte_s_KK[order_WL, np.roll(order_WL, -1, axis=1)])
        count, pace, filling = (each[order_WL].sum(axis=1) for each in (self.count_K, self.pace_K, self.filling_K))
        return _step_s(count, pace, filling, self.nbytes_K[order_WL].max(axis=1), byte_s.max(axis=1), rounds)


def _step_s(count: Floats, pace: Floats, filling: Floats, nbytes: Floats, byte_s: Floats, rounds: int) -> Floats:
    return np.asarray((rounds + filling) / pace + 2 * (count - 1) / count * nbytes * byte_s)


def rings(costs: SegmentCosts, chains: Sequence[Chain]) -> list[list[int]]:
    """Return sets of chains (indices) in the order of their ring, about the best first; none where all are one cluster.

    Exact for up to 12 clusters, as far as a step is what `_Knots` makes of it: the slowest link counts for all weights.
    """
    knots = _knots(costs, chains)
    if len(knots.members) < 2:
        return []
    rounds = costs.problem.microbatches
    found: dict[tuple[int, ...], float] = {}
    for order in _shortest(costs, knots, rounds):
        better, step_s = (_changed if len(knots.members) > _MOST_KNOTS else _as_it_is)(knots, order, rounds)
        found[tuple(better.tolist())] = step_s
    return [
        [chain for knot in each for chain in knots.members[knot]]
        for each in sorted(found, key=lambda each: found[each])
    ]


def _shortest(costs: SegmentCosts, knots: _Knots, rounds: int) -> list[Indices]:
    """Return the rings of the shortest steps over all sets of the first knots."""
    count = min(len(knots.members), _MOST_KNOTS)
    byte_s_KK = knots.byte_s_KK[:count, :count]
    key = byte_s_KK.tobytes()
    if key not in costs.round_trips:
        costs.round_trips[key] = best_round_trips(byte_s_KK)
    trip_SK, byte_s_S = costs.round_trips[key]
    inside_SK = _inside(count)
    running, pace, filling = (inside_SK @ each[:count] for each in (knots.count_K, knots.pace_K, knots.filling_K))
    nbytes_S = np.where(inside_SK, knots.nbytes_K[:count], 0.0).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        step_s = _step_s(running, pace, filling, nbytes_S, byte_s_S, rounds)
    step_s[0] = np.inf
    return [round_trip(int(each), trip_SK, byte_s_KK) for each in np.argsort(step_s, kind="stable")[:_MOST_RINGS]]


@lru_cache(maxsize=_MOST_KNOTS + 1)
def _inside(count: int) -> Indices:
    """Return (S, K): whether a set has a knot."""
    return np.asarray(np.arange(1 << count)[:, None] >> np.arange(count) & 1, dtype=bool)


@lru_cache(maxsize=_MOST_KNOTS + 1)
def _extensions(count: int) -> list[tuple[Indices, Indices, Indices]]:
    """Return sets by size, and how they are made larger: places among these sets, and the knots that they gain.

    A set's first knot is its least, so that no path is looked at twice.
    """
    inside_SK, found = _inside(count), []
    first_S, size_S = np.argmax(inside_SK, axis=1), inside_SK.sum(axis=1)
    for size in range(1, count):
        sets = np.flatnonzero(size_S == size)
        place, knot = np.nonzero(~inside_SK[sets] & (np.arange(count) > first_S[sets, None]))
        found.append((sets, place, knot))
    return found


def best_round_trips(byte_s_KK: Floats) -> tuple[Floats, Floats]:
    """Return (S, K), the longest hop of the best path through a set from its first knot to each, and of round trips.

    Round trips count the diagonal too.
    """
    count = len(byte_s_KK)
    inside_SK = _inside(count)
    first_S = np.argmax(inside_SK, axis=1)
    path_SK = np.full((1 << count, count), np.inf)
    path_SK[1 << np.arange(count), np.arange(count)] = 0.0
    for sets, place, knot in _extensions(count):
        longer = np.maximum(path_SK[sets][:, :, None], byte_s_KK[None]).min(axis=1)
        path_SK[sets[place] | 1 << knot, knot] = longer[place, knot]
    several_S = inside_SK.sum(axis=1) > 1
    home_SK = np.where(several_S[:, None], byte_s_KK[first_S], 0.0)
    trip_S = np.maximum(path_SK, home_SK).min(axis=1)
    return path_SK, np.maximum(trip_S, np.where(inside_SK, np.diag(byte_s_KK), 0.0).max(axis=1))


def round_trip(chosen: int, path_SK: Floats, byte_s_KK: Floats) -> Indices:
    """Return the knots of a set in the order of its best round trip."""
    first = (chosen & -chosen).bit_length() - 1
    knot, found = first, []
    while chosen != 1 << first:
        # `knot` is where the path goes on to, at first home.
        knot = int(np.argmin(np.maximum(path_SK[chosen], byte_s_KK[:, knot])))
        found.append(knot)
        chosen ^= 1 << knot
    return np.asarray([first, *found[::-1]])


def _as_it_is(knots: _Knots, order: Indices, rounds: int) -> tuple[Indices, float]:
    return order, float(knots.step_s(order[None], rounds)[0])


def _changed(knots: _Knots, order: Indices, rounds: int) -> tuple[Indices, float]:
    """Return the ring with knots taken out and put in between others, one at a time, while the step gets shorter."""
    order, best_s = _as_it_is(knots, order, rounds)
    while True:
        missing = np.setdiff1d(np.arange(len(knots.members)), order)
        ways = [np.asarray([np.insert(order, place, knot) for knot in missing for place in range(len(order))])]
        ways += [np.asarray([np.delete(order, place) for place in range(len(order))])] if len(order) > 1 else []
        found = best_s * (1 - _LEAST_GAIN)
        better: Indices | None = None
        for each in (each for each in ways if len(each)):
            seconds = knots.step_s(each, rounds)
            if seconds.min() < found:
                found, better = float(seconds.min()), each[int(np.argmin(seconds))]
        if better is None:
            return order, best_s
        order, best_s = better, found


def _knots(costs: SegmentCosts, chains: Sequence[Chain]) -> _Knots:
    """Return the knots of chains, those of most pace first, without the last if there are too many."""
    by_clusters: dict[frozenset[int], list[int]] = {}
    cluster = costs.cluster_N.tolist()
    for index, chain in enumerate(chains):
        by_clusters.setdefault(frozenset(cluster[machine] for machine in chain.machines), []).append(index)
    pace_R = np.asarray([1 / max(each.period_s, 1e-15) for each in chains])
    groups = sorted(by_clusters.values(), key=lambda each: -float(pace_R[each].sum()))[:_MOST_OTHERS]
    latency_R = np.asarray([each.latency_s for each in chains])
    most_R = np.asarray([costs.most_weight_bytes(each.bounds) for each in chains])
    table = holders(costs, [chains[each[0]] for each in groups] + [chains[each[-1]] for each in groups])
    used = slice(costs.before, costs.before + costs.count)
    first, last = table[: len(groups), used], table[len(groups) :, used]
    # Around a ring, a knot's last chain sends to the next one's first; either may stand before the other.
    rate = costs.problem.bandwidths(last[:, None], first[None]).min(axis=2, initial=np.inf)
    rate = np.minimum(rate, rate.T)
    delay = costs.problem.delays(last[:, None], first[None]).max(axis=2, initial=0.0)
    with np.errstate(divide="ignore"):
        # A round sends the weights of one of all holders' parts.
        byte_s = np.where(rate > 0, 1 / rate, 1.0) + len(chains) * np.maximum(delay, delay.T) / float(np.median(most_R))
    alone = [k for k, each in enumerate(groups) if len(each) == 1]
    byte_s[alone, alone] = 0.0
    return _Knots(
        members=tuple(tuple(each) for each in groups),
        count_K=np.asarray([float(len(each)) for each in groups]),
        pace_K=np.asarray([float(pace_R[each].sum()) for each in groups]),
        filling_K=np.asarray([float((latency_R[each] * pace_R[each] - 1).sum()) for each in groups]),
        nbytes_K=np.asarray([float(most_R[each].max()) for each in groups]),
        byte_s_KK=byte_s,
    )
