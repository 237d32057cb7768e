"""What happens next, in order of time."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Events:
    """A queue of actions. Of the same time, those with the lower rank come first, then those that were added first."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, int, Action]] = []
        self._count = 0

    def at(self, when_s: float, action: Action, *, rank: int = 0) -> None:
        """Add an action; one in the past happens now."""
        self._count += 1
        heapq.heappush(self._heap, (max(when_s, self.now_s), rank, self._count, action))

    def next(self) -> bool:
        """Do what comes next; return whether there was anything."""
        if not self._heap:
            return False
        self.now_s, _, _, action = heapq.heappop(self._heap)
        action()
        return True
