"""How much a peer may make this node hold, and how long anything on a link may take."""

from __future__ import annotations

import msgspec

from fusionai.errors import ConfigError

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one endpoint. Each side enforces its own bounds, and they need not be equal."""

    greeting_bytes: int = 16 * _KIB
    """Longest frame, header and body together, before the peer is authenticated."""
    header_bytes: int = 64 * _KIB
    """Longest header of a frame on an authenticated link."""
    control_payload_bytes: int = 8 * _MIB
    """Longest payload of a request, an answer or a notice. Larger ones must be sent as bulk."""
    bulk_body_bytes: int = 4 * _GIB
    """Longest body of one bulk message: room for the largest embedding tables of today."""
    window_bytes: int = 64 * _MIB
    """Most bulk bytes of a peer that this side's handler has not finished with."""
    open_requests: int = 1024
    """Most requests of one peer that are worked on at one time. Together they may hold `queued_bytes`."""
    queued_messages: int = 1024
    queued_bytes: int = 32 * _MIB
    """Most bytes of control messages that wait for the handler, at most `queued_messages` of them. Beyond either bound
    the link's control connection is not read."""
    unauthenticated_connections: int = 64
    """Most connections that have not finished their greeting. One more ends the oldest."""
    handshake_s: float = 10.0
    """Most seconds from accepting a connection to an established link."""
    ping_interval_s: float = 2.5
    silence_s: float = 10.0
    """A link counts as dead when nothing arrives for this long plus three round trips (at least 0.5, at most 5 s). A
    reset is seen at once, so this decides only about vanished machines and cables. It is long because a laptop that
    compiles or swaps can stop a process for seconds. A shorter time loses such machines; a longer one notices a
    vanished machine later."""
    probe_bytes: int = 64 * _MIB
    """Most bytes this side sends for one probe that a peer asks for."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if not getattr(self, field) > 0:
                raise ConfigError(f"limits.{field} must be above 0, got {getattr(self, field)}")
        if self.greeting_bytes < 1024:
            raise ConfigError(f"limits.greeting_bytes must be at least 1024, got {self.greeting_bytes}")
