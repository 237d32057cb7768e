"""Credits: they bound how many bulk bytes may wait for the receiver's handler.

The charge of a message is its bytes, but at least `LEAST_CHARGE`, so that a window bounds the number of messages too.
It is at most the whole window, so that a body larger than the window passes when the window is entirely free. Both
sides compute the same charge, so the receiver notices a sender that exceeds its window.
"""

from __future__ import annotations

import asyncio

from fusionai.errors import NetworkError, ProtocolError

LEAST_CHARGE = 4096


def charge_bytes(message_bytes: int, window_bytes: int) -> int:
    """Return the bytes that a message of `message_bytes` (header and body) takes from a window."""
    return min(max(message_bytes, LEAST_CHARGE), window_bytes)


class SendCredit:
    """The sender's count of the free bytes in the peer's window. Only one sender may wait at a time."""

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.free_bytes = window_bytes
        self._changed = asyncio.Event()
        self._error: NetworkError | None = None

    async def take(self, count_bytes: int) -> None:
        """Wait until `count_bytes` of the window are free, and take them."""
        while self.free_bytes < count_bytes:
            if self._error is not None:
                raise self._error
            self._changed.clear()
            await self._changed.wait()
        self.free_bytes -= count_bytes

    def give(self, count_bytes: int) -> None:
        """Add bytes that the receiver has finished with."""
        if not 0 < count_bytes <= self.window_bytes - self.free_bytes:
            raise ProtocolError(
                f"the peer returned {count_bytes:,} bytes of credit, {self.window_bytes - self.free_bytes:,} are owed"
            )
        self.free_bytes += count_bytes
        self._changed.set()

    def fail(self, error: NetworkError) -> None:
        """Wake the waiting sender with an error."""
        self._error = error
        self._changed.set()


class ReceiveCredit:
    """The receiver's count of the bytes that its handler has not finished with."""

    def __init__(self, window_bytes: int) -> None:
        self.window_bytes = window_bytes
        self.held_bytes = 0

    def admit(self, message_bytes: int) -> None:
        """Charge an arriving message.

        Raises:
            ProtocolError: the peer has sent more than its window.
        """
        charge = charge_bytes(message_bytes, self.window_bytes)
        if self.held_bytes + charge > self.window_bytes:
            raise ProtocolError(
                f"the peer overdrew its window: {self.held_bytes:,} bytes are unfinished, {charge:,} more came, "
                f"{self.window_bytes:,} are allowed"
            )
        self.held_bytes += charge

    def finish(self, message_bytes: int) -> int:
        """Remove a message that the handler has finished with. Return the credit to give back."""
        charge = charge_bytes(message_bytes, self.window_bytes)
        self.held_bytes -= charge
        return charge
