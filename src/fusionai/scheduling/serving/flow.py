"""The most that flows from the gateway through machines and back, quick routes first.

Successive shortest paths. As long as there is a free route along the model, the quickest is filled; then residual
arcs are searched too, until none leads to the end, which makes the flow a maximum (Ford and Fulkerson, 1956). Flows
of machines that could be quicker by a swap are left: the time of a route matters less than what passes. A library's
network simplex takes a hundred times as long, and the planner needs hundreds of flows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_NOTHING = 1e-9
"""Share of the largest capacity that counts as none."""


@dataclass(frozen=True, slots=True)
class Arc:
    """From machine to machine; `SOURCE` and `SINK` are the gateway."""

    tail: int
    head: int
    capacity: float
    cost_s: float


SOURCE = -1
SINK = -2


def most_flow(capacities: Sequence[float], costs_s: Sequence[float], arcs: Sequence[Arc]) -> list[float]:
    """Return the flow over each arc.

    Args:
        capacities: of the machines.
        costs_s: seconds that passing each machine takes.
        arcs: each leads to a machine with a higher number, to `SINK`, or from `SOURCE`.
    """
    count = len(capacities)
    network = _Network(2 * count + 2)
    source, sink = 2 * count, 2 * count + 1
    for machine in range(count):
        network.add(2 * machine, 2 * machine + 1, capacities[machine], costs_s[machine])
    places = [
        network.add(
            source if arc.tail == SOURCE else 2 * arc.tail + 1,
            sink if arc.head == SINK else 2 * arc.head,
            arc.capacity,
            arc.cost_s,
        )
        for arc in arcs
    ]
    order = [source, *range(2 * count)]
    while network.augment(network.along(order, source, sink), source, sink):
        pass
    while network.augment(network.anyhow(source, sink), source, sink):
        pass
    return [network.left[place + 1] for place in places]


class _Network:
    """Arcs in pairs: an arc at an even place, and its residual one after it."""

    def __init__(self, nodes: int) -> None:
        self.out: list[list[int]] = [[] for _ in range(nodes)]
        self.head: list[int] = []
        self.left: list[float] = []
        self.cost: list[float] = []
        self.most = 0.0

    def add(self, tail: int, head: int, capacity: float, cost_s: float) -> int:
        place = len(self.head)
        self.out[tail].append(place)
        self.out[head].append(place + 1)
        self.head += [head, tail]
        self.left += [capacity, 0.0]
        self.cost += [cost_s, -cost_s]
        if capacity < math.inf:
            self.most = max(self.most, capacity)
        return place

    def along(self, order: Sequence[int], source: int, sink: int) -> list[int] | None:
        """Return by node the arc on the quickest route to it that goes forward only, None if the sink has none."""
        far, came = [math.inf] * len(self.out), [-1] * len(self.out)
        far[source] = 0.0
        head, left, cost, nothing = self.head, self.left, self.cost, _NOTHING * self.most
        for node in order:
            here = far[node]
            if here == math.inf:
                continue
            for place in self.out[node]:
                if not place & 1 and left[place] > nothing and here + cost[place] < far[head[place]]:
                    far[head[place]] = here + cost[place]
                    came[head[place]] = place
        return came if far[sink] < math.inf else None

    def anyhow(self, source: int, sink: int) -> list[int] | None:
        """The same over all arcs, whatever the time: the fewest arcs."""
        came = [-1] * len(self.out)
        seen = [False] * len(self.out)
        seen[source] = True
        nothing, waiting = _NOTHING * self.most, deque([source])
        while waiting:
            for place in self.out[waiting.popleft()]:
                head = self.head[place]
                if not seen[head] and self.left[place] > nothing:
                    seen[head], came[head] = True, place
                    if head == sink:
                        return came
                    waiting.append(head)
        return None

    def augment(self, came: list[int] | None, source: int, sink: int) -> bool:
        """Fill a route."""
        if came is None:
            return False
        route = []
        node = sink
        while node != source:
            route.append(came[node])
            node = self.head[came[node] ^ 1]
        amount = min(self.left[place] for place in route)
        if amount == math.inf:
            raise ValueError("a route without a capacity has no largest flow")
        for place in route:
            self.left[place] -= amount
            self.left[place ^ 1] += amount
        return True
