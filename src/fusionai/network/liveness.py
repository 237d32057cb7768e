"""Judges whether the peer is still there: it pings on the control connection and measures silence.

A process that dies closes its sockets, which the link sees at once. This module is for losses that close no socket: a
pulled cable, a crashed machine, a NAT that dropped the connection. Any byte on either connection is a sign of life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fusionai.errors import NetworkError, PeerLost
from fusionai.network.clock import now_s
from fusionai.network.limits import Limits

_RTT_MARGIN_LEAST_S, _RTT_MARGIN_MOST_S = 0.5, 5.0
_SMOOTHING = 0.2
_LATE_S = 1.0


class Liveness:
    """Pings one peer and judges its silence.

    Args:
        limits: the interval of pings, and the silence after which the peer counts as dead.
        send: writes a ping with a number.
        heard_s: when bytes last arrived, by `clock.now_s`.
        listening: false while this side does not read. Silence means nothing then.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        send: Callable[[int], None],
        heard_s: Callable[[], float],
        listening: Callable[[], bool],
    ) -> None:
        self._limits = limits
        self._send = send
        self._heard_s = heard_s
        self._listening = listening
        self._numbers = 0
        self._waiting: dict[int, tuple[float, asyncio.Future[float]]] = {}
        self.rtt_s: float | None = None
        """Smoothed round-trip time."""

    async def ping(self) -> float:
        """Return the round-trip time of one ping. The caller sets the deadline."""
        self._numbers += 1
        number = self._numbers
        reply: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (now_s(), reply)
        self._send(number)
        try:
            return await reply
        finally:
            self._waiting.pop(number, None)
            if reply.done() and not reply.cancelled():
                reply.exception()

    def on_pong(self, number: int) -> None:
        """Take a reply. A reply that nobody waits for any longer is ignored."""
        sent_s, reply = self._waiting.get(number, (0.0, None))
        if reply is None or reply.done():
            return
        rtt_s = now_s() - sent_s
        self.rtt_s = rtt_s if self.rtt_s is None else self.rtt_s + _SMOOTHING * (rtt_s - self.rtt_s)
        reply.set_result(rtt_s)

    def fail(self, error: NetworkError) -> None:
        """Wake those who wait for a reply."""
        for _, reply in self._waiting.values():
            if not reply.done():
                reply.set_exception(type(error)(str(error)))

    @property
    def patience_s(self) -> float:
        """Silence after which the peer counts as dead."""
        margin_s = 3 * (self.rtt_s or 0.0)
        return self._limits.silence_s + min(max(margin_s, _RTT_MARGIN_LEAST_S), _RTT_MARGIN_MOST_S)

    async def watch(self, who: str) -> NetworkError:
        """Ping for ever; return the error when the peer has been silent for too long.

        When this process itself was stopped (a sleeping laptop, a busy machine), bytes of the peer may lie unread. So
        the time by which a wait took too long is not counted as the peer's silence.
        """
        forgiven_s = now_s()
        interval_s = min(self._limits.ping_interval_s, self._limits.silence_s / 4)
        while True:
            began_s = now_s()
            try:
                async with asyncio.timeout(interval_s):
                    await self.ping()
            except TimeoutError:
                pass
            await asyncio.sleep(max(0.0, began_s + interval_s - now_s()))
            current_s = now_s()
            if current_s - began_s > interval_s + _LATE_S or not self._listening():
                forgiven_s = current_s
            silent_s = current_s - max(self._heard_s(), forgiven_s)
            if silent_s > self.patience_s:
                return PeerLost(f"{who} has been silent for {silent_s:.1f} s, although pinged")
