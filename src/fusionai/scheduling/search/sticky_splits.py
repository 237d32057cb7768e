"""Splits that trade a short step for few bytes moved, by the solver of `partition`.

The seconds that a machine waits for the weights of a range, spread over the steps left, are added to the solver's
latency of that range. It minimises

    latency + share * moving / steps_left + (microbatches - 1) * bottleneck

over cuts, and for few machines over every set and order of them as well. `moving` sums what every machine waits for;
in truth machines wait at the same time, so smaller shares are tried too, and what comes out is ranked with the true
time of its moves.

Array suffixes: P = positions, D = machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

import numpy as np
from numpy.typing import NDArray

from fusionai.graph.model import WeightKey
from fusionai.scheduling.partition import Line, Split, best_of_order, frontier, make_split, split
from fusionai.scheduling.search.one_pipeline_candidates import Placed
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.transfers import Holders, TransferSchedule

Floats = NDArray[np.float64]

_SHARES = (1.0, 0.3, 0.0)
"""Shares of the summed waiting that are tried: all of it, about one of three machines, nothing."""

FEW_STEPS = 10
"""Splits are sought as if no more steps were left, too: the nearest of many that are about equally fast."""

_EXACT_WORK = 4e6
"""As `partition.EXACT_WORK`, but lower: several searches are made. About 8 machines at 50 positions."""

_MOST_ORDERS = 120
"""Orders of machines that one round tries; each takes some milliseconds."""

_ROUNDS = 3
"""How often the orders around the best one are tried."""

_TOLERANCE = 5e-3


@dataclass(frozen=True, slots=True)
class Group:
    """Weights that the same segments read and the same machines hold."""

    segments: tuple[int, ...]
    holders: frozenset[str]
    nbytes: int


class Weighing:
    """What a split costs: the solver's step and its moves. `peers` are the line's machines."""

    def __init__(
        self, line: Line, groups: Sequence[Group], peers: Sequence[str], transfers: TransferSchedule, steps_left: int
    ) -> None:
        self.line, self.steps_left, self.few_steps = line, steps_left, min(steps_left, FEW_STEPS)
        self._peers, self._transfers, self._groups = peers, transfers, groups
        self._by_segment: list[list[int]] = [[] for _ in range(line.positions - 1)]
        for index, group in enumerate(groups):
            for segment in group.segments:
                self._by_segment[segment].append(index)
        self.waiting_DPP = np.stack([self._waiting_s(peer) for peer in peers])

    def _waiting_s(self, peer: str) -> Floats:
        """Return the seconds (P, P) for which a machine receives the weights of a range that it lacks."""
        count = self.line.positions
        seconds = np.zeros(count - 1)
        shared: list[tuple[float, tuple[int, ...]]] = []
        for group in self._groups:
            if peer in group.holders:
                continue
            wait_s = group.nbytes * self._transfers.byte_s(group.holders, peer)
            seconds[list(group.segments)] += wait_s
            shared.append((wait_s, group.segments))
        total = np.concatenate([[0.0], np.cumsum(seconds)])
        table_PP = total[None] - total[:, None]
        for wait_s, segments in shared:
            for earlier, later in pairwise(segments):
                # A weight that several segments read comes once.
                table_PP[: earlier + 1, later + 1 :] -= wait_s
        return np.where(np.tri(count, dtype=bool), 0.0, table_PP)

    def with_moves(self) -> list[Line]:
        """Return the line with more or less of the waiting in its delays, most first."""
        weights = sorted({share / self.steps_left for share in _SHARES} | {1 / self.few_steps}, reverse=True)
        return [replace(self.line, delay_s_DPP=self.line.delay_s_DPP + weight * self.waiting_DPP) for weight in weights]

    def seconds(self, placed: Placed, steps: int) -> float:
        """Return the seconds that so many steps and the moves before them take, as the solver reckons steps."""
        machines, bounds = placed
        loads: dict[tuple[str, str], int] = {}
        for machine, (start, stop) in zip(machines, pairwise(bounds), strict=True):
            peer = self._peers[machine]
            for index in {index for segment in range(start, stop) for index in self._by_segment[segment]}:
                group = self._groups[index]
                if peer not in group.holders:
                    way = self._transfers.source(group.holders, peer), peer
                    loads[way] = loads.get(way, 0) + group.nbytes
        step_s = make_split(self.line, machines, bounds).objective_s(self.line.microbatches)
        return steps * step_s + self._transfers.moves_s(loads)


def weight_groups(costs: SegmentCosts, before: Holders, nbytes: Mapping[WeightKey, int]) -> list[Group]:
    """Return the weights that the segments read, in groups."""
    problem = costs.problem
    inner = [position for position in costs.positions if 0 < position < len(problem.graph.nodes)]
    stages = problem.costs.cut(problem.graph, problem.sizes, inner).stages
    readers: dict[WeightKey, list[int]] = {}
    for segment, stage in enumerate(stages[costs.before : costs.before + costs.count]):
        for key in stage.keys:
            readers.setdefault(key, []).append(segment)
    sums: dict[tuple[tuple[int, ...], frozenset[str]], int] = {}
    for key, places in readers.items():
        alike = tuple(places), before.get(key, frozenset())
        sums[alike] = sums.get(alike, 0) + nbytes[key]
    return [Group(places, holders, size) for (places, holders), size in sums.items()]


def exact(line: Line) -> bool:
    """Whether every set and order of the machines is searched."""
    return 2.0**line.devices * line.devices / 2 * line.positions**2 <= _EXACT_WORK


def splits(weighing: Weighing, counts: Sequence[int], orders: Sequence[tuple[int, ...]]) -> set[Placed]:
    """Return splits worth a closer look; `orders` are machines in order to begin with."""
    line = weighing.line
    if exact(line):
        made = [each for with_moves in weighing.with_moves() for each in split(with_moves, counts, keep=12)]
        return {(each.devices, each.bounds) for each in made}
    found: set[Placed] = set()
    best: tuple[float, tuple[int, ...]] | None = None
    tried: set[tuple[int, ...]] = set()
    # The last line ignores the bytes: the planner of fresh jobs has searched it.
    lines = weighing.with_moves()[:-1]
    waiting = list(orders)
    for _ in range(_ROUNDS):
        improved = False
        for order in waiting[:_MOST_ORDERS]:
            if order in tried or len(order) not in counts:
                continue
            tried.add(order)
            for each in _cuts_of(lines if order in orders else lines[:1], order):
                placed = each.devices, each.bounds
                found.add(placed)
                seconds = weighing.seconds(placed, weighing.steps_left)
                if best is None or seconds < best[0]:
                    best, improved = (seconds, order), True
        if best is None or not improved:
            break
        waiting = _spread(list(near_orders(best[1], line.devices)), _MOST_ORDERS)
    return found


def _cuts_of(lines: Sequence[Line], order: tuple[int, ...]) -> Iterator[Split]:
    """Yield the cuts of an order on the way to the best ones."""

    def search(line: Line) -> Callable[[float], Split | None]:
        return lambda limit_s: best_of_order(line, order, limit_s)

    for line in lines:
        yield from frontier(line, search(line), _TOLERANCE, warm_steps=6)


def near_orders(order: tuple[int, ...], machines: int) -> Iterator[tuple[int, ...]]:
    """Yield orders one change away: one machine fewer, two swapped, an idle one for another or between two."""
    idle = [each for each in range(machines) if each not in order]
    places = range(len(order))
    for place in places:
        yield order[:place] + order[place + 1 :]
    for each, place in product(idle, places):
        yield (*order[:place], each, *order[place + 1 :])
    for each, place in product(idle, range(len(order) + 1)):
        yield (*order[:place], each, *order[place:])
    for one, other in combinations(places, 2):
        swapped = list(order)
        swapped[one], swapped[other] = swapped[other], swapped[one]
        yield tuple(swapped)


def _spread(orders: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Return at most `most` of them, evenly chosen."""
    step = max(1.0, len(orders) / most)
    return [orders[int(k * step)] for k in range(min(most, len(orders)))]
