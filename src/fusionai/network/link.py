"""A link: everything two nodes exchange, over one control and one bulk connection.

Order. Requests and notices start in the order sent: a request's handler starts when those of all earlier
notices have returned; requests then run side by side. Bulk is handled one message at a time in the order
sent. Nothing is promised between control and bulk.

A handler of a notice that waits for an answer of the same peer can wait for ever when the peer does the same:
let it start a task. A handler of a notice or of bulk that raises ends the link; one of a request answers with
its error.

Memory. The peer can make this side hold one bulk window, the queues of `Limits`, and the requests in work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from fusionai.errors import ConfigError, FusionError, NetworkError, PeerLost, PeerTimeout, ProtocolError
from fusionai.network.bulk_receiver import BulkReceiver
from fusionai.network.bulk_sender import BulkSender
from fusionai.network.framing import FrameType
from fusionai.network.identity import PeerId
from fusionai.network.inbox import Inbox
from fusionai.network.incoming_frames import IncomingFrames
from fusionai.network.lab import EmulatedLink
from fusionai.network.limits import Limits
from fusionai.network.link_tasks import LinkTasks
from fusionai.network.liveness import Liveness
from fusionai.network.messages import (
    MAX_KIND,
    Bulk,
    Call,
    Credit,
    Hello,
    LinkRefused,
    Notice,
    Ping,
    Reply,
    short_text,
)
from fusionai.network.probing import RESERVED, ProbeResponder
from fusionai.network.requests import Answering, Asking
from fusionai.network.shaping import LinkShaper
from fusionai.network.statistics import LinkStatistics
from fusionai.network.transport import Buffer, Channel

log = logging.getLogger(__name__)

_FAREWELL_S = 1.0


class Handler(Protocol):
    """The upper layer's side of all links of an endpoint."""

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Answer a request. A FusionError raised here is raised by the peer's `request`, with class and text."""

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Take a notice."""

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take a bulk message, whose body is the handler's to keep. The peer's credit returns when this does."""

    async def on_link(self, link: Link) -> None:
        """A link came up. Nothing else of it is handled before this returns."""

    async def on_close(self, link: Link, error: NetworkError) -> None:
        """A link is gone, for this reason. Called once for every `on_link`; its handlers have ended before."""


class Link:
    """A link to one peer. Made by `Endpoint`. Methods are for the event loop's thread only."""

    def __init__(
        self,
        *,
        greeting: Hello,
        control: Channel,
        bulk: Channel,
        dialled: bool,
        handler: Handler,
        limits: Limits,
        lab: EmulatedLink | None,
        lab_seed: str,
        on_gone: Callable[[Link], None],
        on_ended: Callable[[Link], None],
    ) -> None:
        """`on_gone` is called when the connections are closed, `on_ended` when `on_close` has returned too."""
        self.peer: PeerId = control.peer
        self.peer_name = greeting.name
        self.peer_release = greeting.release
        self.peer_instance = greeting.instance
        self.dialled = dialled
        """Whether this side opened the link."""
        self.remote_host = control.remote_host
        """The address from which the peer is seen, a router's where there is one; "" when unknown."""
        self.statistics = LinkStatistics()
        self.lab = lab
        """What this side's sending emulates; None when the link is real."""
        self._greeting = greeting
        self._control, self._bulk = control, bulk
        self._handler = handler
        self._limits = limits
        self._lab_seed = lab_seed
        self._on_gone, self._on_ended = on_gone, on_ended
        self._shaper: LinkShaper | None = None
        self._error: NetworkError | None = None
        self._announced = False
        self._gone = asyncio.Event()
        self._tasks = LinkTasks(
            self._who(), closed=lambda: self.closed, end=lambda error, farewell: self.end(error, farewell=farewell)
        )
        self._ending: asyncio.Task[None] | None = None
        self._asking = Asking()
        self._answering = Answering(
            control=control,
            limits=limits,
            answer_bytes=greeting.control_payload_bytes,
            work=self._work,
            spawn=self._tasks.spawn,
            closed=lambda: self.closed,
            statistics=self.statistics,
            who=self._who(),
        )
        self._inbox = Inbox(limits, pause=control.pause_reading, resume=control.resume_reading)
        self._outbox = BulkSender(bulk, greeting.window_bytes, self.statistics)
        self._arrivals = BulkReceiver(limits.window_bytes, return_credit=self._return_credit)
        self._liveness = Liveness(
            limits, send=self._send_ping, heard_s=self._heard_s, listening=lambda: not self._inbox.holding_back
        )
        self.prober = ProbeResponder(self.send_bulk, limits.probe_bytes)
        self._incoming = IncomingFrames(
            control=control,
            asking=self._asking,
            answering=self._answering,
            inbox=self._inbox,
            credit=self._outbox.credit,
            arrivals=self._arrivals,
            liveness=self._liveness,
            prober=self.prober,
            statistics=self.statistics,
            who=self._who(),
            closed=lambda: self.closed,
            end=self.end,
        )

    # --- what the upper layer uses ------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the link has ended."""
        return self._error is not None

    @property
    def rtt_s(self) -> float | None:
        """Smoothed round-trip time of control messages in seconds; None before the first is measured."""
        return self._liveness.rtt_s

    async def request(self, kind: str, payload: Buffer, *, timeout_s: float) -> bytes:
        """Ask the peer, and return its answer.

        Raises:
            PeerTimeout: no answer within `timeout_s`; the peer is told to stop working on it.
            PeerLost: the link is or went down.
            FusionError: what the peer's handler raised, by class and text.
        """
        self._check_sendable(kind, payload)
        number, answer = self._asking.open(kind)
        sent = answered = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready()
                wire_bytes = self._control.send(FrameType.REQUEST, Call(number, kind), payload)
                self.statistics.count_sent(kind, len(payload), wire_bytes)
                sent = True
                result = await answer
                answered = True
                return result
        except TimeoutError:
            raise PeerTimeout(
                f"{self._who()} did not answer {kind!r} within {timeout_s:g} s; it may be overloaded"
            ) from None
        except FusionError:
            answered = True
            raise
        finally:
            self._asking.close(number)
            if sent and not answered and not self.closed:
                self._control.send(FrameType.CANCEL, Reply(number))

    async def notify(self, kind: str, payload: Buffer) -> None:
        """Tell the peer something that wants no answer. Returns when it is on its way.

        Raises:
            PeerLost: the link is or went down.
        """
        self._check_sendable(kind, payload)
        await self._ready()
        wire_bytes = self._control.send(FrameType.NOTICE, Notice(kind), payload)
        self.statistics.count_sent(kind, len(payload), wire_bytes)

    async def send_bulk(self, kind: str, header: bytes, body: Buffer) -> None:
        """Send a large message. Returns when the peer's credit has allowed all of it out.

        The body is not copied: it must not change until this returns. A cancelled call may still send it.

        Raises:
            PeerLost: the link is or went down.
            ProtocolError: the peer takes no body of this size.
        """
        self._check_kind(kind)
        self._check_open()
        view = memoryview(body).cast("B")
        if len(view) > self._greeting.bulk_body_bytes:
            raise ProtocolError(
                f"a bulk body of {len(view):,} bytes passes {self._who()}'s limit of "
                f"{self._greeting.bulk_body_bytes:,}; send it in parts"
            )
        if len(header) > self._limits.header_bytes // 2:
            raise ProtocolError(f"a bulk header of {len(header):,} bytes is too long; it belongs into the body")
        await self._outbox.send(kind, header, view)

    async def ping(self, *, timeout_s: float) -> float:
        """Return the round-trip time in seconds of one small control message.

        Raises:
            PeerTimeout: no reply within `timeout_s`.
            PeerLost: the link is or went down.
        """
        self._check_open()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._liveness.ping()
        except TimeoutError:
            raise PeerTimeout(f"{self._who()} did not answer a ping within {timeout_s:g} s") from None

    async def close(self, reason: str = "") -> None:
        """Tell the peer why, and end the link. Returns when all of it is gone; a second call only waits."""
        text = f"this side closed the link to {self._who()}" + (f": {reason}" if reason else "")
        self.end(PeerLost(text), farewell=reason or "closed")
        if asyncio.current_task() not in self._tasks:
            await self.wait_closed()

    async def wait_closed(self) -> None:
        """Wait until the link has ended and `on_close` has returned."""
        await self._gone.wait()

    def __repr__(self) -> str:
        return f"Link({self._who()}, {'closed' if self.closed else 'open'})"

    # --- what the endpoint uses ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve; a link that has ended already stays so."""
        if self._error is not None:
            return
        limits = self._limits
        if self.lab is not None:
            self._shaper = LinkShaper(self.lab, seed=self._lab_seed)
            self._control.shape(self._shaper, urgent=True)
            self._bulk.shape(self._shaper, urgent=False)
        self._tasks.spawn(self._serve())
        self._tasks.spawn(self._outbox.run())
        self._tasks.spawn(self._watch())
        payload = limits.control_payload_bytes
        plain = dict.fromkeys(
            (FrameType.CANCEL, FrameType.FAILURE, FrameType.CREDIT, FrameType.PING, FrameType.PONG, FrameType.BYE), 0
        )
        control = plain | dict.fromkeys((FrameType.REQUEST, FrameType.ANSWER, FrameType.NOTICE), payload)
        incoming = self._incoming
        self._control.start(control, incoming.on_control, self.end)
        self._bulk.start(
            {FrameType.BULK: limits.bulk_body_bytes}, incoming.on_bulk, self.end, admit=incoming.admit_bulk
        )

    def end(self, error: NetworkError, *, farewell: str | None = None) -> None:
        """Fail everything that waits on the link, and start to take it down. Only the first call counts.

        Args:
            error: what those who wait get.
            farewell: what the peer is told; None when it cannot or need not be told.
        """
        if self._error is not None:
            return
        self._error = error
        self._asking.fail(error)
        self._outbox.fail(error)
        self._liveness.fail(error)
        if farewell is not None and self._control.failure is None:
            self._control.send(FrameType.BYE, LinkRefused(error="PeerLost", text=farewell[:1000]))
        elif isinstance(error, ProtocolError):
            self._control.send(FrameType.BYE, LinkRefused(error="ProtocolError", text=short_text(error)))
        self._ending = asyncio.get_running_loop().create_task(self._take_down(error))

    # --- tasks --------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Announce the link, then hand control messages and bulk to the handler."""
        self._announced = True
        await self._handler.on_link(self)
        self._tasks.spawn(self._arrivals.run(self._take_bulk))
        while True:
            message, payload = await self._inbox.get()
            if isinstance(message, Call):
                self._answering.begin(message, payload)
            else:
                await self._handler.on_notice(self, message.kind, payload)

    async def _take_bulk(self, message: Bulk, body: bytearray) -> None:
        await self._handler.on_bulk(self, message.kind, message.header, body)

    async def _work(self, kind: str, payload: bytes) -> bytes:
        if kind.startswith(RESERVED):
            return await self.prober.answer(kind, payload)
        return await self._handler.on_request(self, kind, payload)

    async def _watch(self) -> None:
        self.end(await self._liveness.watch(self._who()))

    # --- inner --------------------------------------------------------------------------------------------

    async def _take_down(self, error: NetworkError) -> None:
        await self._tasks.cancel_all()
        self._inbox.clear()
        self._arrivals.clear()
        within_s = _FAREWELL_S if self._control.failure is None or isinstance(error, ProtocolError) else 0.0
        await asyncio.gather(self._control.finish(within_s), self._bulk.finish(within_s))
        if self._shaper is not None:
            await self._shaper.close()
        self._on_gone(self)
        if self._announced:
            try:
                await self._handler.on_close(self, error)
            except Exception:
                log.exception("on_close of the link to %s failed", self._who())
        self._gone.set()
        # Its frames may hold bodies of messages, and whoever keeps the error would keep them.
        error.__traceback__ = None
        self._on_ended(self)

    def _return_credit(self, count_bytes: int) -> None:
        wire_bytes = self._control.send(FrameType.CREDIT, Credit(count_bytes))
        self.statistics.count_sent("link.credit", 0, wire_bytes)

    def _send_ping(self, number: int) -> None:
        wire_bytes = self._control.send(FrameType.PING, Ping(number))
        self.statistics.count_sent("link.ping", 0, wire_bytes)

    def _heard_s(self) -> float:
        return max(self._control.heard_s, self._bulk.heard_s)

    async def _ready(self) -> None:
        await self._control.drain()
        self._check_open()

    def _check_open(self) -> None:
        if self._error is not None:
            raise type(self._error)(str(self._error))  # anew: several callers may get it, each with its traceback

    def _check_kind(self, kind: str) -> None:
        if not 0 < len(kind) <= MAX_KIND:
            raise ConfigError(f"a kind has 1 to {MAX_KIND} characters, got {kind!r}")

    def _check_sendable(self, kind: str, payload: Buffer) -> None:
        self._check_kind(kind)
        self._check_open()
        if len(payload) > self._greeting.control_payload_bytes:
            raise ProtocolError(
                f"{kind!r} has {len(payload):,} bytes, {self._who()} takes control messages of "
                f"{self._greeting.control_payload_bytes:,}; send it as bulk"
            )

    def _who(self) -> str:
        return f"{self.peer_name} ({self.peer[:12]})" if self.peer_name else self.peer[:12]
