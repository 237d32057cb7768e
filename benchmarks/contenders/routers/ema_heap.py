"""Routing as in SWARM (Ryabinin et al. 2023, arXiv 2301.11913, "stochastic wiring"): the baseline.

As the paper describes it: whoever sends keeps, for the peers of the next stage, an exponential moving average of their
response times and a queue ordered by priority. It takes the peer of the least priority and adds that peer's average to
it, so peers are used in proportion to 1 / average (interleaved weighted round-robin). A peer that does not answer is
banned until it announces itself again.

Ours, where the paper's text was not at hand: the smoothing factor; the first response is taken whole; a new peer starts
at the least priority of the others; a sender waits `patience` times a peer's average, at least `least_wait_s`. Response
time runs from handing the microbatch over until the report of its forward is back.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from contenders.routers.route_policy import Hop, RoutePolicy
from fusionai.errors import ConfigError

_UNKNOWN_S = 1e-3
"""Average of a peer that has not answered yet: small, so that it is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaHeapConfig:
    """Raises ConfigError for values out of range."""

    smoothing: float = 0.1
    """Weight of the newest response."""
    patience: float = 4.0
    """Multiples of a peer's average after which it is given up."""
    least_wait_s: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.smoothing <= 1:
            raise ConfigError(f"smoothing must be in (0, 1], got {self.smoothing}")
        if not (self.patience > 0 and self.least_wait_s > 0):
            raise ConfigError(f"patience and least_wait_s must be > 0, got {self.patience} and {self.least_wait_s}")


class _Heap:
    """One sender's view of the holders of one stage."""

    def __init__(self) -> None:
        self.average_s: dict[int, float] = {}
        self.banned: set[int] = set()
        self._priority: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def meet(self, machine: int) -> None:
        """Add a machine that is not known yet."""
        if machine not in self._priority:
            self._put(machine, min(self._priority.values(), default=0.0))

    def take(self, allowed: set[int]) -> int:
        """Return the allowed machine of least priority, its priority raised by its average."""
        aside: list[tuple[float, int]] = []
        while True:
            priority, machine = heapq.heappop(self._heap)
            if self._priority.get(machine) != priority:
                continue  # an outdated entry
            if machine in allowed:
                break
            aside.append((priority, machine))
        for entry in aside:
            heapq.heappush(self._heap, entry)
        self._put(machine, priority + self.average_s.get(machine, _UNKNOWN_S))
        return machine

    def forget(self, machine: int) -> None:
        self._priority.pop(machine, None)
        self.average_s.pop(machine, None)
        self.banned.discard(machine)

    def _put(self, machine: int, priority: float) -> None:
        self._priority[machine] = priority
        heapq.heappush(self._heap, (priority, machine))


class EmaHeap(RoutePolicy):
    """Every sender's heaps."""

    def __init__(self, config: EmaHeapConfig | None = None) -> None:
        self._config = config or EmaHeapConfig()
        self._heaps: dict[tuple[int, int], _Heap] = {}

    def choose(self, hop: Hop, candidates: Sequence[int]) -> int:
        """Return the machine of least priority; if all are banned, all are tried again."""
        heap = self._of(hop.sender, hop.stage)
        for machine in candidates:
            heap.meet(machine)
        allowed = set(candidates) - heap.banned
        if not allowed:
            heap.banned -= set(candidates)
            allowed = set(candidates)
        return heap.take(allowed)

    def wait_s(self, sender: int, stage: int, machine: int) -> float:
        """Return some multiple of the machine's average."""
        average_s = self._of(sender, stage).average_s.get(machine, 0.0)
        return max(self._config.least_wait_s, self._config.patience * average_s)

    def answered(self, sender: int, stage: int, machine: int, response_s: float) -> None:
        """Update the average."""
        averages, share = self._of(sender, stage).average_s, self._config.smoothing
        before_s = averages.get(machine)
        averages[machine] = response_s if before_s is None else share * response_s + (1 - share) * before_s

    def unanswered(self, sender: int, stage: int, machine: int) -> None:
        """Ban the machine."""
        self._of(sender, stage).banned.add(machine)

    def joined(self, stage: int, machine: int) -> None:
        """Forget what was known of the machine: it has announced itself anew."""
        for (_, of_stage), heap in self._heaps.items():
            if of_stage == stage:
                heap.forget(machine)

    def _of(self, sender: int, stage: int) -> _Heap:
        return self._heaps.setdefault((sender, stage), _Heap())
