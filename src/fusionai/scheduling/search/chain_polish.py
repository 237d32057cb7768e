"""A chain made better step by step, with memory reckoned as it is.

The solver of cuts bounds how much a stage holds in flight before it knows where a stage stands, and takes machines in
one order. Where memory decides, that loses a lot: a stage that has room for h microbatches passes at most h in the time
that one is on its way to the end and back (Little's law, as in `in_flight`). Nor does the solver know that the two
holders of a tied weight sum its gradients over the link between them. Here cuts and machines of a whole chain are
changed a little, all ways at once, and the best change is kept while there is one.

Array suffixes: W = ways that are compared, M = machines of the chain, B = M + 1 bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.search.chain import Chain, measured
from fusionai.scheduling.search.segment_costs import SegmentCosts

_SHIFTS = (1, 2, 5)
"""Segments that a change of cuts moves."""

_MOST_STEPS = 80

_LEAST_GAIN = 1e-4
"""Share of the time that a change must save."""


def polished(
    costs: SegmentCosts, chain: Chain, microbatches: int, *, sum_s_per_byte: float = 0.0, swaps: bool = True
) -> Chain:
    """Return a chain that takes at most as long as an ideal pipeline, its machines the same.

    Changes: segments move from one machine to any other, those between shifted along; two machines change places, or a
    stretch of them is turned around.
    For chains without stages of the owner's; others come back as they are.
    """
    if costs.problem.pinned or len(chain.machines) < 2:
        return chain
    scale = _Scale(costs, np.asarray(chain.machines), microbatches, sum_s_per_byte)
    bounds, order = np.asarray(chain.bounds), np.arange(len(chain.machines))
    best_s = float(scale.seconds(bounds[None], order[None])[0])
    for _ in range(_MOST_STEPS):
        ways = [_moved(bounds)]
        bounds_WB, order_WM = ways[0], np.broadcast_to(order, (len(ways[0]), len(order)))
        if swaps:
            swapped = _swapped(order)
            bounds_WB = np.concatenate([bounds_WB, np.broadcast_to(bounds, (len(swapped), len(bounds)))])
            order_WM = np.concatenate([order_WM, swapped])
        seconds_W = scale.seconds(bounds_WB, order_WM)
        way = int(np.argmin(seconds_W))
        if not seconds_W[way] < best_s * (1 - _LEAST_GAIN):
            break
        best_s, bounds, order = float(seconds_W[way]), bounds_WB[way], order_WM[way]
    return measured(costs, scale.machines[order], bounds, 1.0, chain.in_flight_limit)


def _moved(bounds: Indices) -> Indices:
    """Return (W, B): bounds k to l - 1 shifted up or down, which moves segments between machines k and l."""
    ways = bounds + _shifts(len(bounds))
    return np.asarray(ways[(np.diff(ways, axis=1) > 0).all(axis=1)])


@lru_cache(maxsize=128)
def _shifts(count: int) -> Indices:
    """Return (W, B): what each way of moving segments adds to so many bounds."""
    first, last = np.triu_indices(count - 2)
    place = np.arange(-1, count - 1)
    inside = (place >= first[:, None]) & (place <= last[:, None])
    return np.concatenate([sign * inside for step in _SHIFTS for sign in (step, -step)])


def _swapped(order: Indices) -> Indices:
    """Return (W, M): the order with each pair changed, and with each stretch the other way around."""
    return np.asarray(order[_exchanges(len(order))])


@lru_cache(maxsize=128)
def _exchanges(count: int) -> Indices:
    """Return (W, M): the places from which machines come, for each pair changed and each stretch turned around."""
    first, second = np.triu_indices(count, k=1)
    place = np.arange(count)
    changed = np.repeat(place[None], len(first), axis=0)
    ways = np.arange(len(first))
    changed[ways, first], changed[ways, second] = second, first
    inside = (place >= first[:, None]) & (place <= second[:, None])
    return np.concatenate([changed, np.where(inside, (first + second)[:, None] - place, place)])


@dataclass(slots=True)
class _Scale:
    """Weighs many ways to cut and order one chain's machines, as `chain.measured` weighs one."""

    costs: SegmentCosts
    machines: Indices
    microbatches: int
    sum_s_per_byte: float
    out_s_MM: Floats
    """Seconds of a byte from machine to machine."""
    delay_s_MM: Floats

    def __init__(self, costs: SegmentCosts, machines: Indices, microbatches: int, sum_s_per_byte: float) -> None:
        self.costs, self.machines = costs, machines
        self.microbatches, self.sum_s_per_byte = microbatches, sum_s_per_byte
        with np.errstate(divide="ignore"):
            self.out_s_MM = 1 / costs.problem.bandwidths(machines[:, None], machines[None])
        self.delay_s_MM = costs.problem.delays(machines[:, None], machines[None])

    def _tied_s(self, stop_WM: Indices, order_WM: Indices) -> Floats:
        """Return, by way, the seconds in which the first and the last holder of tied weights exchange gradients."""
        ways = np.arange(len(stop_WM))
        total = np.zeros(len(stop_WM))
        for size, parts in self.costs.tied:
            first, last = (
                order_WM[ways, (stop_WM <= part - self.costs.before).sum(axis=1)] for part in (parts[0], parts[-1])
            )
            apart_s = size * np.maximum(self.out_s_MM[first, last], self.out_s_MM[last, first])
            total += np.where(first == last, 0.0, apart_s + self.delay_s_MM[first, last])
        return total

    def seconds(self, bounds_WB: Indices, order_WM: Indices) -> Floats:
        """Return the seconds of an ideal pipeline, by way; infinite where a stage does not fit."""
        costs, segments, rounds = self.costs, self.costs.segments, self.microbatches
        start, stop, machines = bounds_WB[:, :-1], bounds_WB[:, 1:], self.machines[order_WM]
        stage_s, hidden_s = costs.stage_s(machines, bounds_WB)
        latency, period = stage_s.sum(axis=1), stage_s.max(axis=1)
        onward_s = stage_s.copy()
        onward_s[:, 1:] -= hidden_s[:, 1:]
        here, there, places = order_WM[:, :-1], order_WM[:, 1:], bounds_WB[:, 1:-1]
        forward = segments.forward_bytes_P[places] * self.out_s_MM[here, there]
        gradient = segments.gradient_bytes_P[places] * self.out_s_MM[there, here]
        hops_s = forward + gradient + 2 * self.delay_s_MM[here, there]
        latency = latency + hops_s.sum(axis=1)
        period = np.maximum(period, np.maximum(forward, gradient).max(axis=1))
        onward_s[:, :-1] += hops_s
        trips_s = np.cumsum(onward_s[:, ::-1], axis=1)[:, ::-1]
        trips_s[:, 1:] += hidden_s[:, 1:]
        flight = np.maximum(segments.flight_bytes_PP[start, stop], 1.0)
        spare = costs.budget_bytes[machines] - segments.fixed_bytes_PP[start, stop]
        held = np.minimum(np.floor(spare / flight - costs.heap_N[machines]), rounds)
        with np.errstate(divide="ignore", invalid="ignore"):
            limited_s = (trips_s / held).max(axis=1)
        # Of a single microbatch nothing is a multiple, not even of forever.
        total = latency + (rounds - 1) * np.maximum(period, limited_s) if rounds > 1 else latency
        if self.sum_s_per_byte:
            total = total + self.sum_s_per_byte * costs.stage_weight_bytes(bounds_WB).max(axis=1)
        else:
            total = total + self._tied_s(stop, order_WM)
        return np.where((held >= 1).all(axis=1), total, np.inf)
