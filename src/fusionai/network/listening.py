"""The listening side: accepts connections, bounds the unauthenticated ones, and joins pairs of them to links.

Every accepted connection is a task with one deadline, which covers everything from TCP to the link. When too many
connections are unfinished, the oldest is dropped: an honest peer needs only a few round trips, so an old unfinished
connection is broken or hostile.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
from dataclasses import dataclass, field
from functools import partial

from fusionai.errors import ConfigError, FusionError, PeerLost, PeerTimeout, ProtocolError
from fusionai.network.connection import Connection
from fusionai.network.framing import FrameType
from fusionai.network.greeting import DuplicateLink, check_greeting, check_release, refuse
from fusionai.network.identity import PeerId
from fusionai.network.limits import Limits
from fusionai.network.messages import Hello, decode
from fusionai.network.transport import Arrivals, Listening
from fusionai.units.addresses import join_address

log = logging.getLogger(__name__)

_BACKLOG = 256
_FAREWELL_S = 1.0


@dataclass
class _Pairing:
    """The two connections of a link that is not complete yet."""

    bulk: asyncio.Future[Connection] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    taken: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Listener(Listening):
    """One listening socket."""

    def __init__(self, *, context: ssl.SSLContext, limits: Limits, arrivals: Arrivals) -> None:
        self.address = ""
        self._context = context
        self._limits = limits
        self._announcement = arrivals.announcement
        self._admit = arrivals.admit
        self._established = arrivals.established
        self._ended = arrivals.ended
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._unfinished: dict[asyncio.Task[None], None] = {}
        self._untouched: set[socket.socket] = set()
        self._pairings: dict[tuple[PeerId, bytes], _Pairing] = {}

    async def open(self, host: str, port: int) -> None:
        """Listen at `address` from now on: the host, and the port chosen where `port` is 0.

        Raises:
            ConfigError: the address cannot be listened at.
        """
        loop = asyncio.get_running_loop()
        if not 0 <= port <= 65535:
            raise ConfigError(f"port {port} is not between 0 and 65535")
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, where = found[0]
            listening = socket.socket(family, kind, protocol)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}: {error.strerror or error}; give another host") from error
        try:
            listening.setblocking(False)
            if os.name == "posix":
                # On Windows the same option would let two programs share the port.
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            raise _listen_error(host, port, error) from error
        self._socket = listening
        self._accepting = loop.create_task(self._accept(listening))
        self.address = join_address(host, int(listening.getsockname()[1]))

    async def close(self) -> None:
        """Stop listening, and drop what is not a link yet."""
        tasks = [*self._unfinished, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                # If this is cancelled in the same turn of the loop as an accept, the new socket is dropped and closes
                # itself.
                accepted, _ = await loop.sock_accept(listening)
            except OSError as error:
                # No file descriptors are left, or the peer has gone already. Listening goes on in both cases.
                log.warning("accepting a connection failed: %s", error)
                await asyncio.sleep(0.1)
                continue
            while len(self._unfinished) >= self._limits.unauthenticated_connections:
                oldest = next(iter(self._unfinished))
                del self._unfinished[oldest]
                oldest.cancel()
            connection = Connection(self._limits)
            self._untouched.add(accepted)
            task = loop.create_task(self._receive(connection, accepted))
            self._unfinished[task] = None
            task.add_done_callback(partial(self._forget, accepted))

    def _forget(self, accepted: socket.socket, task: asyncio.Task[None]) -> None:
        self._unfinished.pop(task, None)
        if accepted in self._untouched:
            # The connection was dropped before its task ran, so no transport owns the socket yet.
            self._untouched.discard(accepted)
            accepted.close()

    async def _receive(self, connection: Connection, accepted: socket.socket) -> None:
        self._untouched.discard(accepted)
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection,
                    accepted,
                    ssl=self._context,
                    ssl_handshake_timeout=self._limits.handshake_s,
                    ssl_shutdown_timeout=1.0,
                )
                await self._greet(connection)
            return
        except FusionError as error:
            quiet = isinstance(error, DuplicateLink | PeerLost)
            log.log(
                logging.DEBUG if quiet else logging.WARNING,
                "refused a connection of %s: %s",
                connection.peer[:12] or "a stranger",
                error,
            )
            if connection.failure is None or isinstance(connection.failure, ProtocolError):
                connection.send(FrameType.REFUSE, refuse(error, self._announcement().release))
                await connection.finish(_FAREWELL_S)
        except TimeoutError:
            log.warning("a connection did not get through its greeting in %.0f s", self._limits.handshake_s)
        except OSError as error:
            log.info("a connection failed in its TLS handshake: %s", error)
        except asyncio.CancelledError:
            connection.abort(PeerTimeout("dropped before it was authenticated"))
            raise
        except Exception:
            log.exception("admitting a connection failed")
        connection.abort(PeerLost("the connection was refused"))

    async def _greet(self, connection: Connection) -> None:
        frame = await connection.greeting()
        if frame.type is not FrameType.HELLO:
            raise ProtocolError(f"the first frame must be HELLO, got {frame.type.name}")
        check_release(frame.header, self._announcement().release, connection.peer)
        hello = decode(Hello, frame.header)
        check_greeting(hello)
        key = (connection.peer, hello.session)
        pairing = self._pairings.setdefault(key, _Pairing())
        if hello.channel == "bulk":
            await self._offer(key, pairing, connection)
        else:
            await self._pair(key, pairing, connection, hello)

    async def _offer(self, key: tuple[PeerId, bytes], pairing: _Pairing, connection: Connection) -> None:
        """Keep a bulk connection until its control connection takes it or fails."""
        if pairing.bulk.done():
            raise ProtocolError("a second bulk connection came for one session")
        pairing.bulk.set_result(connection)
        try:
            taken = await asyncio.shield(pairing.taken)
        finally:
            self._pairings.pop(key, None)
        if not taken:
            raise PeerLost("its control connection was refused")

    async def _pair(self, key: tuple[PeerId, bytes], pairing: _Pairing, connection: Connection, hello: Hello) -> None:
        peer = connection.peer
        try:
            await self._admit(peer, hello)
            bulk = await asyncio.shield(pairing.bulk)
            for each in (connection, bulk):
                if each.failure is not None:
                    raise each.failure
            mine = self._announcement()
            connection.send(FrameType.WELCOME, mine.hello(channel="control", session=hello.session))
            bulk.send(FrameType.WELCOME, mine.hello(channel="bulk", session=hello.session))
            if not pairing.taken.done():
                pairing.taken.set_result(True)
            self._established(hello, connection, bulk)
        finally:
            if not pairing.taken.done():
                pairing.taken.set_result(False)
            self._pairings.pop(key, None)
            self._ended(peer, hello)


def _listen_error(host: str, port: int, error: OSError) -> ConfigError:
    where = join_address(host, port)
    if error.errno == errno.EADDRINUSE or getattr(error, "winerror", None) in (10013, 10048):
        return ConfigError(
            f"port {port} of {host} is in use by another program; stop it, choose another port, or 0 for any free one"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"this user may not listen at {where}; choose a port above 1023")
    return ConfigError(f"cannot listen at {where}: {error.strerror or error}; choose another host or port")
