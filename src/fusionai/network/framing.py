"""Frames: a fixed prefix, a small header, a raw body. Pure code: bytes in, frames out, no socket and no clock.

    offset  bytes  field
    0       1      magic 0xFA
    1       1      type (`FrameType`)
    2       2      reserved, 0
    4       4      header length, big-endian
    8       8      body length, big-endian
    16      ...    header (MessagePack), then body

The TLS layer writes into the decoder's memory (`buffer`, then `advance`), so the body of a large message is never
copied. The decoder allocates a body only after its length has passed the limit of its type and the owner's `admit`. The
body's memory grows as bytes arrive, so a peer that only announces a large length costs no memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple

from fusionai.errors import ProtocolError

MAGIC = 0xFA
_PREFIX = struct.Struct(">BBHIQ")
PREFIX_BYTES = _PREFIX.size

_STAGING_BYTES = 64 << 10
# Below this much outstanding, copying out of the staging buffer costs less than another read of the TLS layer.
_DIRECT_BYTES = 16 << 10
_FIRST_STEP_BYTES = 1 << 20
_MOST_STEP_BYTES = 8 << 20
_ZEROS = bytes(_MOST_STEP_BYTES)


class FrameType(IntEnum):
    """Type of a frame. The number travels in the prefix."""

    HELLO = 1
    WELCOME = 2
    REFUSE = 3
    REQUEST = 4
    ANSWER = 5
    FAILURE = 6
    CANCEL = 7
    NOTICE = 8
    BULK = 9
    CREDIT = 10
    PING = 11
    PONG = 12
    BYE = 13


class Frame(NamedTuple):
    """One received frame."""

    type: FrameType
    header: bytes
    body: bytearray

    @property
    def wire_bytes(self) -> int:
        """Bytes of the frame, prefix included, before TLS."""
        return PREFIX_BYTES + len(self.header) + len(self.body)


def frame_prefix(kind: FrameType, header_bytes: int, body_bytes: int) -> bytes:
    """Return the prefix of a frame with a header and a body of these lengths."""
    return _PREFIX.pack(MAGIC, kind, 0, header_bytes, body_bytes)


Admit = Callable[[FrameType, bytes, int], None]
"""Called with type, header and body length before a body is allocated; raises ProtocolError to refuse it."""


class FrameDecoder:
    """Turns a stream of bytes into frames.

    Args:
        body_limits: longest body by type of frame; a type that is not in it is refused.
        header_limit: longest header in bytes.
        admit: see `Admit`.

    After a ProtocolError the decoder cannot be used any more: `next` then raises ProtocolError again.
    """

    def __init__(self, body_limits: Mapping[FrameType, int], header_limit: int, admit: Admit | None = None) -> None:
        self.expect(body_limits, header_limit, admit)
        self._staging = bytearray(_STAGING_BYTES)
        self._start = 0
        self._end = 0
        self._prefix: tuple[FrameType, int, int] | None = None
        self._header: bytes | None = None
        self._body: bytearray | None = None
        self._filled = 0
        self._direct = False
        self._broken = False

    def expect(self, body_limits: Mapping[FrameType, int], header_limit: int, admit: Admit | None = None) -> None:
        """Change the allowed types and lengths, from the next frame on."""
        if header_limit > _STAGING_BYTES:
            raise ValueError(f"headers are limited to {_STAGING_BYTES} bytes, got a limit of {header_limit}")
        self._body_limits = body_limits
        self._header_limit = header_limit
        self._admit = admit

    @property
    def held_bytes(self) -> int:
        """Bytes allocated for the frame being received, besides the fixed staging buffer."""
        return len(self._body) if self._body is not None else 0

    def buffer(self) -> memoryview:
        """Return memory for received bytes, never empty. Release it before calling any method but `advance`."""
        body = self._body
        if body is not None and self._start == self._end:
            remaining = self._body_bytes() - self._filled
            if remaining >= _DIRECT_BYTES:
                self._grow(body, remaining)
                self._direct = True
                return memoryview(body)[self._filled :]
        self._direct = False
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._staging):
            kept = self._end - self._start
            if kept == len(self._staging):
                raise ProtocolError(f"the peer sent {kept} bytes more than it was asked for")
            self._staging[:kept] = self._staging[self._start :]
            self._start, self._end = 0, kept
        return memoryview(self._staging)[self._end :]

    def advance(self, count: int) -> None:
        """Say that `count` bytes have been written to the start of the last `buffer`."""
        if self._direct:
            self._filled += count
        else:
            self._end += count

    def next(self) -> Frame | None:
        """Return the next complete frame, or None when more bytes are needed.

        Raises:
            ProtocolError: the bytes are no frame, or one that is not allowed here.
        """
        if self._broken:
            raise ProtocolError("the stream is already known to be corrupt")
        try:
            return self._next()
        except ProtocolError:
            self._broken = True
            self._body = None
            raise

    def close(self) -> None:
        """Free what is held of the frame that was being received. The decoder cannot be used any more."""
        self._broken = True
        self._body = None
        self._staging = bytearray()
        self._admit = None
        self._start = self._end = 0

    def _next(self) -> Frame | None:
        if self._prefix is None:
            raw = self._take(PREFIX_BYTES)
            if raw is None:
                return None
            self._prefix = self._checked_prefix(raw)
        kind, header_bytes, body_bytes = self._prefix
        if self._header is None:
            header = self._take(header_bytes)
            if header is None:
                return None
            self._header = bytes(header)
        if self._body is None:
            if self._admit is not None:
                self._admit(kind, self._header, body_bytes)
            self._body = bytearray(min(body_bytes, _FIRST_STEP_BYTES))
            self._filled = 0
        body = self._body
        while self._filled < body_bytes and self._start < self._end:
            self._grow(body, body_bytes - self._filled)
            count = min(len(body) - self._filled, self._end - self._start)
            body[self._filled : self._filled + count] = self._staging[self._start : self._start + count]
            self._filled += count
            self._start += count
        if self._filled < body_bytes:
            return None
        frame = Frame(kind, self._header, body)
        self._prefix = self._header = self._body = None
        return frame

    def _body_bytes(self) -> int:
        assert self._prefix is not None
        return self._prefix[2]

    def _grow(self, body: bytearray, remaining: int) -> None:
        """Grow the body's memory to at most twice what has arrived, so memory follows the bytes that the peer sent."""
        if self._filled == len(body):
            body += memoryview(_ZEROS)[: min(remaining, _MOST_STEP_BYTES, max(self._filled, _FIRST_STEP_BYTES))]

    def _take(self, count: int) -> bytearray | None:
        if self._end - self._start < count:
            return None
        raw = self._staging[self._start : self._start + count]
        self._start += count
        return raw

    def _checked_prefix(self, raw: bytearray) -> tuple[FrameType, int, int]:
        magic, number, reserved, header_bytes, body_bytes = _PREFIX.unpack(raw)
        if magic != MAGIC or reserved != 0:
            raise ProtocolError(f"bytes {raw[:4].hex()} do not begin a frame")
        try:
            kind = FrameType(number)
        except ValueError:
            raise ProtocolError(f"frame type {number} is unknown") from None
        limit = self._body_limits.get(kind)
        if limit is None:
            raise ProtocolError(f"a {kind.name} frame is not allowed here")
        if header_bytes > self._header_limit:
            raise ProtocolError(
                f"a {kind.name} header of {header_bytes:,} bytes passes the limit of {self._header_limit:,}"
            )
        if body_bytes > limit:
            raise ProtocolError(f"a {kind.name} body of {body_bytes:,} bytes passes the limit of {limit:,}")
        return kind, header_bytes, body_bytes
