"""A member of a pool: what compnodes, owners and observers have in common."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TypeVar, overload

import msgspec

from fusionai.errors import AuthenticationError, NetworkError, ProtocolError
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import Identity, PeerId
from fusionai.network.lab import LabConfig
from fusionai.network.limits import Limits
from fusionai.network.link import Link
from fusionai.network.token import JoinToken
from fusionai.pool.advertising import advertised
from fusionai.pool.background_tasks import BackgroundTasks
from fusionai.pool.codec import decode, encode, kind_of
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import Heartbeat, MemberRegistered, RegisterMember
from fusionai.pool.names import MemberRole, check_name
from fusionai.pool.session import BrokerSession
from fusionai.units.addresses import split_address

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer", bound=msgspec.Struct)

_TELL_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """How a machine takes part in a pool."""

    name: str
    """For people; the broker makes it unique."""
    listen: str | None = "127.0.0.1:0"
    """"host:port" at which other members may dial this one; None not to listen."""
    advertise: tuple[str, ...] = ()
    """Addresses to tell others of, where they differ from `listen`."""
    lab: LabConfig | None = None
    """Emulated links."""
    emulates_speed: bool = False
    """Whether this machine is slowed down on purpose."""
    limits: Limits | None = None
    """Limits of the network; None: the usual ones."""


class PoolMember:
    """This machine as a member of a pool.

    Make it inside the event loop, `add` its parts, `await start()`, and in the end `await close()`. It stays
    registered: when the connection with the broker breaks it tries again for ever, and its parts go on meanwhile. A
    member without parts is an observer: it asks the broker, and takes nothing from anybody.

        member = PoolMember(identity, token, "observer", MemberConfig(name="anna", listen=None))
        await member.start()                                      # TokenError, AuthenticationError, PeerLost, ...
        status = await member.request(StatusQuery(), Status, timeout_s=15)   # errors of the broker, by class and text
        await member.close()
    """

    def __init__(self, identity: Identity, token: str | JoinToken, role: MemberRole, config: MemberConfig) -> None:
        """Prepare; nothing is sent yet.

        Args:
            identity: this machine's key.
            token: join token of the pool.
            role: what the broker is to take this member for.
            config: see there.

        Raises:
            TokenError: the token is malformed, forged or expired.
            ConfigError: the name or an address is malformed.
        """
        check_name(config.name)
        self.identity = identity
        self.token = token if isinstance(token, JoinToken) else JoinToken.decode(token)
        self.role = role
        self.name = config.name
        """The name asked for; after `start` the one given by the broker."""
        self.address: str | None = None
        """Where it listens, after `start`."""
        self.endpoint = Endpoint(
            identity, self, authorise=self._authorise, limits=config.limits, lab=config.lab, name=config.name
        )
        self._config = config
        self._addresses: tuple[str, ...] = ()
        self._parts: list[MemberPart] = []
        self._tasks = BackgroundTasks()
        self._session = BrokerSession(
            self.endpoint, self.token, register=self._register, on_registered=self._on_registered
        )

    def add(self, *parts: MemberPart) -> None:
        """Take up parts, before `start`. They are closed in this order."""
        self._parts += parts

    @property
    def lab(self) -> bool:
        """Whether this machine emulates its speed or its links."""
        return self._config.lab is not None or self._config.emulates_speed

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, connect with the broker, and register.

        Raises:
            TokenError, AuthenticationError: the broker does not admit this machine, or another node answers there.
            PeerLost, PeerTimeout: nobody answers there.
            ConfigError: the port is in use.
        """
        try:
            if self._config.listen is not None:
                host, port = split_address(self._config.listen)
                self.address = await self.endpoint.listen(host, port)
                self._addresses = advertised(self.address, self._config.advertise, towards=self.token.addresses)
            await self._session.open(heartbeat=self._heartbeat if self._parts else None)
        except BaseException:
            await self.close()
            raise

    async def wait_ended(self) -> None:
        """Wait until the broker refuses this machine for good, and raise its error. Cancel it to stop waiting."""
        await asyncio.shield(self._session.ended)

    async def close(self, reason: str = "it stopped") -> None:
        """Leave the pool: say good-bye, end all parts, close everything. May be called again."""
        await self._session.close(reason)
        await self._tasks.close()
        for part in self._parts:
            await part.close(reason)
        await self.endpoint.close()

    # --- words with the broker ----------------------------------------------------------------------------------

    @overload
    async def request(self, message: msgspec.Struct, answer: type[_Answer], *, timeout_s: float) -> _Answer: ...

    @overload
    async def request(self, message: msgspec.Struct, answer: None, *, timeout_s: float) -> None: ...

    async def request(
        self, message: msgspec.Struct, answer: type[_Answer] | None, *, timeout_s: float
    ) -> _Answer | None:
        """Ask the broker, and return its answer of that type; with None, only wait for it.

        Raises:
            PeerLost: there is no connection with the broker now.
            PeerTimeout: no answer in time.
            FusionError: what the broker says.
        """
        payload = await self._session.link().request(kind_of(message), encode(message), timeout_s=timeout_s)
        return None if answer is None else decode(answer, payload)

    async def send_bulk(self, kind: str, header: bytes, body: bytes) -> None:
        """Send the broker something large, ahead of the request that names it. Raises PeerLost as `request` does."""
        await self._session.link().send_bulk(kind, header, body)

    def tell(self, message: msgspec.Struct) -> None:
        """Send the broker a notice in the background; it is lost when there is no connection."""
        self._tasks.start(self._tell(message), f"tell {kind_of(message)}")

    async def _tell(self, message: msgspec.Struct) -> None:
        try:
            async with asyncio.timeout(_TELL_TIMEOUT_S):
                await self._session.link().notify(kind_of(message), encode(message))
        except (NetworkError, TimeoutError) as error:
            log.debug("the broker was not told %s: %s", kind_of(message), error)

    def beat_now(self) -> None:
        """Send the broker a heartbeat without waiting for its time: what the parts add to it has changed."""
        self._session.beat_now()

    # --- admission --------------------------------------------------------------------------------------------

    async def _authorise(self, peer: PeerId, credential: bytes) -> None:
        """Admit whom a part needs, such as machines of own jobs. Nobody else, the broker included: it is dialled."""
        if not any(part.admits(peer) for part in self._parts):
            raise AuthenticationError(
                f"{self.name} takes links only from machines of a job that it works for, and {peer[:12]} is none"
            )

    # --- Handler ----------------------------------------------------------------------------------------------

    async def on_link(self, link: Link) -> None:
        """Nothing to do: links are asked for where they are needed."""

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Pass a request on to the part that takes it."""
        parts = self._parts_for(link, kind)
        if not parts:
            raise ProtocolError(f"request {kind!r} is unknown to this member; update fusionai on one of both sides")
        return await parts[0].on_request(link, kind, payload)

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Pass a notice on to the parts that take it."""
        parts = self._parts_for(link, kind)
        for part in parts:
            await part.on_notice(link, kind, payload)
        if not parts:
            log.info("the broker sent a notice %r that this version does not know", kind)

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Pass bulk on to the part that takes it."""
        parts = self._parts_for(link, kind)
        if not parts:
            raise ProtocolError(f"bulk {kind!r} is unknown to this member")
        await parts[0].on_bulk(link, kind, header, body)

    async def on_close(self, link: Link, error: NetworkError) -> None:
        """Tell the session, and the parts."""
        self._session.broken(link, error)
        for part in self._parts:
            if link.peer == self.token.broker:
                part.on_broker_closed(link.peer, error)
            else:
                await part.on_peer_closed(link.peer, error)

    def _parts_for(self, link: Link, kind: str) -> list[MemberPart]:
        """Return the parts that take a kind from this peer. Raises ProtocolError where it is not the peer's to send."""
        from_broker = link.peer == self.token.broker
        work = [part for part in self._parts if part.peer_prefixes and kind.startswith(part.peer_prefixes)]
        if work:
            if from_broker:
                raise ProtocolError("the broker takes no part in jobs")
            return work
        if not from_broker:
            raise ProtocolError(f"{kind!r} is for the broker to say, not for {link.peer[:12]}")
        return [part for part in self._parts if kind in part.broker_kinds]

    # --- inside -----------------------------------------------------------------------------------------------

    def _register(self) -> RegisterMember:
        message = RegisterMember(
            name=self._config.name,
            role=self.role,
            device=None,
            addresses=self._addresses,
            lab=self.lab,
        )
        for part in self._parts:
            message = part.register(message)
        return message

    def _on_registered(self, registered: MemberRegistered) -> None:
        check_name(registered.name)
        self.name = self.endpoint.name = registered.name

    def _heartbeat(self) -> Heartbeat:
        message = Heartbeat(busy=0.0, memory_bytes=0, holds=(), bytes_sent={})
        for part in self._parts:
            message = part.heartbeat(message)
        return message
