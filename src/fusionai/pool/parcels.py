"""Large things that travel as bulk ahead of the request that names them: encoded OP-DAGs and assignments."""

from __future__ import annotations

import asyncio

from fusionai.errors import PeerTimeout, ProtocolError
from fusionai.network.identity import PeerId

MOST_BYTES = 256 << 20
"""Largest parcel: an OP-DAG of 15,000 operators takes about 10 MB."""


class ParcelInbox:
    """Parcels that came and are not asked for yet: one per sender, a few in all."""

    def __init__(self, *, most: int) -> None:
        self._most = most
        self._parcels: dict[PeerId, tuple[str, bytes]] = {}
        self._arrived = asyncio.Condition()

    async def put(self, sender: PeerId, name: str, body: bytes) -> None:
        """Keep a parcel; it replaces the sender's last one, and the oldest of all when there are too many.

        Raises:
            ProtocolError: it is too large.
        """
        if len(body) > MOST_BYTES:
            raise ProtocolError(f"a parcel of {len(body):,} bytes came; at most {MOST_BYTES:,} are allowed")
        async with self._arrived:
            self._parcels.pop(sender, None)
            while len(self._parcels) >= self._most:
                del self._parcels[next(iter(self._parcels))]
            self._parcels[sender] = (name, body)
            self._arrived.notify_all()

    async def take(self, sender: PeerId, name: str, *, timeout_s: float) -> bytes:
        """Wait for a sender's parcel of that name, and take it out.

        Raises:
            PeerTimeout: it did not come in time.
        """
        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: self._parcels.get(sender, ("", b""))[0] == name)
                return self._parcels.pop(sender)[1]
        except TimeoutError:
            raise PeerTimeout(f"{name[:64]} did not arrive from {sender[:12]} within {timeout_s:g} s") from None

    def drop(self, sender: PeerId) -> None:
        """Forget what a sender left."""
        self._parcels.pop(sender, None)
