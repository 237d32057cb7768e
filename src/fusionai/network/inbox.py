"""The queue of control messages that wait for the handler. When it is full, this side stops reading."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from fusionai.network.limits import Limits
from fusionai.network.messages import Call, Notice


class Inbox:
    """A queue that stops the reading when it is full, and resumes it when it is half empty.

    Args:
        limits: the number of messages and bytes at which the queue is full.
        pause, resume: stop and resume the reading of the control connection.
    """

    def __init__(self, limits: Limits, *, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._limits = limits
        self._pause = pause
        self._resume = resume
        self._messages: deque[tuple[Call | Notice, bytes]] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self.holding_back = False

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Call | Notice, payload: bytes) -> None:
        """Add a message. A message that was read already is taken even when the queue is full."""
        self._messages.append((message, payload))
        self._bytes += len(payload)
        self._filled.set()
        if len(self._messages) >= self._limits.queued_messages or self._bytes >= self._limits.queued_bytes:
            self.holding_back = True
            self._pause()

    async def get(self) -> tuple[Call | Notice, bytes]:
        """Return the oldest message, once there is one."""
        while not self._messages:
            self._filled.clear()
            await self._filled.wait()
        message, payload = self._messages.popleft()
        self._bytes -= len(payload)
        self._perhaps_resume()
        return message, payload

    def drop_call(self, number: int) -> None:
        """Drop a request that its sender no longer waits for."""
        for message in self._messages:
            if isinstance(message[0], Call) and message[0].number == number:
                self._messages.remove(message)
                self._bytes -= len(message[1])
                self._perhaps_resume()
                return

    def clear(self) -> None:
        """Drop everything."""
        self._messages.clear()
        self._bytes = 0

    def _perhaps_resume(self) -> None:
        few = len(self._messages) <= self._limits.queued_messages // 2
        if self.holding_back and few and self._bytes <= self._limits.queued_bytes // 2:
            self.holding_back = False
            self._resume()
