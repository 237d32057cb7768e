"""Which machines a request goes through: in proportion to a plan's flows, where there is room for its cache.

Interleaved weighted round robin, machine by machine: each way out of a machine gains credit in proportion to its flow,
the one with most credit is taken and pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusionai.scheduling.serving.serving_plan import ServingPlan


@dataclass(frozen=True, slots=True)
class Hop:
    """One machine of a route, and the segments [first, last) that it works on for the request."""

    machine: int
    first: int
    last: int


class Router:
    """Chooses routes over the shards of a plan; `free_tokens` is updated by who admits and ends requests."""

    def __init__(self, plan: ServingPlan, kv_bytes_of: Sequence[Sequence[float]], cache_bytes: Sequence[float]) -> None:
        """Prepare the ways out of each machine.

        Args:
            plan: machines are numbered as its shards.
            kv_bytes_of: by shard, the sums of a token's cache bytes before each position.
            cache_bytes: by shard, room for caches.
        """
        self.plan = plan
        self.first = min((shard.first for shard in plan.shards), default=0)
        self.end = max((shard.last for shard in plan.shards), default=0)
        self.room_bytes = list(cache_bytes)
        self._kv = kv_bytes_of
        place = {shard.peer: index for index, shard in enumerate(plan.shards)}
        self._ways: dict[int, list[tuple[int, float]]] = {}
        """By machine, -1 for the gateway: where tokens go, and how many; -1 again for the way back."""
        self._credit: dict[tuple[int, int], float] = {}
        for flow in plan.flows:
            source, target = place.get(flow.source, -1), place.get(flow.target, -1)
            self._ways.setdefault(source, []).append((target, flow.tokens_per_s))
            self._credit[source, target] = 0.0

    def route(self, tokens: int) -> tuple[Hop, ...] | None:
        """Reserve room for a sequence of so many tokens along a route; None while there is none with room."""
        hops = self._onward(-1, self.first, tokens)
        if hops is None:
            return None
        route = tuple(hops)
        for hop in route:
            self.room_bytes[hop.machine] -= self.cache_bytes(hop, tokens)
        previous = -1
        for target in (*(hop.machine for hop in route), -1):
            self._pay(previous, target)
            previous = target
        return route

    def release(self, route: Sequence[Hop], tokens: int) -> None:
        """Give the room of an ended sequence back."""
        for hop in route:
            self.room_bytes[hop.machine] += self.cache_bytes(hop, tokens)

    def cache_bytes(self, hop: Hop, tokens: int) -> float:
        """Return the bytes of a sequence's cache on one machine of its route."""
        sums = self._kv[hop.machine]
        return tokens * (sums[hop.last] - sums[hop.first])

    def _onward(self, machine: int, position: int, tokens: int) -> list[Hop] | None:
        if machine >= 0 and position == self.end:
            return []
        ways = self._ways.get(machine, [])
        total = sum(flow for _, flow in ways)
        # Credit counts as if this request's share had been added already.
        order = sorted(ways, key=lambda way: (-(self._credit[machine, way[0]] + way[1] / total), way[0]))
        for target, _ in order:
            if target < 0:
                continue
            hop = Hop(target, position, self.plan.shards[target].last)
            if self.room_bytes[target] < self.cache_bytes(hop, tokens):
                continue
            following = self._onward(target, hop.last, tokens)
            if following is not None:
                return [hop, *following]
        return None

    def _pay(self, source: int, target: int) -> None:
        ways = self._ways[source]
        total = sum(flow for _, flow in ways)
        for each, flow in ways:
            self._credit[source, each] += flow / total
        self._credit[source, target] -= 1.0
