"""How much a peer may make this node hold, and how long anything on a link may take."""

from __future__ import annotations

import msgspec

from fusionai.errors import ConfigError

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one endpoint. Each side enforces its own; both must agree only on what they really send."""

    greeting_bytes: int = 16 * _KIB
    """Longest frame, header and body together, before the peer is authenticated."""
    header_bytes: int = 64 * _KIB
    """Longest header of a frame on an authenticated link."""
    control_payload_bytes: int = 8 * _MIB
    """Longest payload of a request, an answer or a notice; anything longer belongs into bulk."""
    bulk_body_bytes: int = 4 * _GIB
    """Longest body of one bulk message: room for the largest embedding tables of today."""
    window_bytes: int = 64 * _MIB
    """Bulk bytes a peer may send ahead of what this side's handler has finished with."""
    open_requests: int = 1024
    """Requests of one peer that may be in work at once; together they may hold `queued_bytes`."""
    queued_messages: int = 1024
    queued_bytes: int = 32 * _MIB
    """Control messages waiting for the handler; beyond either bound the link's control side is not read."""
    unauthenticated_connections: int = 64
    """Connections that have not finished their greeting; one more displaces the oldest."""
    handshake_s: float = 10.0
    """From accepting a connection to an established link."""
    ping_interval_s: float = 2.5
    silence_s: float = 10.0
    """A link on which nothing arrives for this long, plus three round trips (at least 0.5, at most 5 s), is
    dead. A reset is seen at once without it, so this only decides about vanished machines and cables. It is
    long because an owner's laptop that compiles or swaps stops a process for seconds without its being gone."""
    probe_bytes: int = 64 * _MIB
    """Most bytes this side sends for one probe that a peer asks for."""

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if not getattr(self, field) > 0:
                raise ConfigError(f"limits.{field} must be above 0, got {getattr(self, field)}")
        if self.greeting_bytes < 1024:
            raise ConfigError(f"limits.greeting_bytes must be at least 1024, got {self.greeting_bytes}")
