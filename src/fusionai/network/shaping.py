"""The emulation behind lab mode: delays what one side of a link sends, as a slow link would.

Both connections of a link share one emulated wire. A piece of data passes three stations:

1. The serialiser sends one piece at a time at the link's rate, control before bulk. Bulk is cut into pieces of about
   2 ms, so control waits for one such piece at most.
2. The line adds the one-way delay and the jitter. Each connection keeps its order, as TCP does.
3. Loss: a piece that loses a packet arrives one round trip (and 10 ms for the detection) later, and everything that
   follows on its connection waits for it, as in TCP. `EmulatedLink.rate_bytes_per_s` contains the rate that loss costs.

The serialiser keeps its own clock: a piece begins when the piece before it ended, even if this process woke up late. So
the rate is exact over time although timers are not. TLS and connection set-up are not delayed.
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
"""Writes to the real connection, and waits while that is full."""

_PIECE_S = 0.002
_QUEUE_S = 0.05
_DETECTION_S = 0.010
_DELIVERY_GRAIN_S = 2e-5
_SERIALISER_GRAIN_S = 2e-4
"""Seconds by which the serialiser may wake too early. It goes by its own clock, so it need not spin."""


class ShapedConnection:
    """One connection's way through an emulated wire."""

    def __init__(self, shaper: LinkShaper, deliver: Deliver, *, urgent: bool) -> None:
        self._shaper = shaper
        self._deliver = deliver
        self.urgent = urgent
        self.waiting: deque[tuple[float, bytes]] = deque()
        """Pieces not yet serialised, and the time when each was queued."""
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
        """Put a serialised piece on the line. It is delivered at `due_s`, but not before earlier pieces."""
        self._last_due_s = max(self._last_due_s, due_s)
        self._line.append((self._last_due_s, data))
        self.waiting_bytes -= len(data)
        self._line_filled.set()
        self._moved.set()

    def release(self) -> None:
        """Wake everybody who waits."""
        self._moved.set()

    async def run(self) -> None:
        """Deliver the pieces on the line when they are due."""
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
        """Tell the serialiser that a connection has data waiting."""
        self._filled.set()

    async def sleep_until(self, at_s: float, *, grain_s: float) -> None:
        """Sleep until at most `grain_s` before a time. uvloop spins through less than half a millisecond."""
        while (left_s := at_s - now_s()) > grain_s:  # noqa: ASYNC110 (a time, not an event)
            await asyncio.sleep(left_s)

    def stop(self) -> None:
        """Drop all data and wake everybody who waits."""
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
