"""Endpoints for tests: a handler that records, and pairs of linked endpoints on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fusionai.errors import DataError, NetworkError, PeerTimeout
from fusionai.network.endpoint import Endpoint, Link
from fusionai.network.identity import Identity, PeerId


async def anybody(peer: PeerId, credential: bytes) -> None:
    """Admit every peer."""


class Recorder:
    """A handler that keeps what it gets. Requests: "echo", "fail", "crash", "sleep"."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.closed: list[tuple[Link, NetworkError]] = []
        self.notices: list[tuple[str, bytes]] = []
        self.bulk: list[tuple[str, bytes, bytearray]] = []
        self.events: list[str] = []
        self.cancelled = 0
        self.before_bulk: Callable[[bytes], Awaitable[None]] | None = None
        self.before_notice: Callable[[bytes], Awaitable[None]] | None = None

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        self.events.append(f"request {kind}")
        if kind == "fail":
            raise DataError("line 3 is not text")
        if kind == "crash":
            raise ZeroDivisionError
        if kind == "sleep":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return payload

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        if self.before_notice is not None:
            await self.before_notice(payload)
        self.events.append(f"notice {kind}")
        self.notices.append((kind, payload))

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        if self.before_bulk is not None:
            await self.before_bulk(header)
        self.bulk.append((kind, header, body))

    async def on_link(self, link: Link) -> None:
        self.events.append("link")
        self.links.append(link)

    async def on_close(self, link: Link, error: NetworkError) -> None:
        self.events.append("close")
        self.closed.append((link, error))


class Node:
    """An endpoint with its recorder."""

    def __init__(self, name: str = "", identity: Identity | None = None, **options: Any) -> None:
        self.got = Recorder()
        options.setdefault("authorise", anybody)
        self.endpoint = Endpoint(identity or Identity.ephemeral(), self.got, name=name, **options)
        self.address = ""

    @property
    def peer(self) -> PeerId:
        return self.endpoint.peer_id

    async def listen(self) -> Node:
        self.address = await self.endpoint.listen()
        return self

    async def connect(self, other: Node, timeout_s: float = 30, credential: bytes = b"") -> Link:
        return await self.endpoint.connect(other.peer, [other.address], timeout_s=timeout_s, credential=credential)


@contextlib.asynccontextmanager
async def pair(**options: Any) -> AsyncIterator[tuple[Node, Node, Link, Link]]:
    """Two nodes, "a" having dialled "b", and the link as each sees it."""
    a, b = Node("a", **options), Node("b", **options)
    try:
        await b.listen()
        link_a = await a.connect(b)
        link_b = await b.endpoint.wait_for_link(a.peer, 30)
        yield a, b, link_a, link_b
    finally:
        await a.endpoint.close()
        await b.endpoint.close()


async def until(condition: Callable[[], object], within_s: float = 60) -> None:
    """Wait until something is true."""
    deadline_s = asyncio.get_running_loop().time() + within_s
    while not condition():
        if asyncio.get_running_loop().time() > deadline_s:
            raise PeerTimeout(f"not so within {within_s} s")
        await asyncio.sleep(0.005)
