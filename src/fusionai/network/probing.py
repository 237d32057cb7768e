"""The answering half of a link probe: receives and times bursts, and sends bursts when asked.

A probe runs inside a link, under kinds of message that begin with "link.", so the upper layer's handler is not needed:

    link.probe.expect   {bytes}         the receiver prepares to measure a burst of so many body bytes
    link.probe          bulk            the burst, in equal messages, dropped on arrival
    link.probe.measured {}              answered, once the burst is complete, with {bytes, seconds}
    link.probe.send     {bytes}         the other side sends a burst, and answers when it is on its way
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from fusionai.errors import PeerTimeout, ProtocolError
from fusionai.network.clock import now_s

RESERVED = "link."
BURST = "link.probe"
EXPECT = "link.probe.expect"
MEASURED = "link.probe.measured"
SEND = "link.probe.send"

_PIECES = 8
_BURST_TIMEOUT_S = 20.0


class BurstSize(msgspec.Struct, frozen=True):
    """Body bytes of a burst."""

    bytes: int


class BurstMeasure(msgspec.Struct, frozen=True):
    """A receiver's measurement: the bytes that came after the first message of a burst, and the seconds they took."""

    bytes: int
    seconds: float


SendBulk = Callable[[str, bytes, memoryview], Awaitable[None]]
_size = msgspec.msgpack.Decoder(BurstSize)


def decode_size(payload: bytes, most_bytes: int) -> int:
    """Return the size a probe message asks for.

    Raises:
        ProtocolError: malformed, or not between 1 and `most_bytes`.
    """
    try:
        size = _size.decode(payload).bytes
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed probe: {error}") from error
    if not 0 < size <= most_bytes:
        raise ProtocolError(f"a probe burst has 1 to {most_bytes:,} bytes, {size:,} were asked for")
    return size


class ProbeResponder:
    """One link's bursts. A link measures one burst in each direction at a time."""

    def __init__(self, send_bulk: SendBulk, most_bytes: int) -> None:
        self._send_bulk = send_bulk
        self._most_bytes = most_bytes
        self._expected = 0
        self._arrived = 0
        self._counted = 0
        self._began_s = 0.0
        self._measure: BurstMeasure | None = None
        self._complete = asyncio.Event()
        self._sending = asyncio.Lock()

    def expect(self, size: int) -> None:
        """Prepare to measure a burst."""
        self._expected, self._arrived, self._counted = size, 0, 0
        self._complete.clear()

    def on_burst(self, count_bytes: int) -> None:
        """Count a message of a burst. A message that nobody expects is ignored."""
        if self._arrived >= self._expected:
            return
        arrived_s = now_s()
        if self._arrived == 0:
            self._began_s = arrived_s
        else:
            self._counted += count_bytes
        self._arrived += count_bytes
        if self._arrived >= self._expected:
            self._measure = BurstMeasure(self._counted, max(arrived_s - self._began_s, 1e-6))
            self._complete.set()

    async def measured(self) -> BurstMeasure:
        """Return the measure of the expected burst once it is complete."""
        try:
            async with asyncio.timeout(_BURST_TIMEOUT_S):
                await self._complete.wait()
        except TimeoutError:
            raise PeerTimeout(
                f"a probe of {self._expected:,} bytes was not through within {_BURST_TIMEOUT_S:.0f} s"
            ) from None
        assert self._measure is not None
        return self._measure

    async def send(self, size: int) -> None:
        """Send a burst of about `size` bytes: `_PIECES` messages, so that all but the first are timed."""
        piece = max(1, size // _PIECES)
        body = memoryview(bytes(piece))
        async with self._sending:
            while size > 0:
                count = min(piece, size)
                await self._send_bulk(BURST, b"", body[:count])
                size -= count

    async def answer(self, kind: str, payload: bytes) -> bytes:
        """Answer a peer's request of a reserved kind."""
        if kind == EXPECT:
            self.expect(decode_size(payload, 1 << 40))
            return b""
        if kind == MEASURED:
            return msgspec.msgpack.encode(await self.measured())
        if kind == SEND:
            await self.send(decode_size(payload, self._most_bytes))
            return b""
        raise ProtocolError(f"request {kind!r} is unknown to this version")
