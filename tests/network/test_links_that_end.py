"""What is left of links that have ended: nothing, however a peer ended them and whatever it had sent."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest
from network_nodes import Node, until
from test_framing import feed

from fusionai.errors import NetworkError, PeerLost
from fusionai.network.connection import Connection
from fusionai.network.framing import FrameDecoder, FrameType, frame_prefix
from fusionai.network.identity import Identity
from fusionai.network.limits import Limits
from fusionai.network.link import Link
from fusionai.network.loop import run
from fusionai.network.memory import MemoryNetwork
from fusionai.network.memory_channel import MemoryChannel
from fusionai.network.messages import Bulk, encode

MIB = 1 << 20
LIMITS = Limits(window_bytes=64 * MIB, bulk_body_bytes=64 * MIB)

MakeNode = Callable[[str], Node]


def over_tls() -> MakeNode:
    return lambda name: Node(name, limits=LIMITS)


def in_memory() -> MakeNode:
    network = MemoryNetwork()

    def make(name: str) -> Node:
        identity = Identity.ephemeral()
        transport = network.transport(name, identity.peer_id, LIMITS)
        return Node(name, identity, limits=LIMITS, transport=transport)

    return make


@pytest.fixture(params=[over_tls, in_memory], ids=["tls", "memory"])
def make(request: pytest.FixtureRequest) -> MakeNode:
    made: MakeNode = request.param()
    return made


@contextlib.asynccontextmanager
async def listening(make: MakeNode) -> AsyncIterator[Node]:
    node = await make("listener").listen()
    try:
        yield node
    finally:
        await node.endpoint.close()


def living(*kinds: type) -> int:
    """Objects of these classes that are still in use."""
    gc.collect()
    return sum(isinstance(each, kinds) for each in gc.get_objects())


def tables(node: Node) -> dict[str, int]:
    """How much an endpoint keeps of peers."""
    endpoint = node.endpoint
    named = ("_links", "_not_gone", "_starting", "_dialling", "_arriving", "_waiting")
    found = {name: len(getattr(endpoint, name)) for name in named}
    for listener in endpoint._listeners:
        for name in ("_unfinished", "_untouched", "_pairings"):
            found[name] = len(getattr(listener, name, ()))
    return found


def part_of_a_message(link: Link, sent_bytes: int) -> None:
    """Send the beginning of a large bulk message, and never the rest."""
    header = encode(Bulk("large", b""))
    if isinstance(link._bulk, Connection):
        assert link._bulk._transport is not None
        link._bulk._transport.write(frame_prefix(FrameType.BULK, len(header), 60 * MIB) + header + bytes(sent_bytes))


def reset(link: Link) -> None:
    """Drop both connections, as a process does that dies."""
    for channel in (link._control, link._bulk):
        channel.abort(PeerLost("the test resets it"))


async def come_and_go(make: MakeNode, node: Node, times: int, *, partial_bytes: int = 0) -> None:
    """Have one peer connect, send part of a message and reset, so many times."""
    dialler = make("dialler")
    for time in range(times):
        link = await dialler.connect(node)
        await until(lambda time=time: len(node.got.links) == time + 1)  # type: ignore[misc]
        if partial_bytes and isinstance(link._bulk, Connection):
            part_of_a_message(link, partial_bytes)
            bulk = node.got.links[-1]._bulk
            assert isinstance(bulk, Connection)
            await until(lambda bulk=bulk: bulk._decoder.held_bytes >= partial_bytes)  # type: ignore[misc]
        reset(link)
        await until(lambda time=time: len(node.got.closed) == time + 1)  # type: ignore[misc]
    await dialler.endpoint.close()
    node.got.links.clear()
    node.got.closed.clear()


def test_nothing_of_fifty_links_is_left(make: MakeNode) -> None:
    async def main() -> None:
        async with listening(make) as node:
            await come_and_go(make, node, 2)
            await until(lambda: not any(tables(node).values()))
            kinds = (Link, Connection, MemoryChannel, FrameDecoder)
            before = living(*kinds), len(asyncio.all_tasks()), psutil.Process().num_fds()
            await come_and_go(make, node, 50)
            await until(lambda: not any(tables(node).values()))
            await until(lambda: psutil.Process().num_fds() <= before[2])
            assert living(*kinds) <= before[0]
            assert len(asyncio.all_tasks()) <= before[1]

    run(main())


def test_the_memory_of_partial_messages_is_free_at_once() -> None:
    """Without waiting for the garbage collector, which may come late in a process that holds much."""

    async def main() -> None:
        make = over_tls()
        async with listening(make) as node:
            await come_and_go(make, node, 1, partial_bytes=4 * MIB)
            gc.collect()
            gc.disable()
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                await come_and_go(make, node, 8, partial_bytes=4 * MIB)
                await until(lambda: not any(tables(node).values()))
                held, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
                gc.enable()
            assert most - before >= 4 * MIB, "it was held while the link lived"
            assert held - before <= 2 * MIB

    run(main())


async def leave_waiting(dialler: Node, node: Node) -> None:
    """Have a peer reset while its bulk waits for a handler and its requests are worked on."""
    closed = len(node.got.closed)
    link = await dialler.connect(node)
    asked = [asyncio.ensure_future(link.request("sleep", bytes(MIB), timeout_s=60)) for _ in range(4)]
    sent = [asyncio.ensure_future(link.send_bulk("x", b"", bytes(4 * MIB))) for _ in range(4)]
    await asyncio.gather(*sent)
    await until(lambda: node.got.events.count("request sleep") == 4 * (closed + 1))
    reset(link)
    failed = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(each, NetworkError) for each in failed)
    await until(lambda: len(node.got.closed) == closed + 1)


def test_messages_that_nobody_took_are_freed(make: MakeNode) -> None:
    before = living(Link)  # of other tests

    async def main() -> None:
        async with listening(make) as node:
            never = asyncio.Event()

            async def wait(_: bytes) -> None:
                await never.wait()

            node.got.before_bulk = wait
            dialler = make("dialler")
            await leave_waiting(dialler, node)
            tracemalloc.start()
            try:
                for _ in range(3):
                    await leave_waiting(dialler, node)
                await dialler.endpoint.close()
                await until(lambda: not any(tables(node).values()))
                for each in (dialler, node):
                    each.got.links.clear()
                    each.got.closed.clear()
                assert living(Link) <= before
                held, most = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert node.got.cancelled == 16
            assert most >= 16 * MIB, "it was held while the link lived"
            assert held <= 2 * MIB

    run(main())


def test_a_peer_that_dials_again_and_again_has_one_link_at_work(make: MakeNode) -> None:
    """Later links start when the earlier ones have ended. Until then they hold nothing, and end when the next comes."""

    async def main() -> None:
        async with listening(make) as node:
            slow = asyncio.Event()

            async def wait(link: Link, error: NetworkError) -> None:
                await slow.wait()

            node.got.on_close = wait  # type: ignore[method-assign]
            dialler = make("dialler")
            try:
                for _ in range(12):
                    reset(await dialler.connect(node))
                    await until(lambda: not dialler.endpoint._not_gone)
                await until(lambda: len(node.endpoint._not_gone[dialler.peer]) <= 2)
                assert len(node.got.links) == 1
            finally:
                slow.set()
            await dialler.endpoint.close()
            await until(lambda: not any(tables(node).values()))

    run(main())


def test_a_decoder_that_is_closed_holds_nothing() -> None:
    decoder = FrameDecoder({FrameType.BULK: 8 * MIB}, 1024)
    assert feed(decoder, frame_prefix(FrameType.BULK, 0, 8 * MIB) + bytes(3 * MIB)) == []
    assert decoder.held_bytes >= 3 * MIB
    decoder.close()
    assert decoder.held_bytes == 0
    assert len(decoder._staging) == 0


def test_listeners_that_are_closed_are_forgotten() -> None:
    async def main() -> None:
        network = MemoryNetwork()
        identity = Identity.ephemeral()
        transport: Any = network.transport("a", identity.peer_id)
        node = await Node("a", identity, transport=transport).listen()
        await node.endpoint.close()
        assert transport._doors == []
        assert network._doors == {}

    run(main())
