"""One chain of machines: in which order it runs, and where it is cut.

OP-Fence orders machines so that slow links are crossed least and cuts where tensors are small (FusionLLM, arXiv
2410.12707, the scheduler; details are ours). For an order, cuts and the machines that take part are found together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from numpy.typing import NDArray

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier, make_split, usable_hops
from fusionai.scheduling.search.segment_costs import SegmentCosts

_UNLINKED_S = 1e9
"""Stands for a hop that is not possible while orders are compared: worse than any other, yet it adds up."""

_MOST_EXCHANGES = 200
"""Improvements of an order by reversing a part of it; each looks at all parts."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A pipeline as the solver sees it: machine `machines[k]` runs segments [bounds[k], bounds[k + 1])."""

    machines: tuple[int, ...]
    bounds: tuple[int, ...]
    latency_s: float
    """Seconds that one microbatch takes through all stages."""
    period_s: float
    """Between one microbatch and the next: the largest share of any machine or link."""
    in_flight_limit: int

    def seconds(self, microbatches: int) -> float:
        """Return the time of an ideal pipeline."""
        return self.latency_s + (microbatches - 1) * self.period_s


def ordered(costs: SegmentCosts, machines: Indices) -> Indices:
    """Return machines in an order of short hops: a chain of nearest neighbours, parts of it then reversed (2-opt).

    A hop counts what a typical cut sends over it. With pinned ends the owner is at both ends of the chain.
    """
    if len(machines) < 2:
        return machines
    hop = hops_of(costs, machines, 1.0)
    hop = np.minimum(np.maximum(hop, hop.T), _UNLINKED_S)
    np.fill_diagonal(hop, 0.0)
    if len(machines) == 2:
        return machines
    return machines[_reversed_parts(hop, _nearest(hop))]


def hops_of(costs: SegmentCosts, machines: Indices, sharing: float) -> Floats:
    """Return (E, E): seconds of what a typical cut sends, there and back, between any two; the last is the owner."""
    inner = slice(1, -1) if costs.count > 1 else slice(None)
    forward, gradient = (
        np.asarray([np.median(each[inner])])
        for each in (costs.segments.forward_bytes_P, costs.segments.gradient_bytes_P)
    )
    return costs.hops(machines, (forward, gradient), sharing)[0][:, :, 0]


def _nearest(hop_EE: Floats) -> list[int]:
    """Return the cheapest of a few chains of nearest neighbours; the last index is outside, at both ends."""
    count = len(hop_EE) - 1
    outside = count
    best, best_s = list(range(count)), _length(hop_EE, list(range(count)))
    firsts = np.argsort(hop_EE[outside, :count], kind="stable")[:4] if hop_EE[outside].any() else range(min(count, 8))
    for first in firsts:
        order = [int(first)]
        free = np.ones(count, dtype=bool)
        free[first] = False
        while len(order) < count:
            costs = np.where(free, hop_EE[order[-1], :count], np.inf)
            order.append(int(np.argmin(costs)))
            free[order[-1]] = False
        if (length := _length(hop_EE, order)) < best_s:
            best, best_s = order, length
    return best


def _length(hop_EE: Floats, order: list[int]) -> float:
    path = np.asarray([len(hop_EE) - 1, *order, len(hop_EE) - 1])
    return float(hop_EE[path[:-1], path[1:]].sum())


def _reversed_parts(hop_EE: Floats, order: list[int]) -> list[int]:
    """Improve an order by reversing the part that shortens it most, while one does."""
    outside = len(hop_EE) - 1
    for _ in range(_MOST_EXCHANGES):
        path = np.asarray([outside, *order, outside])
        before, after = path[:-2], path[2:]
        inside = path[1:-1]
        # Reversing places i..j replaces the hops into i and out of j.
        old = hop_EE[before, inside][:, None] + hop_EE[inside, after][None]
        new = hop_EE[before[:, None], inside[None]] + hop_EE[inside[:, None], after[None]]
        gain = np.triu(old - new, k=1)
        i, j = (int(each) for each in np.unravel_index(np.argmax(gain), gain.shape))
        if gain[i, j] <= 1e-9 * max(1.0, float(old[i, j])):
            break
        order = [*order[:i], *order[i : j + 1][::-1], *order[j + 1 :]]
    return order


def solved(
    costs: SegmentCosts,
    machines: Indices,
    line: Line,
    *,
    sharing: float,
    tolerance: float,
) -> Chain | None:
    """Return the best cuts of the graph over machines in this order, some of which may be left out; None if none fits.

    Exact up to the relative `tolerance` for an ideal pipeline, but for memory: how much a stage holds in flight depends
    on how many follow, which is only bounded while machines may be left out.
    """

    def best(search: Callable[[float], Split | None]) -> Split | None:
        found = list(frontier(line, search, tolerance, warm_steps=6))
        return min(found, key=lambda each: each.objective_s(line.microbatches), default=None)

    chosen = best(_BestWithGaps(line))
    everyone = tuple(range(len(machines)))
    if chosen is None and len(machines) <= costs.count:
        chosen = best(lambda limit_s: best_of_order(line, everyone, limit_s))
    if chosen is None:
        return None
    used = np.asarray([machines[device] for device in chosen.devices])
    return measured(costs, used, np.asarray(chosen.bounds), sharing, costs.problem.microbatches)


def proportional(costs: SegmentCosts, groups: Sequence[Indices], sharing: float, in_flight_limit: int) -> list[Chain]:
    """Return chains cut in proportion to speed, or to memory if that does not fit: quick, for comparing many.

    Of more machines than segments the fastest take part. Groups of the same size are reckoned at once.
    """
    found: dict[int, Chain] = {}
    by_size: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        by_size.setdefault(min(len(group), costs.count), []).append(place)
    for size, places in by_size.items():
        machines_CM = np.asarray([_fastest(costs, groups[place], size) for place in places])
        chains = _dealt_out(costs, machines_CM, 1 / costs.whole_s[machines_CM], sharing, in_flight_limit)
        broken = [index for index, chain in enumerate(chains) if not math.isfinite(chain.period_s)]
        if broken:
            machines_CM = machines_CM[broken]
            others = _dealt_out(costs, machines_CM, costs.budget_bytes[machines_CM], sharing, in_flight_limit)
            for index, chain in zip(broken, others, strict=True):
                chains[index] = chain
        found.update(zip(places, chains, strict=True))
    return [found[place] for place in range(len(groups))]


def _fastest(costs: SegmentCosts, machines: Indices, count: int) -> Indices:
    """Return the fastest machines in their order."""
    if len(machines) == count:
        return machines
    return np.asarray(machines[np.sort(np.argsort(costs.whole_s[machines], kind="stable")[:count])])


def _dealt_out(
    costs: SegmentCosts, machines_CM: Indices, shares_CM: Floats, sharing: float, in_flight_limit: int
) -> list[Chain]:
    """Return chains whose machines have parts of the work in proportion to shares."""
    chains, count = machines_CM.shape
    speed = np.cumsum(shares_CM, axis=1)
    seconds_CS = costs.until_s[machines_CM[:, 0]]
    wanted = seconds_CS[:, -1:] * speed[:, :-1] / speed[:, -1:] * (1 - 1e-9)
    # As np.searchsorted finds places, in many rows at once.
    places = (seconds_CS[:, None] < wanted[:, :, None]).sum(axis=2) + 1
    steps = np.arange(1, count)
    inner = np.maximum.accumulate(np.maximum(places, steps) - steps, axis=1) + steps
    bounds_CB = np.zeros((chains, count + 1), dtype=np.int64)
    bounds_CB[:, 1:-1] = np.minimum(inner, costs.count - count + steps)
    bounds_CB[:, -1] = costs.count
    return measured_all(costs, machines_CM, bounds_CB, sharing, in_flight_limit)


def measured(costs: SegmentCosts, machines: Indices, bounds: Indices, sharing: float, in_flight_limit: int) -> Chain:
    """Return the chain with these cuts, as `measured_all`."""
    return measured_all(costs, machines[None], bounds[None], sharing, in_flight_limit)[0]


def measured_all(
    costs: SegmentCosts, machines_CM: Indices, bounds_CB: Indices, sharing: float, in_flight_limit: int
) -> list[Chain]:
    """Return chains with these cuts, their latency and period as sums over segments.

    The period is the largest of what machines and links are busy with a microbatch, and of what memory allows: a stage
    that has room for h microbatches passes at most h in the time from the forward of one to the end of its backward.
    """
    problem, segments = costs.problem, costs.segments
    stage_s, hidden_s = costs.stage_s(machines_CM, bounds_CB)
    path, places = machines_CM, bounds_CB[:, 1:-1]
    slower = np.ones(places.shape[1])
    if around := problem.pinned and problem.owner_index is not None:
        owner = np.full((len(machines_CM), 1), problem.owner_index)
        path, places = np.concatenate([owner, machines_CM, owner], axis=1), bounds_CB
        slower = np.ones(places.shape[1])
        slower[[0, -1]] = sharing
    latency = stage_s.sum(axis=1) + costs.owner_s * sharing
    period = np.maximum(stage_s.max(axis=1), costs.owner_s * sharing)
    onward_s = np.zeros(bounds_CB.shape)
    onward_s[:, :-1] = stage_s
    onward_s[:, 1:-1] -= hidden_s[:, 1:]
    if path.shape[1] > 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            forward = segments.forward_bytes_P[places] * slower / problem.bandwidths(path[:, :-1], path[:, 1:])
            gradient = segments.gradient_bytes_P[places] * slower / problem.bandwidths(path[:, 1:], path[:, :-1])
        forward, gradient = (np.nan_to_num(each, nan=0.0, posinf=np.inf) for each in (forward, gradient))
        hops_s = forward + gradient + 2 * problem.delays(path[:, :-1], path[:, 1:])
        latency = latency + hops_s.sum(axis=1)
        period = np.maximum(period, np.maximum(forward, gradient).max(axis=1))
        # Hop k comes after stage k; where the owner has the ends, one comes before, and its last stage after all.
        after_s = hops_s[:, 1:] if around else hops_s
        onward_s[:, : after_s.shape[1]] += after_s
        if around:
            onward_s[:, -1] += costs.owner_after_s * sharing
    trips_s = np.cumsum(onward_s[:, ::-1], axis=1)[:, ::-1][:, :-1]
    trips_s[:, 1:] += hidden_s[:, 1:]
    held = np.minimum(_room(costs, machines_CM, bounds_CB), in_flight_limit)
    with np.errstate(divide="ignore", invalid="ignore"):
        period = np.maximum(period, (trips_s / held).max(axis=1))
    fits = held.min(axis=1) >= 1
    latency, period = np.where(fits, latency, np.inf), np.where(fits, period, np.inf)
    rows = zip(machines_CM.tolist(), bounds_CB.tolist(), latency.tolist(), period.tolist(), strict=True)
    return [Chain(tuple(row[0]), tuple(row[1]), row[2], row[3], in_flight_limit) for row in rows]


def memory_does_not_bind(costs: SegmentCosts, chain: Chain) -> bool:
    """Whether a chain would be cut alike with more memory: all its stages have room for more than 1F1B asks for."""
    room = _room(costs, np.asarray(chain.machines), np.asarray(chain.bounds))
    return bool((room > np.arange(len(room), 0, -1) + costs.segments.outer_after + 1).all())


def _room(costs: SegmentCosts, machines: Indices, bounds: Indices) -> Floats:
    """Return, by stage, the number of microbatches that its machine has room for. Shapes: `SegmentCosts.stage_s`."""
    segments, start, stop = costs.segments, bounds[..., :-1], bounds[..., 1:]
    fixed = segments.fixed_bytes_PP[start, stop]
    flight = np.maximum(segments.flight_bytes_PP[start, stop], 1.0)
    return np.asarray(np.floor((costs.budget_bytes[machines] - fixed) / flight - costs.heap_N[machines]))


class _BestWithGaps:
    """The least-latency split over any of the devices in their order, no share above a limit.

    A dynamic programme from the last device back: least latency from position i on with device d the first to work.
    Next after d comes any later device, so leaving some out costs no more than looking at a vector for each pair.

    Ranges are told by length and start: those within a limit are short, and no others are looked at. Array suffixes
    besides the line's: L = lengths from 1 on, S = starts.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._fitting_DPP = np.empty_like(line.delay_s_DPP)
        """Delays of ranges, inf where a range does not fit the device."""
        fits: dict[tuple[float, float], NDArray[np.bool_]] = {}
        for device in range(line.devices):
            held = line.in_flight(min(line.devices - device, line.positions - 1)) + line.heap_microbatches_D[device]
            key = held, line.budget_bytes_D[device]
            if key not in fits:
                fits[key] = line.fixed_bytes_PP + held * line.flight_bytes_PP <= line.budget_bytes_D[device]
            self._fitting_DPP[device] = np.where(fits[key], line.delay_s_DPP[device], np.inf)
        self._fitting_DLS, self._seconds_DLS = _by_length(self._fitting_DPP), _by_length(line.seconds_DPP)
        self._least_s_L = self._seconds_DLS.min(axis=(0, 2))

    def __call__(self, limit_s: float) -> Split | None:
        line = self._line
        if line.outer_s > limit_s:
            return None
        count, last, outside = line.devices, line.positions - 1, line.devices
        short = np.flatnonzero(self._least_s_L <= limit_s)
        if not len(short):
            return None
        longest = int(short[-1]) + 1
        hops = usable_hops(line, limit_s)
        seconds_DLS = self._seconds_DLS[:, :longest]
        allowed_DLS = np.where(seconds_DLS <= limit_s, self._fitting_DLS[:, :longest], np.inf)
        latency_DP = np.full((count, line.positions), np.inf)
        onward_DP = np.full((count, last + longest), np.inf)
        """Least latency after a range that ends at a position; none ends beyond the last."""
        onward_DLS = sliding_window_view(onward_DP[:, 1:], last, axis=1)
        for device in reversed(range(count)):
            if device + 1 < count:
                later = hops[device, device + 1 : count] + latency_DP[device + 1 :]
                np.minimum.reduce(later, axis=0, out=onward_DP[device, : line.positions])
            onward_DP[device, last] = hops[device, outside, last]
            np.minimum.reduce(allowed_DLS[device] + onward_DLS[device], axis=0, out=latency_DP[device, :last])
        totals_D = latency_DP[:, 0] + hops[outside, :count, 0]
        device = int(np.argmin(totals_D))
        if not math.isfinite(totals_D[device]):
            return None
        devices, bounds = [device], [0]
        while True:
            start = bounds[-1]
            stops = slice(start + 1, start + 1 + longest)
            stop = start + 1 + int(np.argmin(allowed_DLS[device, :, start] + onward_DP[device, stops]))
            bounds.append(stop)
            if stop == last:
                return make_split(line, devices, bounds)
            later_D = hops[device, device + 1 : count, stop] + latency_DP[device + 1 :, stop]
            device += 1 + int(np.argmin(later_D))
            devices.append(device)


def _by_length(table_DPP: Floats) -> Floats:
    """Return (D, L, S): entry [i, i + l] of each table as [l - 1, i], a view; for ranges beyond the end, empty ones."""
    devices, positions, _ = table_DPP.shape
    # Row i + 1 follows row i in memory, and begins with the ranges that end before they start.
    flat = np.ascontiguousarray(table_DPP).reshape(devices, -1)[:, 1:]
    item = flat.itemsize
    return as_strided(
        flat,
        (devices, positions - 1, positions - 1),
        (flat.strides[0], item, item * (positions + 1)),
        writeable=False,
    )
