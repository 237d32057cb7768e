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
from collections.abc import Callable, Sequence

from fusionai.errors import AuthenticationError, ConfigError, FusionError, PeerLost
from fusionai.network.greeting import Announcement, check_release, refusal, refuse
from fusionai.network.identity import PeerId
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.network.limits import Limits
from fusionai.network.memory_channel import CarriedMessage, Fate, MemoryChannel, pair
from fusionai.network.messages import Hello, encode
from fusionai.network.transport import Arrivals, Channel, Listening, Transport
from fusionai.units.addresses import join_address, split_address

_FIRST_PORT = 40_000
_AT_ONCE = EmulatedLink()


OnSend = Callable[[CarriedMessage], Fate | None]
OnArrival = Callable[[CarriedMessage], None]


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

    def sent(self, message: CarriedMessage) -> Fate:
        """Ask the script about a message that is being sent."""
        return (None if self.on_send is None else self.on_send(message)) or Fate()

    def arrives(self, message: CarriedMessage) -> None:
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
        self.machine.forget(self)


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

    def forget(self, door: _Door) -> None:
        """A listener is closed."""
        self._doors = [other for other in self._doors if other is not door]

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
            made = (pair(self, target), pair(self, target))
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
