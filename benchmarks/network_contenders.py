"""The contenders of the network benchmark: FusionAI's links, raw sockets and gRPC, each as a server and as a client.

All speak one protocol: so many messages of one size, and the receiver's word that it has them; or one question and its
answer.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fusionai.errors import NetworkError
from fusionai.network.endpoint import Endpoint, Link
from fusionai.network.identity import Identity, PeerId
from fusionai.network.loop import loop_factory

QUESTION = bytes(100)
_Result = TypeVar("_Result")


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        factory = loop_factory() or asyncio.new_event_loop
        self.loop = factory()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


def make_certificate(folder: Path) -> Path:
    """Write a self-signed certificate for localhost, with its key; gRPC takes no Ed25519."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "localhost.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


# --- servers --------------------------------------------------------------------------------------------------


def serve_blocking(listening: socket.socket, context: ssl.SSLContext | None) -> None:
    connection, _ = listening.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context is not None:
        connection = context.wrap_socket(connection, server_side=True)
    while True:
        head = receive(connection, 16)
        if not head:
            return
        count, size = struct.unpack(">QQ", head)
        bodies = [receive(connection, size) for _ in range(count)]
        connection.sendall(bodies[-1] if count == 1 and size == len(QUESTION) else b"k" * len(QUESTION))


def receive(connection: socket.socket, size: int) -> bytearray:
    """Return `size` bytes, or none at the end of the stream."""
    body = bytearray(size)
    view, position = memoryview(body), 0
    while position < size:
        count = connection.recv_into(view[position:])
        if count == 0:
            return bytearray()
        position += count
    return body


async def serve_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        try:
            count, size = struct.unpack(">QQ", await reader.readexactly(16))
        except asyncio.IncompleteReadError:
            return
        for _ in range(count):
            body = await reader.readexactly(size)
        writer.write(body if count == 1 and size == len(QUESTION) else b"k" * len(QUESTION))
        await writer.drain()


class GrpcService(grpc.GenericRpcHandler):
    """A stream of messages that is counted, and an echo."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == "/b/stream":
            return grpc.stream_unary_rpc_method_handler(lambda bodies, _: str(sum(map(len, bodies))).encode())
        return grpc.unary_unary_rpc_method_handler(lambda body, _: body)


GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def serve_grpc(credentials: grpc.ServerCredentials | None) -> tuple[grpc.Server, int]:
    server = grpc.server(ThreadPoolExecutor(4), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((GrpcService(),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, port


class Counter:
    """The handler of FusionAI's side: counts bulk, echoes requests."""

    def __init__(self) -> None:
        self.arrived = 0
        self.changed = asyncio.Event()

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        if kind == "echo":
            return payload
        wanted = int(payload)
        while self.arrived < wanted:
            self.changed.clear()
            await self.changed.wait()
        self.arrived -= wanted
        return b""

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None: ...

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        self.arrived += 1
        self.changed.set()

    async def on_link(self, link: Link) -> None: ...

    async def on_close(self, link: Link, error: NetworkError) -> None: ...


async def anybody(peer: PeerId, credential: bytes) -> None: ...


def server_main(pem: Path) -> None:
    """Serve every contender until standard input ends."""
    ports: dict[str, Any] = {}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(pem)
    for name, tls in (("blocking", None), ("blocking_tls", context)):
        listening = socket.create_server(("127.0.0.1", 0))
        ports[name] = listening.getsockname()[1]
        threading.Thread(target=serve_blocking, args=(listening, tls), daemon=True).start()
    raw = pem.read_bytes()
    keep = [
        serve_grpc(None),
        serve_grpc(grpc.ssl_server_credentials([(raw, raw)])),
    ]
    ports["grpc"], ports["grpc_tls"] = keep[0][1], keep[1][1]

    async def start() -> None:
        server = await asyncio.start_server(serve_streams, "127.0.0.1", 0, limit=1 << 20)
        ports["streams"] = server.sockets[0].getsockname()[1]
        endpoint = Endpoint(Identity.ephemeral(), Counter(), authorise=anybody)
        ports["fusionai"] = [await endpoint.listen(), endpoint.peer_id]
        keep.append((server, endpoint))  # type: ignore[arg-type]

    LoopThread().run(start())
    print(json.dumps(ports), flush=True)
    sys.stdin.read()
    os._exit(0)


# --- clients --------------------------------------------------------------------------------------------------


class Contender(ABC):
    """One way to move messages."""

    title: str
    encrypted: bool

    @abstractmethod
    def send(self, body: bytes, count: int) -> None:
        """Send `count` messages; return when the receiver has them all."""

    @abstractmethod
    def ask(self) -> None:
        """One question and its answer."""


class Blocking(Contender):
    def __init__(self, port: int, context: ssl.SSLContext | None) -> None:
        self.encrypted = context is not None
        self.title = "blocking sockets" + (" + TLS 1.3" if context else "")
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if context is not None:
            self._socket = context.wrap_socket(self._socket, server_hostname="localhost")

    def send(self, body: bytes, count: int) -> None:
        self._socket.sendall(struct.pack(">QQ", count, len(body)))
        for _ in range(count):
            self._socket.sendall(body)
        receive(self._socket, len(QUESTION))

    def ask(self) -> None:
        self._socket.sendall(struct.pack(">QQ", 1, len(QUESTION)) + QUESTION)
        receive(self._socket, len(QUESTION))


class Streams(Contender):
    title, encrypted = "asyncio streams", False

    def __init__(self, port: int, thread: LoopThread) -> None:
        self._thread = thread
        self._reader, self._writer = thread.run(asyncio.open_connection("127.0.0.1", port))

    def send(self, body: bytes, count: int) -> None:
        self._thread.run(self._send(body, count))

    async def _send(self, body: bytes, count: int) -> None:
        self._writer.write(struct.pack(">QQ", count, len(body)))
        for _ in range(count):
            self._writer.write(body)
            await self._writer.drain()
        await self._reader.readexactly(len(QUESTION))

    def ask(self) -> None:
        self._thread.run(self._send(QUESTION, 1))

    async def ask_many(self, times: int) -> list[float]:
        return await timed(lambda: self._send(QUESTION, 1), times)


class Grpc(Contender):
    def __init__(self, port: int, pem: bytes | None) -> None:
        self.encrypted = pem is not None
        self.title = "gRPC" + (" + TLS 1.3" if pem else "")
        if pem is None:
            self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=GRPC_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(pem)
            self._channel = grpc.secure_channel(f"localhost:{port}", credentials, options=GRPC_OPTIONS)
        self._stream = self._channel.stream_unary("/b/stream")
        self._echo = self._channel.unary_unary("/b/echo")

    def send(self, body: bytes, count: int) -> None:
        def bodies() -> Iterator[bytes]:
            for _ in range(count):
                yield body

        assert int(self._stream(bodies())) == count * len(body)

    def ask(self) -> None:
        self._echo(QUESTION)


class Fusion(Contender):
    title, encrypted = "FusionAI link (TLS 1.3)", True

    def __init__(self, address: str, peer: str, thread: LoopThread) -> None:
        self._thread = thread
        self._link = thread.run(self._connect(address, PeerId(peer)))

    async def _connect(self, address: str, peer: PeerId) -> Link:
        self._endpoint = Endpoint(Identity.ephemeral(), Counter(), authorise=anybody)
        return await self._endpoint.connect(peer, [address], timeout_s=10)

    def send(self, body: bytes, count: int) -> None:
        self._thread.run(self._send(body, count))

    async def _send(self, body: bytes, count: int) -> None:
        for _ in range(count):
            await self._link.send_bulk("b", b"", body)
        await self._link.request("arrived", str(count).encode(), timeout_s=60)

    def ask(self) -> None:
        self._thread.run(self._link.request("echo", QUESTION, timeout_s=10))

    async def ask_many(self, times: int) -> list[float]:
        return await timed(lambda: self._link.request("echo", QUESTION, timeout_s=10), times)


async def timed(work: Callable[[], Coroutine[Any, Any, object]], times: int) -> list[float]:
    """Return the seconds of each of `times` calls, measured inside the loop as its users would see them."""
    seconds = []
    for _ in range(times):
        began_s = time.perf_counter()
        await work()
        seconds.append(time.perf_counter() - began_s)
    return seconds
