"""A node on the network: dials, listens, and keeps exactly one link to every peer.

Either side may dial the other. When both dial at once, one link survives by this rule: the node with the smaller id
refuses the other's dialling while its own is under way, and the other node waits for that link. A node that has
admitted a peer's greeting does not dial that peer. A peer whose process restarted has lost its old link, and so has a
peer that dials again after it dialled the present link: the new link replaces the old one, and the old link's
`on_close` comes before the new link's `on_link`.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence

from fusionai.errors import ConfigError, PeerLost, PeerTimeout, ProtocolError
from fusionai.network.greeting import Announcement, DuplicateLink
from fusionai.network.identity import Identity, PeerId
from fusionai.network.lab import LabConfig
from fusionai.network.limits import Limits
from fusionai.network.link import Handler, Link
from fusionai.network.messages import Hello, PeerVersion
from fusionai.network.tls_transport import TlsTransport
from fusionai.network.transport import Arrivals, Buffer, Channel, Listening, Transport

__all__ = ["Buffer", "Endpoint", "Handler", "Link"]

Authorise = Callable[[PeerId, bytes], Awaitable[None]]
"""Judges a peer that dials in, by key and credential; the peer has proved to hold the key by then.

Any FusionError it raises refuses the peer, whose `connect` raises the same class with its text."""

_DUPLICATE_PATIENCE_S = 0.5


class Endpoint:
    """All links of one node. For one event loop; make it inside that loop.

    Args:
        identity: this node's key.
        handler: the upper layer.
        authorise: see `Authorise`; not asked about peers that this side dials.
        limits: bounds on what peers may cost.
        lab: emulated links; None for real ones only.
        name: this node's name for peers, lab mode and logs. A change applies to later links.
        release: the versions that this node speaks; tests change it.
        transport: carries the frames; None for TLS over TCP.
    """

    def __init__(
        self,
        identity: Identity,
        handler: Handler,
        *,
        authorise: Authorise,
        limits: Limits | None = None,
        lab: LabConfig | None = None,
        name: str = "",
        release: PeerVersion | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.identity = identity
        self.name = name
        self.lab = lab
        self._handler = handler
        self._authorise = authorise
        self._limits = limits or Limits()
        self._release = release or PeerVersion()
        self._instance = secrets.token_bytes(8)
        self._transport = transport or TlsTransport(identity, self._limits)
        self._listeners: list[Listening] = []
        self._links: dict[PeerId, Link] = {}
        self._not_gone: dict[PeerId, list[Link]] = {}
        """By peer, the links that have not ended altogether: the present one, and earlier ones that are being taken
        down."""
        self._starting: set[asyncio.Task[None]] = set()
        self._dialling: set[PeerId] = set()
        self._arriving: dict[PeerId, set[bytes]] = {}
        self._waiting: dict[PeerId, set[asyncio.Future[None]]] = {}
        self._closing = False

    @property
    def peer_id(self) -> PeerId:
        """This node's own id."""
        return self.identity.peer_id

    @property
    def links(self) -> tuple[Link, ...]:
        """All open links."""
        return tuple(link for link in self._links.values() if not link.closed)

    async def listen(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Accept connections, and return "host:port" with the port chosen where 0 was asked.

        Raises:
            ConfigError: the port is in use, or the address is not this machine's.
        """
        arrivals = Arrivals(
            announcement=self._announcement, admit=self._admit, established=self._accepted, ended=self._arrival_ended
        )
        listener = await self._transport.listen(host, port, arrivals)
        self._listeners.append(listener)
        return listener.address

    async def connect(
        self, peer: PeerId, addresses: Sequence[str], *, credential: bytes = b"", timeout_s: float
    ) -> Link:
        """Return the link to `peer`: the one there is, or one by dialling it at any of `addresses`.

        Raises:
            AuthenticationError: another node answers there, or this one is not admitted.
            ProtocolError: no FusionAI node, or one of an incompatible version.
            PeerTimeout: no link within `timeout_s`.
            PeerLost: nobody answers at any of the addresses.
            FusionError: what the peer's `authorise` raised, such as TokenError.
        """
        if peer == self.peer_id:
            raise ConfigError(f"{peer[:12]} is this node itself; a node has no link to itself")
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    link = self._open_link(peer)
                    if link is not None:
                        return link
                    if peer in self._dialling or peer in self._arriving:
                        await self._change(peer)
                        continue
                    try:
                        return await self._dial(peer, addresses, credential)
                    except DuplicateLink:
                        await self._change_or_pause(peer)
        except TimeoutError:
            where = ", ".join(addresses)
            raise PeerTimeout(
                f"no link with {peer[:12]} at {where} within {timeout_s:g} s; check that it runs and can be reached"
            ) from None

    def link(self, peer: PeerId) -> Link | None:
        """Return the open link to `peer`, if there is one."""
        link = self._links.get(peer)
        return None if link is None or link.closed else link

    async def wait_for_link(self, peer: PeerId, timeout_s: float) -> Link:
        """Wait for a link to `peer`, no matter which side dials, and return it.

        Raises:
            PeerTimeout: there was none within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while (link := self._open_link(peer)) is None:
                    await self._change(peer)
                return link
        except TimeoutError:
            raise PeerTimeout(f"{peer[:12]} has not connected within {timeout_s:g} s") from None

    async def close(self) -> None:
        """End all links, listening and dialling. Returns when nothing is left. Not for use inside a handler."""
        self._closing = True
        for peer in list(self._waiting):
            self._wake(peer)
        await asyncio.gather(*(listener.close() for listener in self._listeners))
        not_gone = [link for links in self._not_gone.values() for link in links]
        await asyncio.gather(*(link.close("its node shuts down") for link in not_gone))
        await asyncio.gather(*self._starting)

    # --- dialling -----------------------------------------------------------------------------------------

    async def _dial(self, peer: PeerId, addresses: Sequence[str], credential: bytes) -> Link:
        """Dial, unless the peer's own link appears before."""
        self._dialling.add(peer)
        dialled = asyncio.create_task(
            self._transport.dial(peer, addresses, announcement=self._announcement(), credential=credential)
        )
        appeared = asyncio.create_task(self._appearance(peer))
        made: Link | None = None
        try:
            await asyncio.wait((dialled, appeared), return_when=asyncio.FIRST_COMPLETED)
            if dialled.done() and not self._closing:
                greeting, control, bulk = dialled.result()
                made = self._add(greeting, control, bulk, dialled=True)
                return made
            return await appeared
        finally:
            for task in (dialled, appeared):
                task.cancel()
            await asyncio.gather(dialled, appeared, return_exceptions=True)
            if made is None and not dialled.cancelled() and dialled.exception() is None:
                for channel in dialled.result()[1:]:
                    channel.abort(PeerLost("this attempt to connect was given up"))
            self._dialling.discard(peer)
            self._wake(peer)

    async def _appearance(self, peer: PeerId) -> Link:
        while (link := self._open_link(peer)) is None:
            await self._change(peer)
        return link

    # --- listening ----------------------------------------------------------------------------------------

    async def _admit(self, peer: PeerId, hello: Hello) -> None:
        if peer == self.peer_id:
            raise ProtocolError("this node dialled itself; its address is listed under another node's name")
        await self._authorise(peer, hello.credential)
        if self._closing:
            raise PeerLost("the node shuts down")
        present = self.link(peer)
        if present is not None:
            same_process = present.peer_instance == hello.instance
            if same_process and present.dialled and self.peer_id < peer:
                raise DuplicateLink("there is a link already, dialled by the node with the smaller id")
        elif peer in self._dialling and self.peer_id < peer:
            raise DuplicateLink("the node with the smaller id is dialling already")
        self._arriving.setdefault(peer, set()).add(hello.session)

    def _accepted(self, greeting: Hello, control: Channel, bulk: Channel) -> None:
        self._add(greeting, control, bulk, dialled=False)

    def _arrival_ended(self, peer: PeerId, hello: Hello) -> None:
        sessions = self._arriving.get(peer)
        if sessions is not None:
            sessions.discard(hello.session)
            if not sessions:
                del self._arriving[peer]
        self._wake(peer)

    # --- links --------------------------------------------------------------------------------------------

    def _add(self, greeting: Hello, control: Channel, bulk: Channel, *, dialled: bool) -> Link:
        peer = control.peer
        lab = self.lab.link(self.name, greeting.name) if self.lab is not None else None
        link = Link(
            greeting=greeting,
            control=control,
            bulk=bulk,
            dialled=dialled,
            handler=self._handler,
            limits=self._limits,
            lab=lab,
            lab_seed=f"{self.lab.seed if self.lab else 0}/{self.name}->{greeting.name}",
            on_gone=self._gone,
            on_ended=self._ended,
        )
        before = self._not_gone.get(peer, [])
        for other in before:
            other.end(PeerLost(f"{peer[:12]} connected anew"))
        self._links[peer] = link
        self._not_gone[peer] = [*before, link]
        if before:
            task = asyncio.create_task(self._start_after(link, before))
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)
        else:
            link.start()
        self._wake(peer)
        return link

    async def _start_after(self, link: Link, before: Sequence[Link]) -> None:
        """Start a link when earlier links with the peer have ended, so that the upper layer sees only one at a time."""
        for other in before:
            await other.wait_closed()
        link.start()

    def _gone(self, link: Link) -> None:
        """A link is of no further use: its connections are closed."""
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        self._wake(link.peer)

    def _ended(self, link: Link) -> None:
        """All of a link is gone, and the upper layer knows: forget it, with whatever it holds."""
        remaining = [other for other in self._not_gone.get(link.peer, []) if other is not link]
        if remaining:
            self._not_gone[link.peer] = remaining
        else:
            self._not_gone.pop(link.peer, None)

    def _open_link(self, peer: PeerId) -> Link | None:
        if self._closing:
            raise PeerLost("this node shuts down")
        return self.link(peer)

    def _announcement(self) -> Announcement:
        return Announcement(release=self._release, instance=self._instance, name=self.name, limits=self._limits)

    # --- waiting for a change of what is known about a peer --------------------------------------------------

    async def _change(self, peer: PeerId) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(peer, set())
        waiting.add(woken)
        try:
            await woken
        finally:
            waiting.discard(woken)
            if not waiting and self._waiting.get(peer) is waiting:
                del self._waiting[peer]

    async def _change_or_pause(self, peer: PeerId) -> None:
        """Wait, after the answer "duplicate", for the peer's own link. If it does not appear, the caller dials
        again."""
        if self.link(peer) is not None:
            return
        try:
            async with asyncio.timeout(_DUPLICATE_PATIENCE_S):
                await self._change(peer)
        except TimeoutError:
            pass

    def _wake(self, peer: PeerId) -> None:
        for woken in self._waiting.get(peer, ()):
            if not woken.done():
                woken.set_result(None)
