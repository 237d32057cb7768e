"""Who gets a link with whom: keys, credentials, versions, addresses, and dialling from both sides."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from network_nodes import Node, until

from fusionai.errors import (
    AuthenticationError,
    ConfigError,
    PeerLost,
    PeerTimeout,
    ProtocolError,
    TokenError,
)
from fusionai.network import certificates
from fusionai.network.framing import FrameType, frame_prefix
from fusionai.network.identity import Identity, PeerId
from fusionai.network.limits import Limits
from fusionai.network.loop import run
from fusionai.network.messages import PeerVersion


@pytest.fixture(params=["fastest", "asyncio"])
def go(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Run a test on both event loops."""
    return run if request.param == "fastest" else asyncio.run


@contextlib.asynccontextmanager
async def nodes(*made: Node) -> AsyncIterator[None]:
    try:
        for node in made:
            await node.listen()
        yield
    finally:
        await asyncio.gather(*(node.endpoint.close() for node in made))


async def works(node: Node, other: Node) -> bool:
    link = node.endpoint.link(other.peer)
    return link is not None and await link.request("echo", b"x", timeout_s=60) == b"x"


# --- authentication -------------------------------------------------------------------------------------------


def test_credential_decides_at_the_listener(go: Any) -> None:
    asked: list[tuple[PeerId, bytes]] = []

    async def doorkeeper(peer: PeerId, credential: bytes) -> None:
        asked.append((peer, credential))
        if credential == b"expired":
            raise TokenError("the join token expired 2 days ago")
        if credential != b"right":
            raise AuthenticationError("not a member")

    async def main() -> None:
        a, b = Node("a"), Node("b", authorise=doorkeeper)
        async with nodes(a, b):
            for credential, error, says in (
                (b"", AuthenticationError, "not a member"),
                (b"expired", TokenError, "expired 2 days ago"),
            ):
                with pytest.raises(error, match=says):
                    await a.connect(b, credential=credential)
            assert a.got.links == b.got.links == []
            await a.connect(b, credential=b"right")
            assert asked == [(a.peer, b""), (a.peer, b"expired"), (a.peer, b"right")]
            assert await works(a, b)

    go(main())


def test_wrong_server_is_told_nothing(go: Any) -> None:
    async def main() -> None:
        asked = []

        async def note(peer: PeerId, credential: bytes) -> None:
            asked.append(credential)

        a, b = Node("a"), Node("b", authorise=note)
        async with nodes(a, b):
            wanted = Identity.ephemeral().peer_id
            with pytest.raises(AuthenticationError, match=f"is {b.peer[:12]}, but {wanted[:12]} was"):
                await a.endpoint.connect(wanted, [b.address], credential=b"secret", timeout_s=60)
            await asyncio.sleep(0.05)
            assert asked == []

    go(main())


def _context(**changes: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for name, value in changes.items():
        setattr(context, name, value)
    return context


async def _handshake_fails(address: str, context: ssl.SSLContext) -> bool:
    """Whether a client gets nothing out of the listener; a TLS 1.3 refusal shows only when reading."""
    host, port = address.split(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="")
        try:
            return await asyncio.wait_for(reader.read(100), 60) == b""
        finally:
            writer.close()
    except OSError:
        return True


def test_strangers_to_the_protocol_are_refused(go: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        a, b = Node("a"), Node("b")
        async with nodes(a, b):
            good = a.endpoint.identity.tls(server=False)
            assert await _handshake_fails(b.address, _context()), "no certificate"
            old = a.endpoint.identity.tls(server=False)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
            assert await _handshake_fails(b.address, old), "TLS 1.2"
            good.set_alpn_protocols(["h2"])
            assert await _handshake_fails(b.address, good), "another protocol over TLS"
            reader, writer = await asyncio.open_connection(*b.address.split(":"))
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in await asyncio.wait_for(reader.read(), 60)
            writer.close()
            assert b.got.links == []
            await a.connect(b)
            assert await works(a, b)

    with caplog.at_level(logging.ERROR):
        go(main())
    assert caplog.records == [], "what strangers do is no error of ours"


def test_key_that_is_not_ed25519_is_refused() -> None:
    """The issuer is public, so a stranger can have any kind of key certified by it."""
    import tempfile
    from pathlib import Path

    from cryptography.hazmat.primitives import serialization

    key = rsa.generate_private_key(65537, 2048)
    issuer = certificates.Ed25519PrivateKey.from_private_bytes(certificates._ISSUER_SEED)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(certificates._name("x"))
        .issuer_name(certificates._name("FusionAI public issuer"))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(certificates._NOT_BEFORE)
        .not_valid_after(certificates._NOT_AFTER)
        .sign(issuer, None)
    )
    assert hashes  # the signature of an Ed25519 issuer needs no separate hash
    context = _context()
    context.set_alpn_protocols([certificates.ALPN])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rsa.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context.load_cert_chain(path)

    async def main() -> None:
        b = Node("b")
        async with nodes(b):
            assert await _handshake_fails(b.address, context)
            assert b.got.links == []

    run(main())


def test_dialling_what_is_no_node(go: Any) -> None:
    async def main() -> None:
        a = Node("a", limits=Limits(handshake_s=2))
        peer = Identity.ephemeral().peer_id

        async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(100)
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            writer.close()

        async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()

        web = await asyncio.start_server(plain, "127.0.0.1", 0)
        silent = await asyncio.start_server(mute, "127.0.0.1", 0)
        async with nodes(a):
            address = f"127.0.0.1:{web.sockets[0].getsockname()[1]}"
            with pytest.raises(ProtocolError, match="no FusionAI node"):
                await a.endpoint.connect(peer, [address], timeout_s=60)
            address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
            with pytest.raises(PeerTimeout, match=r"within 0\.3 s"):
                await a.endpoint.connect(peer, [address], timeout_s=0.3)
            web.close()
            silent.close()

    go(main())


# --- versions -------------------------------------------------------------------------------------------------


def test_minor_versions_work_together() -> None:
    async def main() -> None:
        a = Node("a", release=PeerVersion(minor=7, package="0.9", features=("zstd",)))
        b = Node("b")
        async with nodes(a, b):
            link = await a.connect(b)
            assert await works(a, b)
            seen = (await b.endpoint.wait_for_link(a.peer, 60)).peer_release
            assert (seen.minor, seen.package, seen.features) == (7, "0.9", ("zstd",))
            assert link.peer_release.minor == 0

    run(main())


@pytest.mark.parametrize("dialler_is_newer", [True, False])
def test_major_versions_are_refused_by_name(dialler_is_newer: bool, caplog: pytest.LogCaptureFixture) -> None:
    new, old = PeerVersion(major=3, minor=1, package="3.0"), PeerVersion(package="0.1")

    async def main() -> None:
        a = Node("a", release=new if dialler_is_newer else old)
        b = Node("b", release=old if dialler_is_newer else new)
        async with nodes(a, b):
            with pytest.raises(ProtocolError) as caught:
                await a.connect(b)
            assert "protocol 3.1 (fusionai 3.0)" in str(caught.value)
            assert "protocol 2.0 (fusionai 0.1)" in str(caught.value)
            assert b.got.links == []

    with caplog.at_level(logging.WARNING):
        run(main())
    logged = caplog.text
    assert "protocol 3.1 (fusionai 3.0)" in logged
    assert "protocol 2.0 (fusionai 0.1)" in logged


# --- addresses ------------------------------------------------------------------------------------------------


def test_port_in_use() -> None:
    async def main() -> None:
        a, b = Node("a"), Node("b")
        async with nodes(a):
            port = int(a.address.rsplit(":", 1)[1])
            with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use .* choose another port"):
                await b.endpoint.listen(port=port)
            with pytest.raises(ConfigError, match="cannot listen"):
                await b.endpoint.listen("192.0.2.1")
            with pytest.raises(ConfigError, match="port 70000"):
                await b.endpoint.listen(port=70_000)
            await b.endpoint.close()

    run(main())


def test_port_is_free_again_after_close() -> None:
    async def main() -> None:
        a, b = Node("a"), Node("b")
        await a.listen()
        await b.connect(a)
        port = int(a.address.rsplit(":", 1)[1])
        await a.endpoint.close()
        c = Node("c")
        await c.endpoint.listen(port=port)
        await c.endpoint.close()
        await b.endpoint.close()

    run(main())


def test_first_address_that_leads_to_the_peer_is_used(go: Any) -> None:
    async def main() -> None:
        a, b, stranger = Node("a"), Node("b"), Node("s")
        async with nodes(b, stranger):
            with socket.socket() as blocked:
                blocked.bind(("127.0.0.1", 0))
                closed = f"127.0.0.1:{blocked.getsockname()[1]}"
                blackhole = "203.0.113.1:9"
                addresses = [blackhole, closed, stranger.address, b.address]
                link = await a.endpoint.connect(b.peer, addresses, timeout_s=60)
                assert await link.request("echo", b"x", timeout_s=60) == b"x"
                other = Identity.ephemeral().peer_id
                with pytest.raises(AuthenticationError, match="nobody can be reached"):
                    await a.endpoint.connect(other, [closed, stranger.address], timeout_s=60)
                with pytest.raises(PeerLost, match="check that it runs"):
                    await a.endpoint.connect(other, [closed], timeout_s=60)
            with pytest.raises(PeerLost, match="nobody can be reached"):
                await a.endpoint.connect(other, ["no-such-host.invalid:1"], timeout_s=60)
            with pytest.raises(ConfigError, match="no address"):
                await a.endpoint.connect(other, [], timeout_s=60)
            with pytest.raises(ConfigError, match="itself"):
                await a.endpoint.connect(a.peer, [b.address], timeout_s=60)
            await a.endpoint.close()

    go(main())


# --- one link a pair ------------------------------------------------------------------------------------------


def test_both_dial_at_once_and_one_link_survives(go: Any) -> None:
    async def main() -> None:
        for turn in range(8):
            a, b = Node("a"), Node("b")
            async with nodes(a, b):

                async def late(node: Node, other: Node, delay_s: float) -> Any:
                    await asyncio.sleep(delay_s)
                    return await node.connect(other)

                link_a, link_b = await asyncio.gather(
                    late(a, b, 0), late(b, a, 0.001 * turn if turn % 2 else 0), return_exceptions=False
                )
                assert await works(a, b)
                assert await works(b, a)
                await asyncio.sleep(0.02)
                assert (len(a.got.links), len(b.got.links)) == (1, 1)
                assert not a.got.closed + b.got.closed
                assert a.got.links == [link_a]
                assert b.got.links == [link_b]
                assert link_a.dialled != link_b.dialled

    go(main())


def test_many_callers_share_one_link() -> None:
    async def main() -> None:
        a, b = Node("a"), Node("b")
        async with nodes(a, b):
            waiting = asyncio.create_task(b.endpoint.wait_for_link(a.peer, 60))
            links = await asyncio.gather(*(a.connect(b) for _ in range(10)))
            assert len(set(links)) == 1
            assert (await waiting).peer == a.peer
            assert len(b.got.links) == 1
            with pytest.raises(PeerTimeout, match=r"within 0\.05 s"):
                await b.endpoint.wait_for_link(Identity.ephemeral().peer_id, 0.05)

    run(main())


def test_side_that_cannot_be_dialled_dials() -> None:
    async def main() -> None:
        hidden, open_ = Node("hidden"), Node("open")
        async with nodes(open_):
            waiting = asyncio.create_task(
                open_.endpoint.connect(hidden.peer, ["127.0.0.1:1"], timeout_s=60), name="cannot"
            )
            await hidden.connect(open_)
            with contextlib.suppress(PeerLost):
                await waiting
            assert await works(open_, hidden)
            await hidden.endpoint.close()

    run(main())


def test_restarted_peer_replaces_its_link_in_order() -> None:
    async def main() -> None:
        key = Identity.ephemeral()
        a, again, b = Node("a", identity=key), Node("a", identity=key), Node("b")
        async with nodes(a, b, again):
            await a.connect(b)
            await again.connect(b)
            await until(lambda: b.got.events == ["link", "close", "link"])
            assert "anew" in str(b.got.closed[0][1])
            assert await works(again, b)
            await until(lambda: a.got.closed)

    run(main())


# --- hostile and unlucky connections --------------------------------------------------------------------------


async def _closed_by_the_other(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 60) == b""


def test_unauthenticated_connections_are_bounded_in_number(go: Any) -> None:
    async def main() -> None:
        b = Node("b", limits=Limits(unauthenticated_connections=4, handshake_s=600.0))
        a = Node("a")
        async with nodes(a, b):
            host, port = b.address.split(":")
            mute = [await asyncio.open_connection(host, int(port)) for _ in range(12)]
            for reader, _ in mute[:8]:
                await _closed_by_the_other(reader)  # the oldest make room
            await a.connect(b)
            assert await works(a, b)
            for _, writer in mute:
                writer.close()

    go(main())


def test_unauthenticated_connections_are_bounded_in_time(go: Any) -> None:
    async def main() -> None:
        b = Node("b", limits=Limits(handshake_s=0.5))
        async with nodes(b):
            host, port = b.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            await _closed_by_the_other(reader)
            writer.close()

    go(main())


def test_greeting_is_bounded_in_bytes(go: Any) -> None:
    async def main() -> None:
        b = Node("b", limits=Limits(handshake_s=1.0))
        stranger = Identity.ephemeral().tls(server=False)
        async with nodes(b):
            host, port = b.address.split(":")
            for junk in (
                frame_prefix(FrameType.HELLO, 20_000, 0) + bytes(20_000),
                frame_prefix(FrameType.HELLO, 10, 1 << 40) + bytes(1 << 20),
                frame_prefix(FrameType.BULK, 10, 1 << 20) + bytes(1 << 20),
                frame_prefix(FrameType.HELLO, 2, 0) + b"\x80\x80" + bytes(1 << 20),
                bytes(1 << 20),
            ):
                reader, writer = await asyncio.open_connection(
                    host, int(port), ssl=stranger, server_hostname="", ssl_shutdown_timeout=0.2
                )
                try:
                    writer.write(junk)
                    await asyncio.wait_for(reader.read(), 60)
                except OSError:
                    pass
                finally:
                    writer.close()
            assert b.got.links == []
            await until(lambda: not b.endpoint._listeners[0]._unfinished, 60)

    go(main())


def test_half_a_link_is_dropped_after_its_deadline() -> None:
    """A peer that opens the control connection only, or the bulk connection only, gets nothing."""
    from fusionai.network.greeting import Announcement
    from fusionai.network.messages import encode

    async def main() -> None:
        b = Node("b", limits=Limits(handshake_s=0.5))
        stranger = Identity.ephemeral()
        hello = Announcement(release=PeerVersion(), instance=bytes(8), name="x", limits=Limits())
        async with nodes(b):
            host, port = b.address.split(":")
            for channel in ("control", "bulk"):
                raw = encode(hello.hello(channel=channel, session=bytes(16)))  # type: ignore[arg-type]
                reader, writer = await asyncio.open_connection(
                    host, int(port), ssl=stranger.tls(server=False), server_hostname=""
                )
                writer.write(frame_prefix(FrameType.HELLO, len(raw), 0) + raw)
                with contextlib.suppress(OSError):
                    await asyncio.wait_for(reader.read(), 60)
                writer.close()
            assert b.got.links == []
            assert b.endpoint._listeners[0]._pairings == {}
            assert b.endpoint._arriving == {}

    run(main())


def test_closing_while_connecting() -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        for delay_s in (0, 0.001, 0.003, 0.006, 0.01):
            a, b = Node("a"), Node("b")
            await b.listen()
            connecting = asyncio.create_task(a.connect(b))
            waiting = asyncio.create_task(a.endpoint.wait_for_link(Identity.ephemeral().peer_id, 5))
            await asyncio.sleep(delay_s)
            await asyncio.gather(a.endpoint.close(), b.endpoint.close())
            with contextlib.suppress(PeerLost):
                await connecting
            with pytest.raises(PeerLost, match="shuts down"):
                await waiting
            with pytest.raises(PeerLost, match="shuts down"):
                await a.connect(b)
            cancelled = asyncio.create_task(Node("c").connect(b))
            await asyncio.sleep(delay_s)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
        await until(lambda: asyncio.all_tasks() == before)

    run(main())
