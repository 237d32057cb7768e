"""What a member of a pool can do besides being registered: one part for each thing, such as hosting work or probing."""

from __future__ import annotations

from fusionai.errors import NetworkError, ProtocolError
from fusionai.network.endpoint import Link
from fusionai.network.identity import PeerId
from fusionai.pool.messages import Heartbeat, RegisterMember


class MemberPart:
    """One part of a member. Derive from it, and override what the part needs; the rest does nothing."""

    broker_kinds: frozenset[str] = frozenset()
    """Kinds of requests, notices and bulk that the broker sends to this part. From anybody else they are refused."""

    peer_prefixes: tuple[str, ...] = ()
    """Beginnings of the kinds that other members send to this part. From the broker they are refused."""

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Answer a request of one of this part's kinds."""
        raise ProtocolError(f"{kind!r} is no request")

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Take a notice of one of this part's kinds. A notice of the broker goes to every part that names its kind."""
        raise ProtocolError(f"{kind!r} is no notice")

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take bulk of one of this part's kinds."""
        raise ProtocolError(f"{kind!r} is no bulk")

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """The link with another member is gone."""

    def on_broker_closed(self, broker: PeerId, error: NetworkError) -> None:
        """The link with the broker is gone; the member tries to make it again."""

    def admits(self, peer: PeerId) -> bool:
        """Return whether this part needs the peer to link to this member."""
        return False

    def register(self, message: RegisterMember) -> RegisterMember:
        """Return the registration with what this part adds to it."""
        return message

    def heartbeat(self, message: Heartbeat) -> Heartbeat:
        """Return the heartbeat with what this part adds to it."""
        return message

    async def close(self, reason: str) -> None:
        """The member leaves the pool: end what this part does. The endpoint is still open."""
