"""Counts the messages and bytes on a link, by kind of message."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_KINDS = 256
"""Most kinds that are counted apart. A peer may invent kinds, so further ones are counted together."""
OTHER = "other"

_RECORD_BYTES = 1 << 14
_RECORD_OVERHEAD_BYTES = 22


def tls_bytes(frame_bytes: int) -> int:
    """Return the bytes of a frame on the wire: TLS 1.3 adds 22 bytes to every record of 16 KiB."""
    return frame_bytes + _RECORD_OVERHEAD_BYTES * -(-frame_bytes // _RECORD_BYTES)


@dataclass(slots=True)
class MessageTotals:
    """Sums over the messages of one kind in one direction."""

    messages: int = 0
    payload_bytes: int = 0
    """Bytes from the upper layer: control payloads, or bodies of bulk messages."""
    wire_bytes: int = 0
    """Bytes of frames and TLS records. TCP and IP headers (about 4 % more on Ethernet) and retransmissions are not
    in."""

    def add(self, payload_bytes: int, frame_bytes: int) -> None:
        """Count one message."""
        self.messages += 1
        self.payload_bytes += payload_bytes
        self.wire_bytes += tls_bytes(frame_bytes)


@dataclass(slots=True)
class LinkStatistics:
    """Traffic since the link came up. Kinds that begin with "link." are the link's own."""

    sent: dict[str, MessageTotals] = field(default_factory=dict)
    received: dict[str, MessageTotals] = field(default_factory=dict)

    def count_sent(self, kind: str, payload_bytes: int, frame_bytes: int) -> None:
        """Count a message that was given to the connection."""
        _entry(self.sent, kind).add(payload_bytes, frame_bytes)

    def count_received(self, kind: str, payload_bytes: int, frame_bytes: int) -> None:
        """Count a message that arrived completely."""
        _entry(self.received, kind).add(payload_bytes, frame_bytes)

    @property
    def sent_bytes(self) -> int:
        """All bytes sent, as on the wire."""
        return sum(each.wire_bytes for each in self.sent.values())

    @property
    def received_bytes(self) -> int:
        """All bytes received, as on the wire."""
        return sum(each.wire_bytes for each in self.received.values())


def _entry(table: dict[str, MessageTotals], kind: str) -> MessageTotals:
    entry = table.get(kind)
    if entry is None:
        if len(table) >= MOST_KINDS:
            kind = OTHER
        entry = table.setdefault(kind, MessageTotals())
    return entry
