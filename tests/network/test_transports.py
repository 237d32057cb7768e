"""What every transport promises: the same cases over TLS on loopback, and inside this process on a scripted clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from network_nodes import Node, until

from fusionai.errors import (
    AuthenticationError,
    ConfigError,
    DataError,
    PeerLost,
    PeerTimeout,
    ProtocolError,
    TokenError,
)
from fusionai.network.clock import run_scripted
from fusionai.network.identity import Identity, PeerId
from fusionai.network.limits import Limits
from fusionai.network.loop import run
from fusionai.network.memory import MemoryNetwork
from fusionai.network.messages import PeerVersion

Make = Callable[..., Awaitable[Node]]
Case = Callable[[Make], Awaitable[None]]


@pytest.fixture(params=["tls", "memory"])
def go(request: pytest.FixtureRequest) -> Callable[[Case], None]:
    """Run a case with a maker of listening nodes; all are closed at its end."""

    async def play(case: Case) -> None:
        network = MemoryNetwork()
        nodes: list[Node] = []

        async def make(name: str, **options: Any) -> Node:
            if request.param == "memory":
                identity = options.pop("identity", None) or Identity.ephemeral()
                transport = network.transport(name, identity.peer_id, options.get("limits"))
                nodes.append(Node(name, identity, transport=transport, **options))
            else:
                nodes.append(Node(name, **options))
            return await nodes[-1].listen()

        try:
            await case(make)
        finally:
            await asyncio.gather(*(node.endpoint.close() for node in nodes))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"left running: {left}"

    return lambda case: run_scripted(play(case)) if request.param == "memory" else run(play(case))


def test_requests_carry_answers_and_errors(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b")
        link = await a.connect(b)
        assert await link.request("echo", b"hello", timeout_s=60) == b"hello"
        back = await b.endpoint.wait_for_link(a.peer, 60)
        assert await back.request("echo", b"back", timeout_s=60) == b"back"
        with pytest.raises(DataError, match="line 3 is not text"):
            await link.request("fail", b"", timeout_s=60)
        with pytest.raises(PeerTimeout, match=r"'sleep' within 0\.05 s"):
            await link.request("sleep", b"", timeout_s=0.05)
        await until(lambda: b.got.cancelled == 1)
        with pytest.raises(ProtocolError, match="send it as bulk"):
            await link.request("echo", bytes(9 << 20), timeout_s=60)

    go(case)


def test_control_and_bulk_keep_their_order(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b")
        link = await a.connect(b)
        for number in range(20):
            await link.notify("count", bytes([number]))
            await link.send_bulk("tensor", bytes([number]), bytes(number))
        await until(lambda: len(b.got.bulk) == len(b.got.notices) == 20)
        assert b.got.notices == [("count", bytes([number])) for number in range(20)]
        assert b.got.bulk == [("tensor", bytes([number]), bytearray(number)) for number in range(20)]
        assert (b.got.events[0], b.got.links[0].peer, b.got.links[0].peer_name) == ("link", a.peer, "a")

    go(case)


def test_a_sender_is_held_back_while_the_handler_works(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b", limits=Limits(window_bytes=100_000))
        gate = asyncio.Event()

        async def wait(_: bytes) -> None:
            await gate.wait()

        b.got.before_bulk = wait
        link = await a.connect(b)
        sending = [asyncio.create_task(link.send_bulk("t", b"", bytes(40_000))) for _ in range(6)]
        await asyncio.sleep(0.3)
        assert [task.done() for task in sending] == [True, True, False, False, False, False]
        assert await link.request("echo", b"not behind bulk", timeout_s=60) == b"not behind bulk"
        sending[5].cancel()
        gate.set()
        await asyncio.gather(*sending[:5])
        await until(lambda: len(b.got.bulk) == 5)
        await link.send_bulk("t", b"", bytes(500_000))  # more than the window, which is free by then
        await until(lambda: len(b.got.bulk) == 6)

    go(case)


def test_a_slow_handler_of_notices_holds_its_peer_back_and_loses_none(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b", limits=Limits(queued_messages=4))
        gate = asyncio.Event()

        async def wait(_: bytes) -> None:
            await gate.wait()

        b.got.before_notice = wait
        link = await a.connect(b)
        for number in range(50):
            await link.notify("n", bytes([number]))
        await asyncio.sleep(0.05)
        gate.set()
        await until(lambda: len(b.got.notices) == 50)
        assert [payload[0] for _, payload in b.got.notices] == list(range(50))

    go(case)


def test_both_sides_see_a_closed_link(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b")
        link = await a.connect(b)
        back = await b.endpoint.wait_for_link(a.peer, 60)
        await until(lambda: b.got.links)  # what a handler was not told of is not told to be gone either
        waiting = asyncio.create_task(link.request("sleep", b"", timeout_s=50))
        await until(lambda: "request sleep" in b.got.events)
        await back.close("enough")
        with pytest.raises(PeerLost, match="ended the link: enough"):
            await waiting
        await until(lambda: a.got.closed and b.got.closed)
        assert isinstance(a.got.closed[0][1], PeerLost)
        assert "this side closed the link to a" in str(b.got.closed[0][1])
        assert a.endpoint.link(b.peer) is b.endpoint.link(a.peer) is None
        for call in (link.notify("n", b""), link.send_bulk("t", b"", b""), link.request("echo", b"", timeout_s=1)):
            with pytest.raises(PeerLost):
                await call
        assert await (await a.connect(b)).request("echo", b"anew", timeout_s=60) == b"anew"

    go(case)


def test_an_aborted_connection_ends_the_link_on_both_sides(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b")
        link: Any = await a.connect(b)
        await until(lambda: b.got.links)
        link._bulk.abort(PeerLost("cut"))
        await until(lambda: a.got.closed and b.got.closed)
        assert str(a.got.closed[0][1]) == "cut"
        assert isinstance(b.got.closed[0][1], PeerLost)

    go(case)


def test_a_failing_handler_ends_its_link(go: Any) -> None:
    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b")

        async def refuse(_: bytes) -> None:
            raise ProtocolError("that is no tensor")

        b.got.before_bulk = refuse
        link = await a.connect(b)
        await link.send_bulk("t", b"", b"x")
        await until(lambda: a.got.closed and b.got.closed)
        assert "that is no tensor" in str(a.got.closed[0][1])
        assert isinstance(a.got.closed[0][1], ProtocolError)

    go(case)


def test_who_may_have_a_link(go: Any) -> None:
    async def doorkeeper(peer: PeerId, credential: bytes) -> None:
        if credential != b"right":
            raise TokenError("the join token expired 2 days ago")

    async def case(make: Make) -> None:
        a, b = await make("a"), await make("b", authorise=doorkeeper)
        with pytest.raises(TokenError, match="refused the connection: the join token expired"):
            await a.connect(b, credential=b"old")
        await a.connect(b, credential=b"right")
        with pytest.raises(AuthenticationError, match=f"is {b.peer[:12]}, but .* was to be reached"):
            await a.endpoint.connect(Identity.ephemeral().peer_id, [b.address], timeout_s=60)
        with pytest.raises(PeerLost, match="nobody can be reached at"):
            await b.endpoint.connect(Identity.ephemeral().peer_id, ["127.0.0.1:1"], timeout_s=60)
        with pytest.raises(ConfigError, match="this node itself"):
            await a.connect(a)
        with pytest.raises(PeerTimeout, match=r"has not connected within 0\.05 s"):
            await a.endpoint.wait_for_link(Identity.ephemeral().peer_id, 0.05)
        old = await make("old", release=PeerVersion(major=0))
        with pytest.raises(ProtocolError, match="update"):
            await old.connect(b, credential=b"right")

    go(case)


def test_one_link_survives_when_both_dial(go: Any) -> None:
    async def case(make: Make) -> None:
        for turn in range(4):
            a, b = await make(f"a{turn}"), await make(f"b{turn}")
            links = await asyncio.gather(a.connect(b), b.connect(a), a.connect(b))
            assert links[0] is links[2]
            assert links[0].dialled != links[1].dialled
            await until(lambda a=a, b=b: a.got.links and b.got.links)  # type: ignore[misc]
            assert (len(a.got.links), len(b.got.links), a.got.closed + b.got.closed) == (1, 1, [])
            assert await links[1].request("echo", b"x", timeout_s=60) == b"x"

    go(case)


def test_a_restarted_peer_replaces_its_link(go: Any) -> None:
    async def case(make: Make) -> None:
        key = Identity.ephemeral()
        a, b = await make("a", identity=key), await make("b")
        await a.connect(b)
        again = await make("a", identity=key)
        await again.connect(b)
        await until(lambda: b.got.events == ["link", "close", "link"])
        await until(lambda: a.got.closed)

    go(case)


def test_silence_ends_a_link(go: Any) -> None:
    """A peer that stops reading and writing, its sockets open: on the scripted clock this takes no time."""

    async def case(make: Make) -> None:
        a, b = await make("a", limits=Limits(silence_s=0.4)), await make("b")
        await a.connect(b)
        back: Any = await b.endpoint.wait_for_link(a.peer, 60)
        await until(lambda: b.got.links)
        back._control.pause_reading()  # so that it hears no pings, and sends none that would be heard
        back._control.send = lambda *_: 0
        await until(lambda: a.got.closed)
        assert "has been silent for" in str(a.got.closed[0][1])

    go(case)
