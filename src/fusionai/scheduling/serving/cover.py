"""Ranges for machines so that every segment is held by enough of them.

Without limits of links, what a placement passes is the least of the rates that hold a segment, summed over the machines
that do: at each border, what ends there finds room with those that go on. So a target rate is met by filling every
segment up to it. Machines are put, one after another and over and over, where they fill most of what is missing.

Array suffixes: S = segments, L = lengths of ranges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusionai.scheduling.links import Floats

_SWEEPS = 3
_HALVINGS = 14
_NEAR = 0.98


@dataclass(frozen=True, slots=True, eq=False)
class Filler:
    """Rates of one kind of machine for ranges of up to L segments from each start."""

    rate_SL: Floats
    """0 where the range does not fit or goes beyond the end; column k is of k + 1 segments."""

    @classmethod
    def of(cls, rate_PP: Floats) -> Filler:
        """Return the rates by start and length, from a table by start and stop."""
        count = len(rate_PP) - 1
        starts, stops = np.nonzero(rate_PP > 0)
        longest = int((stops - starts).max(initial=1))
        rates = np.zeros((count, longest))
        rates[starts, stops - starts - 1] = rate_PP[starts, stops]
        return cls(rates)

    def best(self, missing_S: Floats, low: int, high: int) -> tuple[float, int, int]:
        """Return the most that a range within [low, high) fills of what is missing, and the range."""
        longest = min(self.rate_SL.shape[1], high - low)
        rate = self.rate_SL[low:high, :longest]
        padded = np.concatenate([missing_S[low:high], np.zeros(longest)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, longest)[: high - low]
        # filled[s, l]: what a range of l + 1 segments fills in all of them.
        gains = np.cumsum(np.minimum(rate[:, None, :], windows[:, :, None]), axis=1)
        filled = np.diagonal(gains, axis1=1, axis2=2).copy()
        lengths = np.arange(1, longest + 1)
        filled[np.arange(low, high)[:, None] + lengths[None] > high] = 0.0
        start, length = (int(k) for k in np.unravel_index(int(filled.argmax()), filled.shape))
        return float(filled[start, length]), low + start, low + start + length + 1


def fill(
    fillers: Sequence[Filler],
    zones: Sequence[tuple[int, int]],
    target: float,
    segments: int,
    begin: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[tuple[int, int]], float]:
    """Return a range for each machine, (0, 0) for none, and the least share of `target` that holds any segment.

    Args:
        fillers: the machines' rates.
        zones: where each may be put, as [first, last).
        target: rate that every segment in any zone should have.
        segments: of the model.
        begin: ranges to start from.
    """
    wanted_S = np.zeros(segments)
    for low, high in zones:
        wanted_S[low:high] = target
    ranges = list(begin or [(0, 0)] * len(fillers))
    held_S = np.zeros(segments)
    for filler, (first, last) in zip(fillers, ranges, strict=True):
        held_S[first:last] += _rate(filler, first, last)
    order = sorted(range(len(fillers)), key=lambda k: -float((fillers[k].rate_SL.max(axis=0)).sum()))
    for _ in range(_SWEEPS):
        changed = False
        for machine in order:
            filler, (first, last) = fillers[machine], ranges[machine]
            held_S[first:last] -= _rate(filler, first, last)
            missing_S = np.maximum(wanted_S - held_S, 0.0)
            now = float(np.minimum(missing_S[first:last], _rate(filler, first, last)).sum())
            gain, start, stop = filler.best(missing_S, *zones[machine])
            if gain > now * (1 + 1e-9) + 1e-12:
                ranges[machine] = first, last = start, stop
                changed = True
            held_S[first:last] += _rate(filler, first, last)
        if not changed or (held_S >= wanted_S * (1 - 1e-9)).all():
            break
    needed = wanted_S > 0
    return ranges, float((held_S[needed] / wanted_S[needed]).min(initial=1.0))


def cover(
    fillers: Sequence[Filler], zones: Sequence[tuple[int, int]], most: float, segments: int
) -> tuple[list[tuple[int, int]], float]:
    """Return ranges that hold every segment in the zones at as high a rate as is found, up to `most`, and the rate."""
    best, rate = [(0, 0)] * len(fillers), 0.0
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        target = math.sqrt(low * high) if low else high / 2
        ranges, share = fill(fillers, zones, target, segments)
        if share * target > rate:
            best, rate = ranges, share * target
        if share >= 1 - 1e-9:
            low = target
        else:
            low, high = max(low, rate), target
        if low > _NEAR * high:
            break
    return best, rate


def _rate(filler: Filler, first: int, last: int) -> float:
    return float(filler.rate_SL[first, last - first - 1]) if last > first else 0.0
