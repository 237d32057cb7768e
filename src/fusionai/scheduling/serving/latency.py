"""The route on which one stream gets its tokens fastest: fewest and fastest machines, as the links allow.

A shortest path over (position, machine) would use a fast machine twice, for two ranges. So states also count how often
machines were used, at first none of them, then those that the best path used too often, until it uses none too often
(decremental state space relaxation: Righini and Salani, Networks 2008). Each relaxed optimum is a lower bound, so the
last one is the optimum. Machines of the same kind, with the same links to everybody, are counted together. When too
many would have to be counted, the rest is done greedily, and the bound says by how much that may be off.

Array suffixes: C = classes of machines, P = positions, U = combinations of counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionai.scheduling.links import Indices
from fusionai.scheduling.serving.serving_evaluation import Evaluator, HeldRange

_MOST_STATES = 40_000_000
"""Positions x classes x classes x combinations of counts that are worked through at most."""


@dataclass(frozen=True, slots=True)
class Route:
    """Where one stream goes, and the seconds between two of its tokens."""

    shares: tuple[HeldRange, ...]
    token_s: float
    bound_s: float
    """No route is faster."""


def fastest_route(evaluator: Evaluator) -> Route | None:
    """Return the fastest route, None if no machines in reach of each other hold the model."""
    search = _Search(evaluator)
    counted: list[int] = []
    while True:
        path = search.path(counted)
        if path is None:
            return None
        token_s, steps = path
        over = search.overused(steps)
        if not over:
            return Route(search.shares(steps), token_s, token_s)
        grown = [*counted, *over]
        if search.states(grown) > _MOST_STATES:
            return search.greedy(token_s)
        counted = grown


Step = tuple[int, int, int]
"""Class, first, last."""


class _Search:
    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator, self.task = evaluator, evaluator.task
        task = self.task
        self.classes = _classes(evaluator)
        first = np.asarray([members[0] for members in self.classes])
        second = np.asarray([members[min(1, len(members) - 1)] for members in self.classes])
        gateway = task.gateway
        crossing = task.model.crossing_bytes_P
        with np.errstate(divide="ignore"):
            per_byte = 1 / task.bandwidth_NN
        rows, columns = first[:, None], np.where(np.eye(len(first), dtype=bool), second[None], first[None])
        # A class of one cannot be followed by itself: the link of a machine to itself is none.
        self.hop_PCC = task.delay_NN[rows, columns] + crossing[:, None, None] * per_byte[rows, columns]
        self.enter_C = task.delay_NN[gateway, first] + crossing[task.front] * per_byte[gateway, first]
        self.leave_C = task.delay_NN[first, gateway] + crossing[task.back] * per_byte[first, gateway]
        kinds = evaluator.kind_of[first]
        times = evaluator.times.at(kinds)
        self.seconds_CPP = np.where(times.sequences >= 1, times.pass_s(1.0), np.inf)

    def states(self, counted: Sequence[int]) -> int:
        classes = len(self.classes)
        radix = math.prod(len(self.classes[each]) + 1 for each in counted)
        return len(self.task.model.positions) * classes * classes * radix

    def path(self, counted: Sequence[int], removed: NDArray[np.bool_] | None = None) -> tuple[float, list[Step]] | None:
        """Return the fastest path that uses no counted class more often than it has machines."""
        task, classes = self.task, len(self.classes)
        front, back = task.front, task.back
        sizes = [len(self.classes[each]) + 1 for each in counted]
        combinations = list(itertools.product(*(range(size) for size in sizes)))
        index = {counts: place for place, counts in enumerate(combinations)}
        seconds = self.seconds_CPP if removed is None else np.where(removed[:, None, None], np.inf, self.seconds_CPP)
        # after[u, c]: the combination that follows u when class c is used once more, -1 if there is none.
        after = np.zeros((len(combinations), classes), dtype=np.int64)
        for place, counts in enumerate(combinations):
            after[place] = place
            for digit, each in enumerate(counted):
                more = (*counts[:digit], counts[digit] + 1, *counts[digit + 1 :])
                after[place, each] = index.get(more, -1)
        best_PUC = np.full((back + 1, len(combinations), classes), np.inf)
        came: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        for position in range(front, back):
            if position == front:
                arrival = np.full((len(combinations), classes), np.inf)
                arrival[0] = self.enter_C
                source = np.full((len(combinations), classes), -1)
            else:
                here = best_PUC[position]
                if not np.isfinite(here).any():
                    continue
                ways = here[:, :, None] + self.hop_PCC[position][None]
                source = ways.argmin(axis=1)
                arrival = np.take_along_axis(ways, source[:, None], axis=1)[:, 0]
            for combination, each in zip(*np.nonzero(np.isfinite(arrival)), strict=True):
                target = after[combination, each]
                if target < 0:
                    continue
                reached = arrival[combination, each] + seconds[each, position, position + 1 : back + 1]
                better = reached < best_PUC[position + 1 :, target, each]
                if better.any():
                    best_PUC[position + 1 :, target, each][better] = reached[better]
                    for offset in np.nonzero(better)[0]:
                        key = (position + 1 + int(offset), int(target), int(each))
                        came[key] = (position, int(combination), int(source[combination, each]))
        ends = best_PUC[back] + self.leave_C[None]
        combination, each = (int(k) for k in np.unravel_index(int(ends.argmin()), ends.shape))
        if not np.isfinite(ends[combination, each]):
            return None
        total = float(ends[combination, each]) + self.evaluator.owner_s
        steps: list[Step] = []
        position = back
        while each >= 0:
            earlier, combination, previous = came[position, combination, each]
            steps.append((each, earlier, position))
            position, each = earlier, previous
        return total, steps[::-1]

    def overused(self, steps: Sequence[Step]) -> list[int]:
        """Return the classes that have fewer machines than steps."""
        used = [each for each, _, _ in steps]
        return [each for each in sorted(set(used)) if used.count(each) > len(self.classes[each])]

    def shares(self, steps: Sequence[Step]) -> tuple[HeldRange, ...]:
        """Give each step a machine of its class."""
        left = [list(members) for members in self.classes]
        return tuple(HeldRange(last, first, int(left[each].pop(0))) for each, first, last in steps)

    def greedy(self, bound_s: float) -> Route | None:
        """Return a route by shutting out the class that costs least to lose, over and over, of those used too often."""
        removed = np.zeros(len(self.classes), dtype=bool)
        counted: list[int] = []
        while (path := self.path(counted, removed)) is not None:
            over = self.overused(path[1])
            if not over:
                return Route(self.shares(path[1]), path[0], bound_s)
            countable = [each for each in over if self.states([*counted, each]) <= _MOST_STATES]
            if countable:
                counted.append(countable[0])
            else:
                removed[over[-1]] = True
        return None


def _classes(evaluator: Evaluator) -> list[Indices]:
    """Return the members by class: the same device, and the same links with everybody outside and with each other."""
    task = evaluator.task
    figures = np.stack([task.bandwidth_NN, task.bandwidth_NN.T, task.delay_NN, task.delay_NN.T])
    classes: list[list[int]] = []
    for machine in range(len(task.members)):
        for members in classes:
            if evaluator.kind_of[machine] == evaluator.kind_of[members[0]] and _alike(figures, members, machine):
                members.append(machine)
                break
        else:
            classes.append([machine])
    return [np.asarray(members) for members in classes]


def _alike(figures: NDArray[np.float64], members: Sequence[int], machine: int) -> bool:
    """Whether a machine's links are those of a class: with others, and among each other."""
    outside = np.ones(figures.shape[-1], dtype=bool)
    outside[[*members, machine]] = False
    if not np.array_equal(figures[:, members[0], outside], figures[:, machine, outside]):
        return False
    pairs = [figures[:, one, other] for one, other in itertools.permutations([*members, machine], 2)]
    return all(np.array_equal(pair, pairs[0]) for pair in pairs)
