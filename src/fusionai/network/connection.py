"""One TLS connection that carries frames.

asyncio's BufferedProtocol lets the TLS layer decrypt straight into the decoder's memory. Measured on two
cores of an AMD EPYC over loopback: 0.7 to 1.4 GB/s, as much as blocking sockets in two processes; streams,
which copy twice more, reached 0.1.

Life of a connection: the TLS handshake makes it and proves the peer's key. The peer sends one frame of greeting. Then
`start` hands the connection to a link. In between the connection does not read, so an unauthenticated peer can make
this side hold no more than 64 KiB.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from typing import cast

import msgspec

from fusionai.errors import AuthenticationError, NetworkError, PeerLost, PeerTimeout, ProtocolError
from fusionai.network.certificates import ALPN, peer_public_key
from fusionai.network.clock import now_s
from fusionai.network.framing import Admit, Frame, FrameDecoder, FrameType, frame_prefix
from fusionai.network.identity import PeerId, peer_id
from fusionai.network.limits import Limits
from fusionai.network.messages import encode
from fusionai.network.shaping import LinkShaper, ShapedConnection
from fusionai.network.transport import Buffer, Channel

log = logging.getLogger(__name__)

WRITE_CHUNK_BYTES = 256 << 10
"""Bytes of bulk that are handed to TLS at a time: about 0.2 ms of work. Larger pieces keep control messages waiting for
longer; smaller ones cost throughput."""
_HIGH_WATER_BYTES = 512 << 10
_JOIN_BYTES = 64 << 10
_GREETINGS = {FrameType.HELLO: 0, FrameType.WELCOME: 0, FrameType.REFUSE: 0}


class Connection(asyncio.BufferedProtocol, Channel):
    """A connection to one proven peer. Methods are for the event loop's thread only."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._decoder = FrameDecoder(_GREETINGS, limits.greeting_bytes)
        self._transport: asyncio.Transport | None = None
        self._receive: Callable[[Frame], None] | None = None
        self._on_lost: Callable[[NetworkError], None] | None = None
        self._greeting: Frame | None = None
        self._greeted = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()
        self._failure: NetworkError | None = None
        self._lane: ShapedConnection | None = None
        self.heard_s = now_s()
        self.peer = PeerId("")
        """The peer's id; empty until the handshake is done."""
        self.remote_host = ""

    # --- asyncio's side -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)
        self.remote_host = str((transport.get_extra_info("peername") or ("",))[0])
        try:
            tls = transport.get_extra_info("ssl_object")
            if tls.selected_alpn_protocol() != ALPN:
                raise ProtocolError(f"the other side speaks {tls.selected_alpn_protocol()!r}, not {ALPN!r}")
            self.peer = peer_id(peer_public_key(tls))
        except (NetworkError, ValueError) as error:
            self._failure = error if isinstance(error, NetworkError) else AuthenticationError(str(error))
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)
        try:
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            log.debug("TCP_NODELAY was refused")

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._failure is None:
            try:
                return self._decoder.buffer()
            except ProtocolError as error:
                self._fail(error)
        return memoryview(bytearray(4096))

    def buffer_updated(self, nbytes: int) -> None:
        if self._failure is not None:
            return
        self.heard_s = now_s()
        self._decoder.advance(nbytes)
        self._parse()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._failure is None:
            cause = f"was reset ({exc})" if exc is not None else "was closed by the other side"
            self._failure = PeerLost(f"the connection to {self.peer[:12] or 'the peer'} {cause}")
        # At once: the peer may have sent most of a large frame, and the TLS layer has large buffers of its own.
        self._decoder.close()
        self._transport = self._receive = None
        self._gone.set()
        self._greeted.set()
        self._writable.set()
        self._report()

    # --- greeting -----------------------------------------------------------------------------------------

    async def greeting(self) -> Frame:
        """Return the first frame of the peer. The caller sets the deadline."""
        await self._greeted.wait()
        if self._greeting is None:
            assert self._failure is not None
            raise self._failure
        return self._greeting

    def start(
        self,
        body_limits: Mapping[FrameType, int],
        receive: Callable[[Frame], None],
        on_lost: Callable[[NetworkError], None],
        admit: Admit | None = None,
    ) -> None:
        """Continue reading. `receive` gets every further frame; `on_lost` gets the error when there are no more, once.

        Both are called from the event loop. If `receive` raises ProtocolError, the stream counts as corrupt.
        """
        self._decoder.expect(body_limits, self._limits.header_bytes, admit)
        self._receive = receive
        self._on_lost = on_lost
        self.heard_s = now_s()
        if self._failure is not None:
            asyncio.get_running_loop().call_soon(self._report)
            return
        self._parse()
        self.resume_reading()

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`. TCP then makes the peer wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Continue reading after `pause_reading`."""
        if self._transport is not None and not self._transport.is_closing() and self._failure is None:
            self._transport.resume_reading()

    # --- writing ------------------------------------------------------------------------------------------

    def shape(self, shaper: LinkShaper, *, urgent: bool) -> None:
        """Send through an emulated wire from now on."""
        self._lane = shaper.lane(self._deliver, urgent=urgent)

    def send(self, kind: FrameType, header: msgspec.Struct, payload: Buffer = b"") -> int:
        """Write a frame without waiting; return its bytes. A connection that is gone drops it."""
        raw = encode(header)
        prefix = frame_prefix(kind, len(raw), len(payload))
        if len(payload) <= _JOIN_BYTES:
            self._write(b"".join((prefix, raw, payload)))
        else:
            self._write(prefix + raw)
            self._write(payload)
        return len(prefix) + len(raw) + len(payload)

    async def send_large(self, kind: FrameType, raw: bytes, body: memoryview) -> int:
        """Write a frame with an encoded header in pieces, one when the one before is sent. Return the frame's bytes.

        `body` is one-dimensional bytes. A cancelled call leaves the stream corrupt; close the connection then.
        """
        prefix = frame_prefix(kind, len(raw), len(body))
        await self.drain()
        if len(body) <= _JOIN_BYTES:
            self._write(b"".join((prefix, raw, body)))
        else:
            self._write(prefix + raw)
            for start in range(0, len(body), WRITE_CHUNK_BYTES):
                await self.drain()
                self._write(body[start : start + WRITE_CHUNK_BYTES])
        await self.drain()
        return len(prefix) + len(raw) + len(body)

    async def drain(self) -> None:
        """Wait until the connection takes more bytes. Raises the connection's error when it is gone."""
        if self._lane is not None:
            await self._lane.drain()
        await self._drain_transport()

    def _write(self, data: Buffer) -> None:
        if self._lane is not None:
            self._lane.put(data)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def _deliver(self, data: bytes) -> None:
        await self._drain_transport()
        if self._transport is not None:
            self._transport.write(data)

    async def _drain_transport(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()
        if self._gone.is_set():
            assert self._failure is not None
            raise self._failure

    # --- end ----------------------------------------------------------------------------------------------

    def abort(self, error: NetworkError) -> None:
        """Drop the connection at once, for this reason."""
        if self._failure is None:
            self._failure = error
        if self._transport is not None:
            self._transport.abort()

    async def finish(self, within_s: float) -> None:
        """Send the queued data, then close. Drop the connection if that takes longer than `within_s`."""
        try:
            async with asyncio.timeout(within_s):
                if self._lane is not None:
                    await self._lane.flush()
                if self._transport is not None:
                    # A TLS transport of asyncio that is closed twice forgets its connection, and cannot abort it.
                    if not self._transport.is_closing():
                        self._transport.close()
                    await self._gone.wait()
        except TimeoutError:
            pass
        finally:
            self.abort(PeerTimeout(f"closing the connection took more than {within_s} s"))
            if self._transport is not None:
                # An aborted transport is gone within a turn or two of the loop; only a stuck loop takes longer.
                await asyncio.wait([asyncio.ensure_future(self._gone.wait())], timeout=0.5)

    @property
    def failure(self) -> NetworkError | None:
        """The error that ended the connection; None while it is usable."""
        return self._failure

    # --- inner --------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        try:
            while self._receive is not None or self._greeting is None:
                frame = self._decoder.next()
                if frame is None:
                    return
                if self._receive is not None:
                    self._receive(frame)
                else:
                    self._greeting = frame
                    self.pause_reading()
                    self._greeted.set()
        except ProtocolError as error:
            self._fail(error)

    def _fail(self, error: NetworkError) -> None:
        """Stop reading because the peer broke the protocol. The owner tells the peer and closes the connection."""
        if self._failure is None:
            self._failure = error
        self.pause_reading()
        self._greeted.set()
        if self._on_lost is None and self._transport is not None:
            self._transport.abort()
        self._report()

    def _report(self) -> None:
        if self._on_lost is not None and self._failure is not None:
            on_lost, self._on_lost = self._on_lost, None
            on_lost(self._failure)
