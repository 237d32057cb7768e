"""One end of a connection inside this process, and the messages that a script sees on it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from fusionai.errors import ConfigError, NetworkError, PeerLost, ProtocolError
from fusionai.network.clock import now_s
from fusionai.network.framing import Admit, Frame, FrameType
from fusionai.network.identity import PeerId
from fusionai.network.lab import EmulatedLink
from fusionai.network.messages import Bulk, Call, Failure, Notice, Reply, decode, encode
from fusionai.network.shaping import LinkShaper
from fusionai.network.transport import Buffer, Channel

HOST = "memory"
"""Where all machines seem to be."""


@dataclass(frozen=True, slots=True)
class CarriedMessage:
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


class Carrier(Protocol):
    """What the ends of a connection ask of the network between them."""

    def line(self, source: str, target: str) -> EmulatedLink:
        """Return how slow one direction is."""

    def sent(self, message: CarriedMessage) -> Fate:
        """Ask the script about a message that is being sent."""

    def arrives(self, message: CarriedMessage) -> None:
        """Tell the script of a message that is about to be received."""


class CarryingMachine(Protocol):
    """What a connection knows of the machine at one of its ends."""

    name: str
    peer: PeerId
    silent: bool
    channels: list[MemoryChannel]

    @property
    def network(self) -> Carrier:
        """What lies between the machines."""


_Item = tuple[Frame, CarriedMessage] | str
"""A frame, or how the connection ended."""


class MemoryChannel(Channel):
    """One end of a connection."""

    other: MemoryChannel

    def __init__(self, home: CarryingMachine, away: CarryingMachine) -> None:
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
        """LinkRefused: the network itself has the delays."""
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
        message = CarriedMessage(self.home.name, self.away.name, kind, bulk.kind, bulk.header)
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

    def _describe(self, kind: FrameType, header: msgspec.Struct, payload: bytes) -> CarriedMessage:
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
            case Reply() if kind is FrameType.CANCEL:
                self._calls.pop(header.number, None)  # no answer will come, or a late one
        return CarriedMessage(self.home.name, self.away.name, kind, name, payload)

    def _dispatch(self, frame: Frame, message: CarriedMessage, begun_s: float) -> None:
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
        self._let_go()
        if not self.home.silent:
            self._carry(how, now_s() + self._line.one_way_ms / 1e3)
        self._failure = self._failure or PeerLost(f"the connection to {self.peer[:12]} was closed")
        asyncio.get_running_loop().call_soon(self._report)

    def _gone(self, how: str) -> None:
        """The other end, or something between, has ended the connection."""
        self._let_go()
        self._failure = self._failure or PeerLost(f"the connection to {self.peer[:12]} {how}")
        asyncio.get_running_loop().call_soon(self._report)

    def _let_go(self) -> None:
        self.home.channels.remove(self)
        self._coming.clear()
        self._waiting.clear()
        self._calls.clear()

    def _report(self) -> None:
        if self._on_lost is not None and self._failure is not None and not self._frozen:
            on_lost, self._on_lost = self._on_lost, None
            on_lost(self._failure)


def pair(dialler: CarryingMachine, target: CarryingMachine) -> MemoryChannel:
    """Return the dialler's end of a new connection."""
    mine, theirs = MemoryChannel(dialler, target), MemoryChannel(target, dialler)
    mine.other, theirs.other = theirs, mine
    return mine
