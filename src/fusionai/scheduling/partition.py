"""Splitting a line of work over unequal devices: the numerical core of the planner.

The line has positions 0..P-1; a stage is a range [i, j) of it. Devices are ordered and cut points chosen together, to
minimise

    latency + (microbatches - 1) * bottleneck

where latency is the time of one microbatch through everything, both ways, and bottleneck the largest share of a
microbatch that any device or link carries: the step time of an ideal pipeline. For one threshold on the bottleneck, a
dynamic programme over (devices used, first device, position) finds the least latency exactly; lowering the threshold
step by step walks the Pareto frontier, on which the optimum lies.

That covers every order of every set of devices, and its work doubles with each device: up to about 11 devices at 100
cut positions. Above `EXACT_WORK`, cuts are still exact for an order of devices, but orders are searched: the fastest
devices in chains of near neighbours, improved by swaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EXACT_WORK = 5e7
"""Element operations of one threshold above which orders are searched instead of enumerated (~0.3 s)."""


NO_LIMIT = 1 << 30
"""Stands for any number of microbatches in flight."""


@dataclass(frozen=True, slots=True)
class Line:
    """The work and the devices. P positions, D devices; index D of `hop` axes is what lies before and after the line.

    All seconds are of one microbatch, forward and backward together where not said otherwise.
    """

    seconds_DPP: Floats
    """Seconds of range [i, j) on device d; inf where j <= i."""
    delay_s_DPP: Floats
    """Those of them that delay a microbatch: what is computed after its gradients have left does not."""
    fixed_bytes_PP: Floats
    """Memory of range [i, j) whatever is in flight."""
    flight_bytes_PP: Floats
    """Memory of range [i, j) for each microbatch in flight."""
    heap_microbatches_D: Floats
    """Microbatches whose memory is taken besides those in flight (`estimator.heap_microbatches`)."""
    budget_bytes_D: Floats
    hop_s_EEP: Floats
    """(D+1, D+1, P): seconds from device a to device b and back at position p; inf where they cannot be linked."""
    hop_busy_s_EEP: Floats
    """The same shape: the larger of the seconds that sending occupies the link, forward and backward."""
    microbatches: int
    outer_s: float = 0.0
    """Seconds of the stages before and after the line, on a machine of their own."""
    outer_stages_after: int = 0
    in_flight_limit: int = NO_LIMIT
    in_flight_per_stage: float = 1.0
    """Microbatches in flight for each stage to go after a stage: 1 where links take no time, more where they do."""

    @property
    def devices(self) -> int:
        """Number of devices D."""
        return len(self.seconds_DPP)

    @property
    def positions(self) -> int:
        """Number of positions P."""
        return len(self.fixed_bytes_PP)

    def in_flight(self, stages_left: int) -> int:
        """Return the microbatches held by a stage with `stages_left` stages of the line to go, itself included."""
        later = stages_left - 1 + self.outer_stages_after
        wanted = 1 + math.ceil(later * self.in_flight_per_stage)
        return max(1, min(self.microbatches, self.in_flight_limit, wanted))


@dataclass(frozen=True, slots=True)
class Split:
    """A solution: stage k runs [bounds[k], bounds[k+1]) on devices[k]."""

    devices: tuple[int, ...]
    bounds: tuple[int, ...]
    latency_s: float
    bottleneck_s: float

    def objective_s(self, microbatches: int) -> float:
        """Step time of an ideal pipeline."""
        return self.latency_s + (microbatches - 1) * self.bottleneck_s


def split(
    line: Line,
    counts: Sequence[int],
    *,
    tolerance: float = 1e-3,
    keep: int = 4,
    exchanges: int = 40,
) -> list[Split]:
    """Return the best splits over any of `counts` devices, best first, at most `keep`; empty when none is possible.

    `exchanges`: neighbour orders to try where there are too many to try all.

    The first is optimal up to the relative `tolerance`, when the search is exact (see the module).
    """
    counts = sorted({count for count in counts if 1 <= count <= min(line.devices, line.positions - 1)})
    if not counts:
        return []
    work = 2.0**line.devices * line.devices / 2 * line.positions**2
    found: list[Split] = []
    if work <= EXACT_WORK:
        found = list(frontier(line, lambda limit_s: _best_of_sets(line, counts, limit_s), tolerance))
    else:
        for count in _few(counts):
            found += _search_orders(line, count, max(tolerance, 5e-3), exchanges)
    unique = {(each.devices, each.bounds): each for each in found}
    return sorted(unique.values(), key=lambda each: each.objective_s(line.microbatches))[:keep]


# --- the frontier -------------------------------------------------------------------------------------------


def frontier(
    line: Line, search: Callable[[float], Split | None], tolerance: float, *, warm_steps: int = 8
) -> Iterator[Split]:
    """Yield splits among which is the optimum, `search(limit_s)` giving the least latency with no share above it."""
    first = search(math.inf)
    if first is None:
        return
    yield first
    rounds = line.microbatches - 1
    if rounds == 0:
        return
    best_s = first.objective_s(line.microbatches)
    # Bisection for a small bottleneck: a good split early makes the walk below short.
    low_s, high_s = line.outer_s, first.bottleneck_s
    for _ in range(warm_steps):
        middle_s = (low_s + high_s) / 2
        if (found := search(middle_s)) is None:
            low_s = middle_s
            continue
        high_s = min(middle_s, found.bottleneck_s)
        best_s = min(best_s, found.objective_s(line.microbatches))
        yield found
    walked = first
    while True:
        # A better split has a smaller bottleneck than this, since its latency cannot be smaller.
        limit_s = min(
            np.nextafter(walked.bottleneck_s, 0.0),
            (best_s * (1 - tolerance) - walked.latency_s) / rounds,
        )
        if limit_s < line.outer_s or (found := search(limit_s)) is None:
            return
        walked = found
        best_s = min(best_s, found.objective_s(line.microbatches))
        yield found


def _masked(line: Line, limit_s: float, stages_left: int) -> Floats:
    """Return delays (D, P, P) with inf where a range is too slow or too large for a device."""
    held_D = line.in_flight(stages_left) + line.heap_microbatches_D
    need_DPP = line.fixed_bytes_PP[None] + held_D[:, None, None] * line.flight_bytes_PP[None]
    allowed = (line.seconds_DPP <= limit_s) & (need_DPP <= line.budget_bytes_D[:, None, None])
    return np.where(allowed, line.delay_s_DPP, np.inf)


def usable_hops(line: Line, limit_s: float) -> Floats:
    """Return seconds of hops, inf where one keeps its link busy for longer than `limit_s`."""
    return np.where(line.hop_busy_s_EEP <= limit_s, line.hop_s_EEP, np.inf)


def make_split(line: Line, devices: Sequence[int], bounds: Sequence[int]) -> Split:
    """Work out a split's latency and bottleneck."""
    outside = line.devices
    latency_s = bottleneck_s = line.outer_s
    path = [outside, *devices, outside]
    for before, after, position in zip(path, path[1:], bounds, strict=False):
        latency_s += float(line.hop_s_EEP[before, after, position])
        bottleneck_s = max(bottleneck_s, float(line.hop_busy_s_EEP[before, after, position]))
    for device, start, stop in zip(devices, bounds, bounds[1:], strict=False):
        latency_s += float(line.delay_s_DPP[device, start, stop])
        bottleneck_s = max(bottleneck_s, float(line.seconds_DPP[device, start, stop]))
    return Split(tuple(devices), tuple(bounds), latency_s, bottleneck_s)


# --- exact: every set and order ------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sets:
    """Least latency from position i on, by set of devices (bit mask) and first device."""

    latency_DP: dict[int, Floats] = field(default_factory=dict)


def _best_of_sets(line: Line, counts: Sequence[int], limit_s: float) -> Split | None:
    """Return the least-latency split over any set and order of devices, no share above `limit_s`."""
    if line.outer_s > limit_s:
        return None
    devices, last = line.devices, line.positions - 1
    hops = usable_hops(line, limit_s)
    most = max(counts)
    seconds = {left: _masked(line, limit_s, left) for left in range(1, most + 1)}
    sets = _Sets()
    best: tuple[float, int, int] | None = None
    by_size = sorted(range(1, 1 << devices), key=int.bit_count)
    for mask in by_size:
        size = mask.bit_count()
        if size > most:
            break
        table = np.full((devices, line.positions), np.inf)
        for device in range(devices):
            rest = mask & ~(1 << device)
            if rest == mask:
                continue
            if rest == 0:
                table[device] = seconds[1][device][:, last] + hops[device, devices, last]
                continue
            after_DP = sets.latency_DP.get(rest)
            if after_DP is None:
                continue
            onward_P = np.min(hops[device, :devices] + after_DP, axis=0)
            table[device] = np.min(seconds[size][device] + onward_P[None], axis=1)
        if not np.isfinite(table).any():
            continue
        sets.latency_DP[mask] = table
        if size in counts:
            totals_D = table[:, 0] + hops[devices, :devices, 0]
            device = int(np.argmin(totals_D))
            if np.isfinite(totals_D[device]) and (best is None or totals_D[device] < best[0]):
                best = float(totals_D[device]), mask, device
    if best is None:
        return None
    return _trace(line, sets, seconds, hops, best[1], best[2])


def _trace(line: Line, sets: _Sets, seconds: dict[int, Floats], hops: Floats, mask: int, device: int) -> Split:
    """Recover the split behind an entry of the table."""
    devices, bounds, position = [device], [0], 0
    while rest := mask & ~(1 << device):
        after_DP = hops[device, : line.devices] + sets.latency_DP[rest]
        total_DP = seconds[mask.bit_count()][device][position][None] + after_DP
        following, position = (int(each) for each in np.unravel_index(np.argmin(total_DP), total_DP.shape))
        devices.append(following)
        bounds.append(position)
        mask, device = rest, following
    return make_split(line, devices, [*bounds, line.positions - 1])


# --- heuristic: candidate orders, exact cuts --------------------------------------------------------------------


def _few(counts: Sequence[int]) -> list[int]:
    """Return all counts, or a geometric selection of many."""
    if len(counts) <= 6:
        return list(counts)
    chosen, wanted = [counts[-1]], 1.0
    while wanted < counts[-1]:
        chosen.append(min(counts, key=lambda count: abs(count - wanted)))
        wanted *= 1.6
    return sorted(set(chosen))


def best_of_order(line: Line, order: Sequence[int], limit_s: float) -> Split | None:
    """Return the least-latency cuts for devices in a given order, no share above `limit_s`."""
    if line.outer_s > limit_s:
        return None
    outside, last = line.devices, line.positions - 1
    path = np.asarray([outside, *order, outside])
    used = path[:-1], path[1:]
    # Only the hops of this order: there are as many as devices, of all their square.
    hops = np.where(line.hop_busy_s_EEP[used] <= limit_s, line.hop_s_EEP[used], np.inf)
    latency_P = np.full(line.positions, np.inf)
    latency_P[last] = 0.0
    choices: list[NDArray[np.intp]] = []
    for left, device in enumerate(reversed(order), start=1):
        held = line.in_flight(left) + line.heap_microbatches_D[device]
        need_PP = line.fixed_bytes_PP + held * line.flight_bytes_PP
        allowed = (line.seconds_DPP[device] <= limit_s) & (need_PP <= line.budget_bytes_D[device])
        onward_P = hops[-left] + latency_P
        total_PP = np.where(allowed, line.delay_s_DPP[device], np.inf) + onward_P[None]
        choices.append(np.argmin(total_PP, axis=1))
        latency_P = np.take_along_axis(total_PP, choices[-1][:, None], axis=1)[:, 0]
    if not np.isfinite(latency_P[0] + hops[0, 0]):
        return None
    bounds = [0]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    return make_split(line, order, bounds)


def _search_orders(line: Line, count: int, tolerance: float, exchanges: int) -> list[Split]:
    """Return splits over `count` devices, from chains of near neighbours improved by swaps.

    The fastest devices are taken; the order starts as a chain of cheapest hops from each of a few devices, or by
    falling memory (early stages hold the most microbatches). Local search swaps two devices, or one for one left out.
    """

    def solve(order: tuple[int, ...]) -> list[Split]:
        return list(frontier(line, lambda limit_s: best_of_order(line, order, limit_s), tolerance, warm_steps=6))

    def value(splits: list[Split]) -> float:
        return min((each.objective_s(line.microbatches) for each in splits), default=math.inf)

    last = line.positions - 1
    speed = np.argsort(line.seconds_DPP[:, 0, last], kind="stable")
    memory = np.argsort(-line.budget_bytes_D, kind="stable")
    chosen = [int(device) for device in speed[:count]]
    spare = [int(device) for device in speed[count : 2 * count]]
    starts = {_chain(line, chosen, first) for first in [None, *chosen[:3]]}
    starts.add(tuple(int(device) for device in memory if device in set(chosen)))
    starts.add(tuple(int(device) for device in memory[:count]))
    best_order, best = min(((order, solve(order)) for order in sorted(starts)), key=lambda pair: value(pair[1]))
    random = np.random.default_rng(count)
    for _ in range(exchanges if count > 1 or spare else 0):
        order = list(best_order)
        place = int(random.integers(count))
        outsiders = [device for device in spare if device not in order]
        if outsiders and (count == 1 or random.random() < 0.3):
            order[place] = outsiders[int(random.integers(len(outsiders)))]
        else:
            other = int(random.integers(count))
            order[place], order[other] = order[other], order[place]
        tried = solve(tuple(order))
        if value(tried) < value(best):
            best_order, best = tuple(order), tried
    return best


def _chain(line: Line, chosen: Sequence[int], first: int | None) -> tuple[int, ...]:
    """Return `chosen` in the order of the cheapest next hop."""
    typical_EE = np.nanmin(line.hop_s_EEP, axis=2)
    left, order = list(chosen), []
    at = line.devices
    if first is not None:
        left.remove(first)
        order.append(first)
        at = first
    while left:
        at = min(left, key=lambda device: (float(typical_EE[at, device]), device))
        left.remove(at)
        order.append(at)
    return tuple(order)
