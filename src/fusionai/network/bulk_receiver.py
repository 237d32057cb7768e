"""The receiving half of a link's bulk: handles one message after the other, and returns credit for each handled one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from fusionai.network.credit import ReceiveCredit
from fusionai.network.framing import Frame
from fusionai.network.messages import Bulk


class BulkReceiver:
    """Queues received messages, within the window that the peer was granted.

    Args:
        window_bytes: most bytes that the peer may have sent and this side has not handled yet.
        return_credit: tells the peer how many more bytes it may send.
    """

    def __init__(self, window_bytes: int, *, return_credit: Callable[[int], None]) -> None:
        self._owed = ReceiveCredit(window_bytes)
        self._return_credit = return_credit
        self._waiting: deque[tuple[Bulk, bytearray, int]] = deque()
        self._arrived = asyncio.Event()

    def admit(self, header_bytes: int, body_bytes: int) -> None:
        """Count a message that begins to arrive. Raises ProtocolError if it exceeds the window."""
        self._owed.admit(header_bytes + body_bytes)

    def put(self, message: Bulk, frame: Frame) -> None:
        """Add a message that has arrived completely."""
        # The handler gets the body and may change it, so its size is taken now.
        self._waiting.append((message, frame.body, len(frame.header) + len(frame.body)))
        self._arrived.set()

    async def run(self, handle: Callable[[Bulk, bytearray], Awaitable[None]]) -> None:
        """Give messages to the handler for ever. Raises what `handle` raises."""
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            message, body, size = self._waiting.popleft()
            await handle(message, body)
            del body
            self.finish(size)

    def finish(self, message_bytes: int) -> None:
        """Return the credit for a message of so many bytes, header and body together."""
        self._return_credit(self._owed.finish(message_bytes))

    def clear(self) -> None:
        """Drop everything."""
        self._waiting.clear()
