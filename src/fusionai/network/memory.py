"""A network inside one process: endpoints whose links need no sockets, and a script that may break them.

Everything above the channels is the real thing: an `Endpoint` given a `MemoryTransport` keeps its links, its credit,
its requests and its patience as over TLS. Only dialling, listening and the carrying of frames are twins. Delays and
rates come from a `LabConfig`, and pass on the event loop's clock: on a `ScriptedLoop` they take no time.

A script observes every message when it is sent and when it arrives, and may change its fate, cut a link, kill a
machine (its connections are reset, as when a process dies) or have one vanish (silence, as when a cable is pulled).
What a machine has sent before it was killed still arrives.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from fusionai.errors import AuthenticationError, ConfigError, FusionError, NetworkError, PeerLost, ProtocolError
from fusionai.network.clock import now_s
from fusionai.network.framing import Admit, Frame, FrameType
from fusionai.network.greeting import Announcement, check_release, refusal, refuse
from fusionai.network.identity import PeerId
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.network.limits import Limits
from fusionai.network.messages import Bulk, Call, Failure, Hello, Notice, Reply, decode, encode
from fusionai.network.shaping import LinkShaper
from fusionai.network.transport import Arrivals, Buffer, Channel, Listening, Transport
from fusionai.units.addresses import join_address, split_address

HOST = "memory"
_FIRST_PORT = 40_000
_AT_ONCE = EmulatedLink()


@dataclass(frozen=True, slots=True)
class Message:
    """One frame on its way, as a script sees it."""

    source: str
    target: str
    frame: FrameType
    kind: str
    """The upper layer's kind, for an answer or a failure that of its request; "link.ping" and the like otherwise."""
    content: bytes
    """The typed part: the payload of a control message, the upper layer's header of bulk."""

    @property
    def upper(self) -> bool:
        """Whether the layer above the links sent it."""
        return not self.kind.startswith("link.")


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of a message."""

    copies: int = 1
    """0: it is lost; 2: it arrives twice, which only control messages can."""
    delay_s: float = 0.0
    """Seconds that it, and whatever follows on its channel, arrives later."""


DROP = Fate(copies=0)
TWICE = Fate(copies=2)

OnSend = Callable[[Message], Fate | None]
OnArrival = Callable[[Message], None]


class MemoryNetwork:
    """All machines that can reach each other. For one event loop."""

    def __init__(self, lab: LabConfig | None = None) -> None:
        """`lab` says how slow links are, by the machines' names; by default they take no time. Jitter and loss are
        not emulated."""
        self._lab = lab or LabConfig()
        self._machines: dict[str, MemoryTransport] = {}
        self._doors: dict[str, _Door] = {}
        self._ports = itertools.count(_FIRST_PORT)
        self._cut_for_good: set[frozenset[str]] = set()
        self.on_send: OnSend | None = None
        """Called with every message before it leaves; may return its fate, and may kill or cut."""
        self.on_arrival: OnArrival | None = None
        """Called with every message when it arrives, before its receiver has it; may kill or cut."""

    def transport(self, name: str, peer: PeerId, limits: Limits | None = None) -> MemoryTransport:
        """Return a machine's way into this network; one of the same name before it is forgotten."""
        machine = MemoryTransport(self, name, peer, limits or Limits())
        self._machines[name] = machine
        return machine

    # --- what a script may do ---------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """Stop a machine: it sends and receives nothing more, and its peers' connections are reset at once."""
        machine = self._machines[name]
        machine.alive = False
        machine.shut()
        for channel in list(machine.channels):
            channel.freeze()

    def vanish(self, name: str) -> None:
        """Stop a machine, without anybody being told: its peers find out by its silence."""
        machine = self._machines[name]
        machine.alive = False
        machine.silent = True

    def cut(self, one: str, other: str, *, for_good: bool = False) -> None:
        """Reset the connections between two machines; `for_good` keeps them from dialling each other again."""
        if for_good:
            self._cut_for_good.add(frozenset((one, other)))
        for channel in list(self._machines[one].channels):
            if channel.away.name == other:
                channel.reset()
                channel.other.reset()

    def alive(self, name: str) -> bool:
        """Whether a machine has been neither killed nor made to vanish."""
        return self._machines[name].alive

    # --- what the transports use ------------------------------------------------------------------------------

    def line(self, source: str, target: str) -> EmulatedLink:
        """Return how slow one direction is."""
        return self._lab.link(source, target) or _AT_ONCE

    def reachable(self, source: str, address: str) -> _Door | None:
        """Return what listens at an address, None if nothing there can be reached."""
        door = self._doors.get(address)
        if door is None or frozenset((source, door.machine.name)) in self._cut_for_good:
            return None
        return door

    def open(self, machine: MemoryTransport, host: str, port: int, arrivals: Arrivals) -> _Door:
        """Add a listener."""
        address = join_address(host, port or next(self._ports))
        if address in self._doors:
            raise ConfigError(f"{address} is in use by another machine; choose another port, or 0 for any free one")
        door = self._doors[address] = _Door(self, address, machine, arrivals)
        return door

    def shut(self, door: _Door) -> None:
        """Remove a listener."""
        if self._doors.get(door.address) is door:
            del self._doors[door.address]

    def sent(self, message: Message) -> Fate:
        """Ask the script about a message that is being sent."""
        return (None if self.on_send is None else self.on_send(message)) or Fate()

    def arrives(self, message: Message) -> None:
        """Tell the script of a message that is about to be received."""
        if self.on_arrival is not None:
            self.on_arrival(message)


class _Door(Listening):
    """A listener of a machine."""

    def __init__(self, network: MemoryNetwork, address: str, machine: MemoryTransport, arrivals: Arrivals) -> None:
        self.address = address
        self.machine = machine
        self.arrivals = arrivals
        self._network = network

    async def close(self) -> None:
        self._network.shut(self)


class MemoryTransport(Transport):
    """One machine's way into a `MemoryNetwork`."""

    def __init__(self, network: MemoryNetwork, name: str, peer: PeerId, limits: Limits) -> None:
        self.network = network
        self.name = name
        self.peer = peer
        self.limits = limits
        self.alive = True
        self.silent = False
        """Whether it vanished: nobody hears from it, not even that it is gone."""
        self.channels: list[MemoryChannel] = []
        self._doors: list[_Door] = []

    async def listen(self, host: str, port: int, arrivals: Arrivals) -> _Door:
        """Let the other machines of the network dial."""
        door = self.network.open(self, host, port, arrivals)
        self._doors.append(door)
        return door

    def shut(self) -> None:
        """Stop listening."""
        for door in self._doors:
            self.network.shut(door)

    async def dial(
        self, peer: PeerId, addresses: Sequence[str], *, announcement: Announcement, credential: bytes
    ) -> tuple[Hello, Channel, Channel]:
        """Greet whoever listens at the first address that leads to the peer."""
        if not addresses:
            raise ConfigError(f"there is no address to dial {peer[:12]} at")
        for address in addresses:
            split_address(address)
        errors: list[FusionError] = []
        for address in addresses:
            try:
                return await self._greet(peer, address, announcement, credential)
            except (PeerLost, AuthenticationError) as error:
                errors.append(error)
        worst = next((error for error in errors if not isinstance(error, PeerLost)), errors[0])
        raise type(worst)("; ".join(dict.fromkeys(str(error) for error in errors)))

    async def _greet(
        self, peer: PeerId, address: str, announcement: Announcement, credential: bytes
    ) -> tuple[Hello, Channel, Channel]:
        door = self.network.reachable(self.name, address)
        if door is None:
            raise PeerLost(f"nobody can be reached at {address}; check that it runs, and that the link is not cut")
        target, arrivals = door.machine, door.arrivals
        await self._travel(target)
        if target.peer != peer:
            raise AuthenticationError(
                f"the node at {address} is {target.peer[:12]}, but {peer[:12]} was to be reached; nothing was "
                "sent to it"
            )
        session = secrets.token_bytes(16)
        hello = announcement.hello(channel="control", session=session, credential=credential)
        theirs = arrivals.announcement()
        made: tuple[MemoryChannel, MemoryChannel] | None = None
        refused: FusionError | None = None
        try:
            check_release(encode(hello), theirs.release, self.peer)
            await arrivals.admit(self.peer, hello)
            self._check_alive(target)
            made = (_pair(self, target), _pair(self, target))
            arrivals.established(hello, made[0].other, made[1].other)
        except FusionError as error:
            refused = error
        finally:
            arrivals.ended(self.peer, hello)
        try:
            await self._travel(target, back=True)
        except BaseException:
            for channel in made or ():
                channel.abort(PeerLost("this attempt to connect was given up"))
            raise
        if refused is not None or made is None:
            raise refusal(refuse(refused or PeerLost("not admitted"), theirs.release), peer)
        welcome = theirs.hello(channel="control", session=session)
        check_release(encode(welcome), announcement.release, peer)
        return welcome, *made

    async def _travel(self, target: MemoryTransport, *, back: bool = False) -> None:
        """Wait as long as a greeting is on its way; for ever when one of the two has vanished."""
        names = (target.name, self.name) if back else (self.name, target.name)
        await asyncio.sleep(self.network.line(*names).one_way_ms / 1e3)
        self._check_alive(target)
        if self.silent or target.silent:
            await asyncio.get_running_loop().create_future()

    def _check_alive(self, target: MemoryTransport) -> None:
        for machine in (self, target):
            if not machine.alive and not machine.silent:
                raise PeerLost(f"{machine.name} has died")


def _pair(dialler: MemoryTransport, target: MemoryTransport) -> MemoryChannel:
    """Return the dialler's end of a new connection."""
    mine, theirs = MemoryChannel(dialler, target), MemoryChannel(target, dialler)
    mine.other, theirs.other = theirs, mine
    return mine


_Item = tuple[Frame, Message] | str
"""A frame, or how the connection ended."""


class MemoryChannel(Channel):
    """One end of a connection."""

    other: MemoryChannel

    def __init__(self, home: MemoryTransport, away: MemoryTransport) -> None:
        self.peer = away.peer
        self.remote_host = HOST
        self.heard_s = now_s()
        self.home = home
        self.away = away
        home.channels.append(self)
        self._network = home.network
        self._line = self._network.line(home.name, away.name)
        self._line_free_s = 0.0
        self._last_due_s = 0.0
        self._coming: deque[_Item] = deque()
        """On their way to this end, in order."""
        self._waiting: deque[_Item] = deque()
        """Arrived, and not read yet."""
        self._limits: Mapping[FrameType, int] = {}
        self._admit: Admit | None = None
        self._receive: Callable[[Frame], None] | None = None
        self._on_lost: Callable[[NetworkError], None] | None = None
        self._paused = False
        self._frozen = False
        self._failure: NetworkError | None = None
        self._calls: dict[int, str] = {}
        """Kinds of this end's requests, for scripts."""

    @property
    def failure(self) -> NetworkError | None:
        """Why it is of no further use."""
        return self._failure

    def start(
        self,
        body_limits: Mapping[FrameType, int],
        receive: Callable[[Frame], None],
        on_lost: Callable[[NetworkError], None],
        admit: Admit | None = None,
    ) -> None:
        """Read on."""
        self._limits, self._receive, self._on_lost, self._admit = body_limits, receive, on_lost, admit
        self.heard_s = now_s()
        if self._failure is not None:
            asyncio.get_running_loop().call_soon(self._report)
        self._read()

    def pause_reading(self) -> None:
        """Let frames wait here."""
        self._paused = True

    def resume_reading(self) -> None:
        """Take the frames that wait."""
        self._paused = False
        self._read()

    def shape(self, shaper: LinkShaper, *, urgent: bool) -> None:
        """Refuse: the network itself has the delays."""
        raise ConfigError("a memory network takes its own lab configuration; give the endpoint none")

    # --- sending ----------------------------------------------------------------------------------------------

    def send(self, kind: FrameType, header: msgspec.Struct, payload: Buffer = b"") -> int:
        """Put a control frame on its way, past bulk that waits."""
        raw = encode(header)
        frame = Frame(kind, raw, bytearray(payload))
        if self._open:
            self._dispatch(frame, self._describe(kind, header, bytes(payload)), now_s())
        return frame.wire_bytes

    async def send_large(self, kind: FrameType, raw: bytes, body: memoryview) -> int:
        """Put bulk on its way; return when the line has taken all of it."""
        await self.drain()
        frame = Frame(kind, raw, bytearray(body))
        bulk = decode(Bulk, raw)
        begun_s = max(now_s(), self._line_free_s)
        self._line_free_s = begun_s + frame.wire_bytes / self._line.rate_bytes_per_s
        message = Message(self.home.name, self.away.name, kind, bulk.kind, bulk.header)
        self._dispatch(frame, message, begun_s)
        if (left_s := self._line_free_s - now_s()) > 0:
            await asyncio.sleep(left_s)
        await self.drain()
        return frame.wire_bytes

    async def drain(self) -> None:
        """Return at once, or raise why the channel is gone; a dead machine's code waits here for ever."""
        if self._frozen or self.home.silent:
            await asyncio.get_running_loop().create_future()
        if self._failure is not None:
            raise self._failure

    def _describe(self, kind: FrameType, header: msgspec.Struct, payload: bytes) -> Message:
        name = f"link.{kind.name.lower()}"
        match header:
            case Call():
                name = self._calls[header.number] = header.kind
            case Notice():
                name = header.kind
            case Failure():
                name = self.other._calls.pop(header.number, name)
            case Reply() if kind is FrameType.ANSWER:
                name = self.other._calls.pop(header.number, name)
        return Message(self.home.name, self.away.name, kind, name, payload)

    def _dispatch(self, frame: Frame, message: Message, begun_s: float) -> None:
        fate = self._network.sent(message)
        if not self._open:
            return  # the script has killed this machine, or cut the link
        arrival_s = begun_s + frame.wire_bytes / self._line.rate_bytes_per_s + self._line.one_way_ms / 1e3
        if fate.copies > 1 and frame.type is FrameType.BULK:
            raise ConfigError("credit is granted for each bulk message once; have its sender send it again")
        for copy in range(fate.copies):
            again = Frame(frame.type, frame.header, bytearray(frame.body)) if copy else frame
            self._carry((again, message), arrival_s + fate.delay_s)

    def _carry(self, item: _Item, arrival_s: float) -> None:
        """Have something arrive at the other end, not before what was sent earlier."""
        loop = asyncio.get_running_loop()
        self._last_due_s = max(self._last_due_s, arrival_s)
        self.other._coming.append(item)
        wait_s = self._last_due_s - now_s()
        if wait_s > 0:
            loop.call_later(wait_s, self.other._land)
        else:
            loop.call_soon(self.other._land)

    # --- receiving --------------------------------------------------------------------------------------------

    def _land(self) -> None:
        """What has been longest on its way to this end is here."""
        if not self._coming:
            return  # it was cut on its way
        item = self._coming.popleft()
        if self.home.silent or self.away.silent:
            return
        if not isinstance(item, str):
            self.heard_s = now_s()
            if self._open:
                self._network.arrives(item[1])
        if self._open:
            self._waiting.append(item)
            self._read()

    def _read(self) -> None:
        while self._waiting and self._receive is not None and not self._paused and self._open:
            item = self._waiting.popleft()
            if isinstance(item, str):
                self._gone(item)
                return
            frame = item[0]
            try:
                limit = self._limits.get(frame.type)
                if limit is None or len(frame.body) > limit:
                    raise ProtocolError(f"a {frame.type.name} of {len(frame.body):,} bytes is not allowed here")
                if self._admit is not None:
                    self._admit(frame.type, frame.header, len(frame.body))
                self._receive(frame)
            except ProtocolError as error:
                # As over a socket: hear no more of this peer, and leave it to the link to say so and close.
                self._failure = self._failure or error
                self._report()

    # --- ending -----------------------------------------------------------------------------------------------

    def abort(self, error: NetworkError) -> None:
        """Reset the connection."""
        was_open = self._closable
        self._failure = self._failure or error
        if was_open:
            self._close("was reset")

    async def finish(self, within_s: float) -> None:
        """Close after what is on its way; takes a round trip, or all of `within_s` when the other end is silent."""
        if not self._closable:
            return
        self._close("was closed by the other side")
        silent = self.home.silent or self.away.silent
        await asyncio.sleep(within_s if silent else min(within_s, self._line.rtt_s))

    def freeze(self) -> None:
        """This machine has died: its code goes nowhere from here, and the other end learns of it."""
        if self._closable:
            self._close("was reset")
        self._frozen = True

    def reset(self) -> None:
        """Something between the two ends has cut the connection: what is on its way is lost."""
        if self._closable:
            self._coming.clear()
            self._gone("was reset")

    @property
    def _closable(self) -> bool:
        """Whether the connection still exists at this end."""
        return self in self.home.channels

    @property
    def _open(self) -> bool:
        return self._failure is None and not (self._frozen or self.home.silent) and self._closable

    def _close(self, how: str) -> None:
        """Let go of the connection, and have the other end learn how."""
        self.home.channels.remove(self)
        if not self.home.silent:
            self._carry(how, now_s() + self._line.one_way_ms / 1e3)
        self._failure = self._failure or PeerLost(f"the connection to {self.peer[:12]} was closed")
        asyncio.get_running_loop().call_soon(self._report)

    def _gone(self, how: str) -> None:
        """The other end, or something between, has ended the connection."""
        self.home.channels.remove(self)
        self._failure = self._failure or PeerLost(f"the connection to {self.peer[:12]} {how}")
        asyncio.get_running_loop().call_soon(self._report)

    def _report(self) -> None:
        if self._on_lost is not None and self._failure is not None and not self._frozen:
            on_lost, self._on_lost = self._on_lost, None
            on_lost(self._failure)
