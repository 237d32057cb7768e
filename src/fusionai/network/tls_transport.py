"""Links over the internet: TLS 1.3 on TCP, both keys pinned."""

from __future__ import annotations

from collections.abc import Sequence

from fusionai.network.dialling import dial
from fusionai.network.greeting import Announcement
from fusionai.network.identity import Identity, PeerId
from fusionai.network.limits import Limits
from fusionai.network.listening import Listener
from fusionai.network.messages import Hello
from fusionai.network.transport import Arrivals, Channel, Transport


class TlsTransport(Transport):
    """Opens sockets of this computer with a node's identity."""

    def __init__(self, identity: Identity, limits: Limits) -> None:
        self._limits = limits
        self._server_context = identity.tls(server=True)
        self._client_context = identity.tls(server=False)

    async def listen(self, host: str, port: int, arrivals: Arrivals) -> Listener:
        """Listen on a TCP port."""
        listener = Listener(context=self._server_context, limits=self._limits, arrivals=arrivals)
        await listener.open(host, port)
        return listener

    async def dial(
        self, peer: PeerId, addresses: Sequence[str], *, announcement: Announcement, credential: bytes
    ) -> tuple[Hello, Channel, Channel]:
        """Try the addresses, and greet on two TLS connections to the first one that leads to the peer."""
        return await dial(
            peer,
            addresses,
            context=self._client_context,
            announcement=announcement,
            credential=credential,
            limits=self._limits,
        )
