"""Reaching a peer: tries its addresses, opens TLS, checks the peer's key, and greets on both connections."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Sequence

from fusionai.errors import AuthenticationError, ConfigError, FusionError, NetworkError, PeerLost, ProtocolError
from fusionai.network.connection import Connection
from fusionai.network.framing import Frame, FrameType
from fusionai.network.greeting import Announcement, check_greeting, check_release, refusal
from fusionai.network.identity import PeerId
from fusionai.network.limits import Limits
from fusionai.network.messages import Hello, LinkRefused, decode, encode
from fusionai.units.addresses import split_address

HEAD_START_S = 0.3
"""Seconds that an address is tried alone before the next one is tried as well. Less wastes connections; more makes a
peer whose first address is wrong slow to reach."""
_WORST_FIRST = (AuthenticationError, ProtocolError, FusionError)


async def dial(
    peer: PeerId,
    addresses: Sequence[str],
    *,
    context: ssl.SSLContext,
    announcement: Announcement,
    credential: bytes,
    limits: Limits,
) -> tuple[Hello, Connection, Connection]:
    """Return the peer's greeting, and a control and a bulk connection to it. The caller sets the deadline.

    Raises:
        AuthenticationError: another key answers at the address, or the peer does not admit this node.
        ProtocolError: what answers is no FusionAI node, or one of an incompatible version.
        DuplicateLink: the peer has, or is about to have, a link with this node by its own dialling.
        PeerLost: nobody answers at any address.
        FusionError: what the peer's `authorise` raised.
    """
    if not addresses:
        raise ConfigError(f"there is no address to dial {peer[:12]} at")
    for address in addresses:
        split_address(address)
    opened: list[Connection] = []
    kept: tuple[Connection, Connection] | None = None
    try:
        control, bulk = await _first_to_open(peer, addresses, context, limits, opened)
        session = secrets.token_bytes(16)
        hello = announcement.hello(channel="control", session=session, credential=credential)
        if len(encode(hello)) > limits.greeting_bytes:
            raise ConfigError(f"the credential has {len(credential):,} bytes, too many for a greeting")
        control.send(FrameType.HELLO, hello)
        bulk.send(FrameType.HELLO, announcement.hello(channel="bulk", session=session))
        welcome = _welcomed(await control.greeting(), announcement, control)
        _welcomed(await bulk.greeting(), announcement, bulk)
        kept = (control, bulk)
        return welcome, control, bulk
    finally:
        for connection in opened:
            if kept is None or connection not in kept:
                connection.abort(PeerLost("this attempt to connect was given up"))


def _welcomed(frame: Frame, announcement: Announcement, connection: Connection) -> Hello:
    if frame.type is FrameType.REFUSE:
        raise refusal(decode(LinkRefused, frame.header), connection.peer)
    if frame.type is not FrameType.WELCOME:
        raise ProtocolError(f"{connection.peer[:12]} answered the greeting with {frame.type.name}")
    check_release(frame.header, announcement.release, connection.peer)
    welcome = decode(Hello, frame.header)
    check_greeting(welcome)
    return welcome


async def _first_to_open(
    peer: PeerId,
    addresses: Sequence[str],
    context: ssl.SSLContext,
    limits: Limits,
    opened: list[Connection],
) -> tuple[Connection, Connection]:
    """Return the two connections of the first address that leads to the peer."""
    attempts: set[asyncio.Task[tuple[Connection, Connection]]] = set()
    errors: list[FusionError] = []
    waiting = list(addresses)
    try:
        while waiting or attempts:
            if waiting:
                attempts.add(asyncio.create_task(_open_pair(peer, waiting.pop(0), context, limits, opened)))
            done, attempts = await asyncio.wait(
                attempts, timeout=HEAD_START_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                error = attempt.exception()
                if error is None:
                    return attempt.result()
                if not isinstance(error, FusionError):
                    raise error
                errors.append(error)
    finally:
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
    kind = next(kind for kind in _WORST_FIRST if any(isinstance(error, kind) for error in errors))
    worst = next(error for error in errors if isinstance(error, kind))
    raise type(worst)("; ".join(dict.fromkeys(str(error) for error in errors)))


async def _open_pair(
    peer: PeerId, address: str, context: ssl.SSLContext, limits: Limits, opened: list[Connection]
) -> tuple[Connection, Connection]:
    pair = [asyncio.create_task(_open(peer, address, context, limits, opened)) for _ in range(2)]
    try:
        control, bulk = await asyncio.gather(*pair)
        return control, bulk
    finally:
        for task in pair:
            task.cancel()
        await asyncio.gather(*pair, return_exceptions=True)


async def _open(
    peer: PeerId, address: str, context: ssl.SSLContext, limits: Limits, opened: list[Connection]
) -> Connection:
    """Return a connection to `peer` at `address`, its key compared before anything is sent."""
    host, port = split_address(address)
    connection = Connection(limits)
    opened.append(connection)
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: connection,
            host,
            port,
            ssl=context,
            server_hostname="",
            ssl_handshake_timeout=limits.handshake_s,
            ssl_shutdown_timeout=1.0,
        )
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise ProtocolError(
            f"what listens at {address} is no FusionAI node, or refused the TLS 1.3 handshake ({reason})"
        ) from error
    except OSError as error:
        raise PeerLost(
            f"nobody can be reached at {address}: {error.strerror or error or type(error).__name__}; check that it "
            "runs, and that a firewall lets it through"
        ) from error
    if isinstance(connection.failure, NetworkError):
        raise connection.failure
    if connection.peer != peer:
        raise AuthenticationError(
            f"the node at {address} is {connection.peer[:12]}, but {peer[:12]} was to be reached; nothing was "
            "sent to it"
        )
    return connection
