"""The sending half of a link's bulk: sends one message after the other, when the peer's window has room for it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from fusionai.errors import NetworkError
from fusionai.network.credit import SendCredit, charge_bytes
from fusionai.network.framing import FrameType
from fusionai.network.messages import Bulk, encode
from fusionai.network.statistics import LinkStatistics
from fusionai.network.transport import Channel


@dataclass(slots=True)
class _Waiting:
    """A message, and the caller who waits until it is sent."""

    kind: str
    header: bytes
    body: memoryview
    done: asyncio.Future[None]


class BulkSender:
    """Queues callers, not bytes: a caller keeps its body and waits until it is sent.

    One task (`run`) writes, not the callers, because a caller that is cancelled halfway through a body would leave the
    stream corrupt.
    """

    def __init__(self, channel: Channel, window_bytes: int, statistics: LinkStatistics) -> None:
        self._channel = channel
        self._statistics = statistics
        self._waiting: deque[_Waiting] = deque()
        self._filled = asyncio.Event()
        self.credit = SendCredit(window_bytes)

    async def send(self, kind: str, header: bytes, body: memoryview) -> None:
        """Return when all of the message has been handed to the channel."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(kind, header, body, done))
        self._filled.set()
        try:
            await done
        except asyncio.CancelledError:
            # `run` skips a message that it has not begun. A begun message is sent to its end.
            if not done.cancel() and not done.cancelled():
                done.exception()
            raise

    async def run(self) -> None:
        """Send queued messages for ever. Raises the channel's error when the channel is gone."""
        while True:
            while not self._waiting:
                self._filled.clear()
                await self._filled.wait()
            message = self._waiting[0]
            if not message.done.done():
                header = encode(Bulk(message.kind, message.header))
                charge = charge_bytes(len(header) + len(message.body), self.credit.window_bytes)
                await self.credit.take(charge)
                wire_bytes = await self._channel.send_large(FrameType.BULK, header, message.body)
                self._statistics.count_sent(message.kind, len(message.body), wire_bytes)
                if not message.done.done():
                    message.done.set_result(None)
            self._waiting.popleft()
            del message

    def fail(self, error: NetworkError) -> None:
        """Raise this error in every waiting caller. The owner of this object must end `run`."""
        for message in self._waiting:
            if not message.done.done():
                message.done.set_exception(type(error)(str(error)))
        self._waiting.clear()
        self.credit.fail(error)
