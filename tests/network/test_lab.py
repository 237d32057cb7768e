"""Emulated links: what configuration means, and how true the emulation is."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import msgspec
import pytest
from network_nodes import Node, pair, until

from fusionai.errors import ConfigError
from fusionai.network.lab import PROFILES, EmulatedLink, LabConfig
from fusionai.network.loop import run
from fusionai.network.probe import probe_link


def test_most_specific_entry_wins() -> None:
    slow, up, down = (EmulatedLink(rate_mbit=rate) for rate in (1, 2, 3))
    lab = LabConfig(links={"a<->b": slow, "a->c": up, "c<->a": down}, default=PROFILES["lan"])
    assert lab.link("a", "b") == lab.link("b", "a") == slow
    assert lab.link("a", "c") == up
    assert lab.link("c", "a") == down
    assert lab.link("x", "y") == PROFILES["lan"]
    assert LabConfig().link("x", "y") is None


def test_from_a_mapping_as_a_file_gives_it() -> None:
    lab = msgspec.convert(
        {"links": {"home-1->home-2": {"rate_mbit": 20, "one_way_ms": 15}}, "default": {"loss_pct": 0.5}}, LabConfig
    )
    assert lab.link("home-1", "home-2") == EmulatedLink(rate_mbit=20, one_way_ms=15)
    with pytest.raises(msgspec.ValidationError, match="rate_mbps"):
        msgspec.convert({"default": {"rate_mbps": 20}}, LabConfig)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rate_mbit": 0}, "rate_mbit"),
        ({"rate_mbit": float("inf")}, "rate_mbit"),
        ({"one_way_ms": -1}, "one_way_ms"),
        ({"jitter_ms": 1e9}, "jitter_ms"),
        ({"loss_pct": 100}, "loss_pct"),
    ],
)
def test_bad_links_are_named(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EmulatedLink(**values)


@pytest.mark.parametrize("key", ["a", "a->", "->b", "a->b->c", "a <-> b", "a-b"])
def test_bad_pairs_are_named(key: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        LabConfig(links={key: PROFILES["lan"]})


def test_loss_costs_rate_as_tcp_does() -> None:
    clean = EmulatedLink(rate_mbit=100, one_way_ms=20)
    lossy = EmulatedLink(rate_mbit=100, one_way_ms=20, loss_pct=1)
    assert clean.rate_bytes_per_s == 12.5e6
    assert lossy.rate_bytes_per_s == pytest.approx(1.22 * 1448 / (0.04 * 0.1))
    assert EmulatedLink(rate_mbit=1, one_way_ms=1, loss_pct=0.01).rate_bytes_per_s == 125_000


@pytest.mark.parametrize(
    ("link", "bulk_bytes"),
    [
        (EmulatedLink(rate_mbit=100, one_way_ms=10), 6 << 20),
        (EmulatedLink(rate_mbit=8, one_way_ms=45, jitter_ms=4), 500_000),
        (EmulatedLink(rate_mbit=400, one_way_ms=2), 24 << 20),
    ],
    ids=["100 Mbit", "8 Mbit", "400 Mbit"],
)
def test_rate_and_delay_are_true(link: EmulatedLink, bulk_bytes: int) -> None:
    assert link.rate_mbit is not None

    async def main() -> None:
        async with pair(lab=LabConfig(default=link)) as (_, b, link_a, _):
            rtts_s = [await link_a.ping(timeout_s=5) for _ in range(7)]
            expected_s = (2 * link.one_way_ms + link.jitter_ms) / 1e3
            assert statistics.median(rtts_s) == pytest.approx(expected_s, abs=0.006)
            began_s = time.perf_counter()
            await link_a.send_bulk("t", b"", bytes(bulk_bytes))
            await until(lambda: b.got.bulk, 20)
            took_s = time.perf_counter() - began_s - (link.one_way_ms + link.jitter_ms / 2) / 1e3
            assert bulk_bytes * 8 / took_s == pytest.approx(link.rate_mbit * 1e6, rel=0.1)

    run(main())


def test_directions_are_shaped_apart_and_by_name() -> None:
    lab = LabConfig(links={"a->b": EmulatedLink(one_way_ms=60)})

    async def main() -> None:
        async with pair(lab=lab) as (_, b, link_a, link_b):
            assert link_a.lab is not None
            assert link_b.lab is None
            rtt_s = await link_a.ping(timeout_s=5)
            assert 0.058 < rtt_s < 0.09
            c = Node("c", lab=lab)
            other = await c.connect(b)
            assert other.lab is None
            assert await other.ping(timeout_s=5) < 0.05
            await c.endpoint.close()

    run(main())


def test_control_goes_ahead_of_bulk_and_shares_the_rate() -> None:
    link = EmulatedLink(rate_mbit=20, one_way_ms=5)

    async def main() -> None:
        async with pair(lab=LabConfig(default=link)) as (_, b, link_a, _):
            sending = asyncio.create_task(link_a.send_bulk("t", b"", bytes(2_500_000)))
            await asyncio.sleep(0.1)
            rtts_s = [await link_a.ping(timeout_s=5) for _ in range(20)]
            assert not sending.done()
            assert statistics.median(rtts_s) < 0.02
            began_s = time.perf_counter()
            await link_a.request("echo", bytes(250_000), timeout_s=5)
            took_s = time.perf_counter() - began_s
            assert 0.2 < took_s < 0.4, "0.1 s each way, and not behind 1 s of bulk"
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            assert b.got.bulk == []

    run(main())


def test_order_is_kept_under_jitter_and_loss() -> None:
    link = EmulatedLink(one_way_ms=2, jitter_ms=20, loss_pct=5, rate_mbit=50)

    async def main() -> None:
        async with pair(lab=LabConfig(default=link, seed=3)) as (_, b, link_a, _):
            for number in range(40):
                await link_a.notify("n", str(number).encode())
                await link_a.send_bulk("t", str(number).encode(), bytes(2000))
            await until(lambda: len(b.got.bulk) == len(b.got.notices) == 40)
            assert [int(payload) for _, payload in b.got.notices] == list(range(40))
            assert [int(header) for _, header, _ in b.got.bulk] == list(range(40))

    run(main())


def test_emulated_link_holds_the_sender_back() -> None:
    """What is sent waits with the sender, not in the emulation's memory."""
    link = EmulatedLink(rate_mbit=10, one_way_ms=1)

    async def main() -> None:
        async with pair(lab=LabConfig(default=link)) as (_, _b, link_a, _):
            sending = asyncio.create_task(link_a.send_bulk("t", b"", bytes(50 << 20)))
            await asyncio.sleep(0.3)
            lane: Any = link_a._bulk._lane
            assert lane.waiting_bytes < 1 << 20
            began_s = time.monotonic()
            await link_a.close()
            assert time.monotonic() - began_s < 3
            await asyncio.gather(sending, return_exceptions=True)

    run(main())


@pytest.mark.parametrize("link", [EmulatedLink(rate_mbit=100, one_way_ms=10), EmulatedLink(rate_mbit=8, one_way_ms=40)])
def test_probe_measures_what_is_emulated(link: EmulatedLink) -> None:
    assert link.rate_mbit is not None

    async def main() -> None:
        async with pair(lab=LabConfig(default=link)) as (_, _b, link_a, _):
            began_s = time.monotonic()
            probe = await probe_link(link_a, seconds=1)
            assert time.monotonic() - began_s < 2
            assert probe.rtt_s == pytest.approx(link.rtt_s, abs=0.006)
            for rate in (probe.up_bytes_per_s, probe.down_bytes_per_s, probe.bandwidth_bytes_per_s):
                assert rate == pytest.approx(link.rate_bytes_per_s, rel=0.1)

    run(main())


def test_probe_of_a_real_link() -> None:
    async def main() -> None:
        async with pair() as (_, b, link_a, link_b):
            mine, theirs = await asyncio.gather(probe_link(link_a, seconds=0.5), probe_link(link_b, seconds=0.5))
            for probe in (mine, theirs):
                assert 0 < probe.rtt_s < 0.05
                assert probe.bandwidth_bytes_per_s > 20e6
            assert b.got.bulk == b.got.notices == []
            assert b.got.events == ["link"], "the upper layer does not see a probe"
            with pytest.raises(ConfigError, match="at most 10"):
                await probe_link(link_a, seconds=60)

    run(main())
