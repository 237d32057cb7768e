"""Cuts and groups together: a dynamic programme over machines in the order of the fence.

Array suffixes: D = machines of an order, P = positions considered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.search.segment_costs import SegmentCosts

_MOST_POSITIONS = 40
"""More positions are thinned out: the programme grows with their square."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Stages between `bounds` (indices of `work.positions`) and their holders."""

    bounds: tuple[int, ...]
    holders: tuple[tuple[int, ...], ...]


def drafts(work: SegmentCosts, order: Indices, most_stages: int) -> Iterator[Draft]:
    """Yield, for each number of stages, the groups and cuts whose slowest stage is fastest.

    Groups are neighbours in the order. A stage's time is its holders' together for a step, and then the sum of its
    gradients among them; a boundary's is that of the links between machines on both sides of it.
    """
    positions = _thinned(work)
    programme = _Programme(work, order, positions)
    for stages in range(1, min(most_stages, len(order), len(positions) - 1) + 1):
        draft = programme.best(stages)
        if draft is not None:
            yield draft


def _thinned(work: SegmentCosts) -> Indices:
    """Return the positions considered, of each stretch the one where least crosses."""
    crossing = work.segments.forward_bytes_P + work.segments.gradient_bytes_P
    if work.count + 1 <= _MOST_POSITIONS:
        return np.arange(work.count + 1)
    inner = np.array_split(np.arange(1, work.count), _MOST_POSITIONS - 2)
    return np.asarray([0, *(int(each[np.argmin(crossing[each])]) for each in inner), work.count])


class _Programme:
    """From the last stage back, because how much a stage holds in flight depends on how many follow it."""

    def __init__(self, work: SegmentCosts, order: Indices, positions: Indices) -> None:
        task, segments = work.problem, work.segments
        self._positions = positions
        self._order = order[::-1]
        self._microbatches = task.microbatches
        grid = np.ix_(positions, positions)
        self._fixed_PP, self._flight_PP = segments.fixed_bytes_PP[grid], segments.flight_bytes_PP[grid]
        self._budget_D, self._heap_D = work.budget_bytes[self._order], work.heap_N[self._order]
        self._seconds_DPP = np.stack([work.range_s(np.asarray([each]))[0][grid] for each in self._order])
        trained = np.concatenate([[0.0], np.cumsum([cost.trainable_bytes for cost in segments.costs])])[positions]
        self._weights_PP = np.maximum(trained[None] - trained[:, None], 0.0)
        self._link = task.bandwidths(self._order[:, None], self._order[None])
        self._delay = task.delays(self._order[:, None], self._order[None])
        self._bytes_P = (segments.forward_bytes_P[positions], segments.gradient_bytes_P[positions])
        self._owner_after = segments.outer_after
        # By stages, last machines of the order and first position: the best time, the machines and the position after.
        start = np.full((len(order) + 1, len(positions)), np.inf)
        start[:, -1] = 0.0  # machines at the end may be left out
        nothing = np.zeros(start.shape, dtype=np.int64)
        self._layers: list[tuple[Floats, Indices, Indices]] = [(start, nothing, nothing)]

    def best(self, stages: int) -> Draft | None:
        while len(self._layers) <= stages:
            self._layers.append(self._layer(len(self._layers)))
        times = self._layers[stages][0]
        machines = int(np.argmin(times[:, 0]))
        if not math.isfinite(times[machines, 0]):
            return None
        place = 0
        bounds, groups = [0], []
        for stage in range(stages, 0, -1):
            _, after_D, after_P = self._layers[stage]
            fewer, place_after = int(after_D[machines, place]), int(after_P[machines, place])
            groups.append(tuple(sorted(int(each) for each in self._order[fewer:machines])))
            machines, place = fewer, place_after
            bounds.append(int(self._positions[place]))
        return Draft(tuple(bounds), tuple(groups))

    def _layer(self, stage: int) -> tuple[Floats, Indices, Indices]:
        previous = self._layers[stage - 1][0]
        count, places = previous.shape
        best = np.full(previous.shape, np.inf)
        best_D, best_P = np.zeros(best.shape, dtype=np.int64), np.zeros(best.shape, dtype=np.int64)
        rates_DPP = self._rates(stage)
        window = max(1, (count - 1) // stage)
        rows = np.arange(places)
        for fewer in range(count - 1):
            if not np.isfinite(previous[fewer]).any():
                continue
            onward_P = previous[fewer]
            if stage > 1:
                onward_P = np.maximum(onward_P, self._crossing_s(fewer, window))
            for more in range(fewer + 1, count):
                with np.errstate(divide="ignore"):
                    seconds_PP = self._microbatches / (rates_DPP[more] - rates_DPP[fewer])
                seconds_PP = seconds_PP + self._sum_s(fewer, more)
                through = np.maximum(onward_P[None], seconds_PP)
                stop = np.argmin(through, axis=1)
                value = through[rows, stop]
                better = value < best[more]
                best[more][better] = value[better]
                best_D[more][better] = fewer
                best_P[more][better] = stop[better]
        return best, best_D, best_P

    def _rates(self, stage: int) -> Floats:
        """Return (D + 1, P, P): the speed of the first machines together on each range, as the `stage`-th from last.

        A holder must have room for as many microbatches as stages follow, itself counted (1F1B).
        """
        held_D = stage + self._owner_after + self._heap_D
        need_DPP = self._fixed_PP[None] + held_D[:, None, None] * self._flight_PP[None]
        usable = np.isfinite(self._seconds_DPP) & (need_DPP <= self._budget_D[:, None, None])
        rates = np.where(usable, 1 / np.where(usable, self._seconds_DPP, 1.0), 0.0)
        return np.concatenate([np.zeros((1, *rates.shape[1:])), np.cumsum(rates, axis=0)])

    def _sum_s(self, fewer: int, more: int) -> Floats:
        holders = more - fewer
        if holders == 1:
            return np.zeros_like(self._weights_PP)
        one = np.arange(fewer, more)
        other = np.roll(one, -1)
        rate = float(self._link[one, other].min())
        if rate <= 0:
            return np.full_like(self._weights_PP, np.inf)
        rounds = 2 * (holders - 1)
        return np.asarray(rounds * (self._weights_PP / holders / rate + float(self._delay[one, other].max())))

    def _crossing_s(self, place: int, window: int) -> Floats:
        """Return, by position, the seconds of a step's tensors between the machines before and from `place` on."""
        after = slice(max(0, place - window), place)
        before = slice(place, place + window)
        out, home = float(self._link[before, after].sum()), float(self._link[after, before].sum())
        if out <= 0 or home <= 0:
            return np.full(len(self._positions), np.inf)
        return np.asarray(self._microbatches * np.maximum(self._bytes_P[0] / out, self._bytes_P[1] / home))
