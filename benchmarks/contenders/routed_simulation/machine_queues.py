"""Machines with queues of passes, and the queues in front of links."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from contenders.routed_simulation.events import Action, Events
from contenders.routed_simulation.gradient_cells import Cell
from fusionai.scheduling.estimator import send_s
from fusionai.simulation.simulated_links import SimulatedLink


class Machine:
    """One machine: whether it is there, what it holds, and what waits for it."""

    def __init__(self, number: int, peer: str) -> None:
        self.number, self.peer = number, peer
        self.alive = True
        self.generation = 0
        """Rises when it loses all that it had of a step."""
        self.gone_s = -math.inf
        """When it last did."""
        self.seats: set[int] = set()
        """Stages that it holds."""
        self.held: dict[int, int] = {}
        """By stage: microbatches between forward and backward."""
        self.forwards: dict[int, deque[tuple[Cell, int]]] = {}
        self.backwards: dict[int, deque[tuple[Cell, int]]] = {}
        self.running = False
        self.woken = False
        """Whether it is about to look for its next pass."""
        self.busy_s = 0.0
        self.running_since_s = 0.0
        self.running_step = 0
        """The step whose pass it runs: a pass that nobody needs any more may outlast its step."""
        self._waiting = 0
        self._waiting_area = 0.0
        self._waiting_since_s = 0.0
        self._looked_s = 0.0

    def drop_work(self, now_s: float) -> None:
        """Lose everything of the step: it died, or it leaves its stage."""
        if self.running:
            self.busy_s += now_s - self.running_since_s
        self.generation += 1
        self.gone_s = now_s
        self.running = False
        self.held.clear()
        self.forwards.clear()
        self.backwards.clear()
        self.note_waiting(now_s, -self._waiting)

    def queue(self, cell: Cell, now_s: float, *, backward: bool) -> None:
        """Let a pass wait."""
        queues = self.backwards if backward else self.forwards
        queues.setdefault(cell.stage, deque()).append((cell, cell.epoch))
        self.note_waiting(now_s, 1)

    def note_waiting(self, now_s: float, change: int) -> None:
        """Count passes that wait."""
        self._waiting_area += self._waiting * (now_s - self._waiting_since_s)
        self._waiting_since_s = now_s
        self._waiting += change

    def take_waiting(self, now_s: float) -> float:
        """Return how many passes waited on average since the last call."""
        self.note_waiting(now_s, 0)
        length_s = now_s - self._looked_s
        average = self._waiting_area / length_s if length_s > 0 else float(self._waiting)
        self._waiting_area, self._looked_s = 0.0, now_s
        return average


@dataclass(frozen=True, slots=True)
class _Sending:
    size_bytes: float
    generation: int
    """Of the source, when it was handed over."""
    wanted: Callable[[], bool]
    arrive: Action
    fail: Action


class Wire:
    """One direction of a link with what waits for it. What nobody wants any more is not sent."""

    def __init__(self, events: Events, channel: SimulatedLink, source: Machine) -> None:
        self._events, self._channel, self._source = events, channel, source
        self._waiting: deque[_Sending] = deque()
        self._due = False

    def send(self, size_bytes: float, wanted: Callable[[], bool], arrive: Action, fail: Action) -> None:
        """Send; `arrive` happens at the receiver, or `fail` when the source is gone before the last byte left."""
        self._waiting.append(_Sending(size_bytes, self._source.generation, wanted, arrive, fail))
        if not self._due:
            self._next()

    def _next(self) -> None:
        self._due = False
        now_s, channel = self._events.now_s, self._channel
        while self._waiting:
            if channel.ready_s > now_s:
                self._due = True
                self._events.at(channel.ready_s, self._next)
                return
            sending = self._waiting.popleft()
            if not sending.wanted():
                continue
            if sending.generation != self._source.generation:
                sending.fail()
                continue
            left_s = channel.send(now_s, send_s(sending.size_bytes, channel.profile), sending.size_bytes)

            def through(sending: _Sending = sending, left_s: float = left_s) -> None:
                source = self._source
                if sending.generation != source.generation and source.gone_s < left_s:
                    sending.fail()
                else:
                    sending.arrive()

            self._events.at(left_s + channel.delay_s, through)
