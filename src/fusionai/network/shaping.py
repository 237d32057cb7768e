"""The emulation behind lab mode: what one side of a link sends, held back as a slow link would.

Both connections of a link share one emulated wire. A piece of data passes three stations:

1. the serialiser: one piece at a time at the link's rate, control ahead of bulk; bulk is cut into pieces of
   about 2 ms, so control waits for one such piece at most;
2. the line: one-way delay plus jitter; each connection keeps its order, as TCP does;
3. loss: a piece that loses a packet comes one round trip (and 10 ms for its detection) later, and all that
   follows on its connection waits for it, as with TCP's retransmission. What loss costs in rate is in
   `EmulatedLink.rate_bytes_per_s`.

The serialiser keeps its own clock: a piece begins when the one before it ended, even if this process woke
late, so the rate is exact over time although timers are not. TLS and connection set-up are not delayed.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable

from fusionai.errors import NetworkError
from fusionai.network.clock import now_s
from fusionai.network.lab import EmulatedLink

Deliver = Callable[[bytes], Awaitable[None]]
"""Writes to the real connection; waits while that is full."""

_PIECE_S = 0.002
_QUEUE_S = 0.05
_DETECTION_S = 0.010
_DELIVERY_GRAIN_S = 2e-5
_SERIALISER_GRAIN_S = 2e-4
"""The serialiser reckons by its own clock, so it may wake early and need not spin."""


class ShapedConnection:
    """One connection's way through an emulated wire."""

    def __init__(self, shaper: LinkShaper, deliver: Deliver, *, urgent: bool) -> None:
        self._shaper = shaper
        self._deliver = deliver
        self.urgent = urgent
        self.waiting: deque[tuple[float, bytes]] = deque()
        """Pieces not yet serialised, each with the time it came."""
        self.waiting_bytes = 0
        self._line: deque[tuple[float, bytes]] = deque()
        self._line_filled = asyncio.Event()
        self._moved = asyncio.Event()
        self._last_due_s = 0.0

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Queue a copy of `data`. Never waits; see `drain`."""
        came_s = now_s()
        view = memoryview(data).cast("B")
        step = self._shaper.piece_bytes
        for start in range(0, len(view), step):
            self.waiting.append((came_s, bytes(view[start : start + step])))
        self.waiting_bytes += len(view)
        self._shaper.wake()

    async def drain(self) -> None:
        """Wait until little enough is queued; returns at once when the shaper is closed."""
        while self.waiting_bytes > self._shaper.queue_bytes and not self._shaper.closed:
            self._moved.clear()
            await self._moved.wait()

    async def flush(self) -> None:
        """Wait until all has been delivered."""
        while (self.waiting or self._line) and not self._shaper.closed:
            self._moved.clear()
            await self._moved.wait()

    def send(self, due_s: float, data: bytes) -> None:
        """Put a serialised piece on the line, to be delivered at `due_s` or when those before it are."""
        self._last_due_s = max(self._last_due_s, due_s)
        self._line.append((self._last_due_s, data))
        self.waiting_bytes -= len(data)
        self._line_filled.set()
        self._moved.set()

    def release(self) -> None:
        """Wake everybody who waits."""
        self._moved.set()

    async def run(self) -> None:
        """Deliver what is on the line, each piece when it is due."""
        try:
            while True:
                while not self._line:
                    self._line_filled.clear()
                    await self._line_filled.wait()
                due_s, data = self._line[0]
                await self._shaper.sleep_until(due_s, grain_s=_DELIVERY_GRAIN_S)
                await self._deliver(data)
                self._line.popleft()
                self._moved.set()
        except NetworkError:
            # The real connection is gone; the link finds out by itself.
            self._shaper.stop()


class LinkShaper:
    """One direction of an emulated link, shared by its connections."""

    def __init__(self, link: EmulatedLink, *, seed: str) -> None:
        self._link = link
        self._rate = link.rate_bytes_per_s
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._lanes: list[ShapedConnection] = []
        self._filled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._free_at_s = 0.0
        self.closed = False
        finite = self._rate if math.isfinite(self._rate) else 1e9
        self.piece_bytes = int(min(max(finite * _PIECE_S, 1448), 256 << 10))
        self.queue_bytes = int(max(finite * _QUEUE_S, 4 * self.piece_bytes))

    def lane(self, deliver: Deliver, *, urgent: bool) -> ShapedConnection:
        """Add a connection; urgent ones are serialised first."""
        lane = ShapedConnection(self, deliver, urgent=urgent)
        self._lanes.append(lane)
        self._lanes.sort(key=lambda each: not each.urgent)
        self._tasks.append(self._loop.create_task(lane.run()))
        if len(self._tasks) == 1:
            self._tasks.append(self._loop.create_task(self._serialise()))
        return lane

    def wake(self) -> None:
        """Say that a lane has something waiting."""
        self._filled.set()

    async def sleep_until(self, at_s: float, *, grain_s: float) -> None:
        """Sleep until at most `grain_s` before a time. uvloop spins through less than half a millisecond."""
        while (left_s := at_s - now_s()) > grain_s:  # noqa: ASYNC110 (a time, not an event)
            await asyncio.sleep(left_s)

    def stop(self) -> None:
        """Drop everything and let nobody wait any longer."""
        self.closed = True
        for lane in self._lanes:
            lane.release()

    async def close(self) -> None:
        """Stop, and end the tasks."""
        self.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serialise(self) -> None:
        while True:
            lane = next((each for each in self._lanes if each.waiting), None)
            if lane is None:
                self._filled.clear()
                await self._filled.wait()
                continue
            came_s, data = lane.waiting.popleft()
            self._free_at_s = max(self._free_at_s, came_s) + len(data) / self._rate
            lane.send(self._free_at_s + self._delay_s(len(data)), data)
            await self.sleep_until(self._free_at_s, grain_s=_SERIALISER_GRAIN_S)

    def _delay_s(self, count_bytes: int) -> float:
        link = self._link
        delay_s = (link.one_way_ms + self._random.random() * link.jitter_ms) / 1e3
        if link.loss_pct and self._random.random() < link.loss_of(count_bytes):
            delay_s += link.rtt_s + _DETECTION_S
        return delay_s
