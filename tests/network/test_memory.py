"""What a script may do to a network in memory: delay, drop, repeat, cut, kill, and let vanish."""

from __future__ import annotations

import asyncio

import pytest
from memory_nodes import linked
from network_nodes import until

from fusionai.errors import ConfigError, NetworkError, PeerLost
from fusionai.network.clock import now_s, run_scripted
from fusionai.network.framing import FrameType
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.network.memory_channel import DROP, TWICE, CarriedMessage, Fate


def test_a_script_sees_every_message_twice() -> None:
    seen: list[tuple[str, CarriedMessage]] = []

    async def main() -> None:
        async with linked() as (network, _, b, link):
            network.on_send = lambda message: seen.append(("sent", message))
            network.on_arrival = lambda message: seen.append(("here", message))
            await link.notify("n", b"one")
            await link.request("echo", b"two", timeout_s=1)
            await link.send_bulk("t", b"header", b"body")
            await until(lambda: b.got.bulk)

    run_scripted(main())
    upper = [(when, each.source, each.frame.name, each.kind, each.content) for when, each in seen if each.upper]
    assert upper == [
        ("sent", "a", "NOTICE", "n", b"one"),
        ("sent", "a", "REQUEST", "echo", b"two"),
        ("here", "a", "NOTICE", "n", b"one"),
        ("here", "a", "REQUEST", "echo", b"two"),
        ("sent", "b", "ANSWER", "echo", b"two"),
        ("here", "b", "ANSWER", "echo", b"two"),
        ("sent", "a", "BULK", "t", b"header"),
        ("here", "a", "BULK", "t", b"header"),
    ]
    assert any(each.frame is FrameType.CREDIT for _, each in seen)


def test_delays_and_rates_pass_on_the_scripted_clock() -> None:
    """8 Mbit/s is 1 MB/s: a megabyte is out after a second, and arrives a tenth of a second later."""

    async def main() -> None:
        async with linked(LabConfig(links={"a<->b": EmulatedLink(rate_mbit=8, one_way_ms=100)})) as (_, _a, b, link):
            began_s = now_s()
            await link.send_bulk("t", b"", bytes(1_000_000))
            assert now_s() - began_s == pytest.approx(1.0, rel=1e-3)
            assert not b.got.bulk
            assert await link.request("echo", b"", timeout_s=1) == b""
            assert now_s() - began_s == pytest.approx(1.2, rel=1e-3)
            assert b.got.bulk

    run_scripted(main())


def test_messages_are_lost_repeated_and_late() -> None:
    async def main() -> None:
        async with linked() as (network, _, b, link):
            fates = {b"lost": DROP, b"twice": TWICE, b"late": Fate(delay_s=2.0)}
            network.on_send = lambda message: fates.get(message.content)
            began_s = now_s()
            for payload in (b"lost", b"twice", b"late", b"after"):
                await link.notify("n", payload)
            await until(lambda: len(b.got.notices) == 4)
            assert [payload for _, payload in b.got.notices] == [b"twice", b"twice", b"late", b"after"]
            assert now_s() - began_s == pytest.approx(2.0, abs=0.01)
            network.on_send = lambda message: TWICE if message.frame is FrameType.BULK else None
            with pytest.raises(NetworkError, match="have its sender send it again"):
                await link.send_bulk("t", b"", b"")

    run_scripted(main())


def test_what_a_killed_machine_has_sent_still_arrives() -> None:
    async def main() -> None:
        async with linked(LabConfig(default=EmulatedLink(one_way_ms=10))) as (network, a, b, link):
            await link.notify("n", b"before")
            began_s = now_s()
            network.kill("a")
            assert not network.alive("a")
            sending = asyncio.create_task(link.notify("n", b"after"))
            await until(lambda: b.got.closed)
            assert now_s() - began_s == pytest.approx(0.01, abs=0.006)
            assert b.got.events == ["link", "notice n", "close"]
            assert "was reset" in str(b.got.closed[0][1])
            assert not a.got.closed, "the dead do not learn that they died"
            assert not sending.done(), "and their code goes nowhere"
            with pytest.raises(PeerLost, match="nobody can be reached"):
                await b.connect(a)
            sending.cancel()

    run_scripted(main())


def test_a_machine_dies_at_the_very_message() -> None:
    async def main() -> None:
        async with linked() as (network, _, b, link):

            def on_arrival(message: CarriedMessage) -> None:
                if message.content == b"second":
                    network.kill("b")

            network.on_arrival = on_arrival
            for payload in (b"first", b"second", b"third"):
                await link.notify("n", payload)
            await until(lambda: link.closed)
            assert b.got.notices == [("n", b"first")]

    run_scripted(main())


def test_a_vanished_machine_is_missed_by_its_silence_only() -> None:
    async def main() -> None:
        async with linked() as (network, a, b, link):
            began_s = now_s()
            network.vanish("b")
            await link.notify("n", b"nobody hears it")
            await until(lambda: a.got.closed, within_s=60)
            assert 10 < now_s() - began_s < 15
            assert "has been silent for" in str(a.got.closed[0][1])
            assert not b.got.notices

    run_scripted(main())


def test_a_cut_link_is_seen_by_both_and_may_be_made_anew() -> None:
    async def main() -> None:
        async with linked() as (network, a, b, link):
            network.cut("a", "b")
            await until(lambda: a.got.closed and b.got.closed)
            link = await a.connect(b)
            assert await link.request("echo", b"again", timeout_s=1) == b"again"
            network.cut("b", "a", for_good=True)
            await until(lambda: link.closed)
            with pytest.raises(PeerLost, match="nobody can be reached"):
                await a.connect(b)

    run_scripted(main())


def test_an_address_belongs_to_one_machine() -> None:
    async def main() -> None:
        async with linked() as (_, a, b, _link):
            port = int(a.address.rpartition(":")[2])
            with pytest.raises(ConfigError, match="in use by another machine"):
                await b.endpoint.listen("127.0.0.1", port)

    run_scripted(main())
