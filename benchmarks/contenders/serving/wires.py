"""Directed links between serving machines: short messages go before prompts.

A decode pass sends one message with all tokens for the next machine. A prompt's activations are bulk of megabytes. The
two are separate streams: while a message has anything to send, prompts on the same link wait; among their own kind
they go one after another. With `in_turn`, everything goes one after another instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

Schedule = Callable[[float, Callable[[], None]], None]
"""Calls something at a time."""


class Wire:
    """One direction of a link. Delivers with `deliver` once the last byte has arrived."""

    __slots__ = (
        "_at",
        "_bulk",
        "_bytes_per_s",
        "_delay_s",
        "_deliver",
        "_free_s",
        "_now",
        "_started_s",
        "_turn",
        "in_turn",
    )

    def __init__(
        self,
        bytes_per_s: float,
        delay_s: float,
        deliver: Callable[[Any], None],
        at: Schedule,
        now: Callable[[], float],
        *,
        in_turn: bool = False,
    ) -> None:
        self._bytes_per_s, self._delay_s, self._deliver = bytes_per_s, delay_s, deliver
        self._at, self._now, self.in_turn = at, now, in_turn
        self._free_s = 0.0
        self._bulk: deque[list[Any]] = deque()
        self._started_s = -1.0
        self._turn = 0

    def send(self, size_bytes: float, what: Any) -> None:
        """Send a short message."""
        now_s = self._now()
        self._pause(now_s)
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_per_s
        self._arrives(self._free_s + self._delay_s, what)
        self._resume()

    def send_bulk(self, size_bytes: float, what: Any) -> None:
        """Send a prompt's activations."""
        if self.in_turn:
            self.send(size_bytes, what)
            return
        self._bulk.append([size_bytes / self._bytes_per_s, what])
        if len(self._bulk) == 1:
            self._resume()

    def _arrives(self, when_s: float, what: Any) -> None:
        self._at(when_s, lambda: self._deliver(what))

    def _pause(self, now_s: float) -> None:
        """Take off what the first prompt has sent so far; it goes on later."""
        if self._bulk and self._started_s >= 0:
            if now_s > self._started_s:
                self._bulk[0][0] -= now_s - self._started_s
            self._started_s = -1.0
        self._turn += 1

    def _resume(self) -> None:
        """Go on with the first prompt as soon as no message is being sent."""
        if not self._bulk:
            return
        self._started_s = max(self._free_s, self._now())
        turn = self._turn
        self._at(self._started_s + max(self._bulk[0][0], 0.0), lambda: self._sent(turn))

    def _sent(self, turn: int) -> None:
        if turn != self._turn:
            return
        _, what = self._bulk.popleft()
        self._started_s = -1.0
        self._turn += 1
        self._arrives(self._now() + self._delay_s, what)
        self._resume()
