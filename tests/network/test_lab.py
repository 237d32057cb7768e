"""Emulated links: what configuration means, and how true the emulation is."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from memory_nodes import linked
from network_nodes import Node, pair, until

from fusionai.errors import ConfigError
from fusionai.network.clock import now_s, run_scripted
from fusionai.network.lab import PROFILES, EmulatedLink, LabConfig
from fusionai.network.loop import run
from fusionai.network.probe import probe_link
from fusionai.network.shaping import LinkShaper


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


# --- the emulation by itself, on a scripted clock -----------------------------------------------------------------


class Line:
    """Both connections of an emulated link, and when what was put on them came out, in seconds of the loop's clock."""

    def __init__(self, link: EmulatedLink) -> None:
        self.shaper = LinkShaper(link, seed="1")
        self.control_s: list[float] = []
        self.bulk: list[tuple[float, int]] = []
        """Time and size of each piece."""
        self.control = self.shaper.lane(self._control_came, urgent=True)
        self.bulk_lane = self.shaper.lane(self._bulk_came, urgent=False)

    async def _control_came(self, data: bytes) -> None:
        self.control_s.append(now_s())

    async def _bulk_came(self, data: bytes) -> None:
        self.bulk.append((now_s(), len(data)))

    async def send_bulk(self, size: int) -> None:
        """Put bulk on the line as a connection does: a little at a time, and as fast as the line takes it."""
        for start in range(0, size, 64 << 10):
            self.bulk_lane.put(bytes(min(64 << 10, size - start)))
            await self.bulk_lane.drain()


@pytest.mark.parametrize(
    ("link", "bulk_bytes"),
    [
        (EmulatedLink(rate_mbit=100, one_way_ms=10), 6 << 20),
        (EmulatedLink(rate_mbit=8, one_way_ms=45, jitter_ms=4), 500_000),
        (EmulatedLink(rate_mbit=400, one_way_ms=2), 24 << 20),
        (EmulatedLink(rate_mbit=100, one_way_ms=20, loss_pct=1), 500_000),
    ],
    ids=["100 Mbit", "8 Mbit", "400 Mbit", "lossy"],
)
def test_rate_and_delay_are_true(link: EmulatedLink, bulk_bytes: int) -> None:
    async def main() -> None:
        line = Line(link)
        for _ in range(7):
            sent_s = now_s()
            line.control.put(b"ping")
            await line.control.flush()
            repeated_s = 0.0 if not link.loss_pct else link.rtt_s + 0.01
            least_s = link.one_way_ms / 1e3
            assert least_s <= line.control_s[-1] - sent_s <= least_s + link.jitter_ms / 1e3 + repeated_s + 1e-4
        began_s = now_s()
        await line.send_bulk(bulk_bytes)
        await line.bulk_lane.flush()
        assert sum(size for _, size in line.bulk) == bulk_bytes
        took_s = line.bulk[-1][0] - began_s - (link.one_way_ms + link.jitter_ms / 2) / 1e3
        least = bulk_bytes / link.rate_bytes_per_s
        most = least + (link.rtt_s + 0.01 if link.loss_pct else link.jitter_ms / 1e3)
        assert 0.99 * least - link.jitter_ms / 1e3 <= took_s <= 1.01 * most
        await line.shaper.close()

    run_scripted(main())


def test_control_goes_ahead_of_bulk_and_shares_the_rate() -> None:
    async def main() -> None:
        line = Line(EmulatedLink(rate_mbit=20, one_way_ms=5))
        sending = asyncio.create_task(line.send_bulk(2_500_000))
        await asyncio.sleep(0.1)
        for _ in range(20):
            sent_s = now_s()
            line.control.put(b"ping")
            await line.control.flush()
            assert line.control_s[-1] - sent_s < 0.008, "behind one piece of bulk at most"
        sent_s, pieces = now_s(), len(line.bulk)
        line.control.put(bytes(250_000))
        await line.control.flush()
        assert line.control_s[-1] - sent_s == pytest.approx(0.105, abs=0.005), "at the line's rate"
        assert len(line.bulk) <= pieces + 4, "and bulk stands still meanwhile"
        await sending
        await line.bulk_lane.flush()
        assert line.bulk[-1][0] == pytest.approx(1.1 + 0.005, abs=0.005), "both together take what they weigh"
        await line.shaper.close()

    run_scripted(main())


# --- over sockets, where a busy machine may add any delay: tested is only what it cannot change ---------------------


def test_links_are_no_faster_than_emulated() -> None:
    link = EmulatedLink(rate_mbit=100, one_way_ms=10)

    async def main() -> None:
        async with pair(lab=LabConfig(default=link)) as (_, b, link_a, _):
            assert min([await link_a.ping(timeout_s=30) for _ in range(7)]) >= link.rtt_s - 5e-4
            began_s = now_s()
            await link_a.send_bulk("t", b"", bytes(2 << 20))
            await until(lambda: b.got.bulk, 60)
            assert now_s() - began_s >= (2 << 20) / link.rate_bytes_per_s

    run(main())


def test_directions_are_shaped_apart_and_by_name() -> None:
    lab = LabConfig(links={"a->b": EmulatedLink(one_way_ms=100)})

    async def main() -> None:
        async with pair(lab=lab) as (_, b, link_a, link_b):
            assert link_a.lab is not None
            assert link_b.lab is None
            # The other way has no delay: the best of many round trips is shorter than two delays.
            assert 0.0995 < min([await link_a.ping(timeout_s=30) for _ in range(10)]) < 0.2
            c = Node("c", lab=lab)
            other = await c.connect(b)
            assert other.lab is None
            await c.endpoint.close()

    run(main())


def test_control_goes_ahead_of_bulk_on_a_real_link() -> None:
    link = EmulatedLink(rate_mbit=20, one_way_ms=5)

    async def main() -> None:
        async with pair(lab=LabConfig(default=link)) as (_, b, link_a, _):
            sending = asyncio.create_task(link_a.send_bulk("t", b"", bytes(250_000_000)))  # 100 s
            await asyncio.sleep(0.1)
            for _ in range(5):
                await link_a.ping(timeout_s=30)
            await link_a.request("echo", bytes(25_000), timeout_s=30)
            assert not sending.done()
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
            await asyncio.wait_for(link_a.close(), 20)  # where 50 MB would take 40 s
            await asyncio.gather(sending, return_exceptions=True)

    run(main())


@pytest.mark.parametrize("link", [EmulatedLink(rate_mbit=100, one_way_ms=10), EmulatedLink(rate_mbit=8, one_way_ms=40)])
def test_probe_measures_what_is_emulated(link: EmulatedLink) -> None:
    """On the scripted clock, of links in memory."""

    async def main() -> None:
        async with linked(LabConfig(default=link)) as (_, _, b, link_a):
            began_s = now_s()
            probe = await probe_link(link_a, seconds=1)
            assert now_s() - began_s < 2
            assert probe.rtt_s == pytest.approx(link.rtt_s, abs=0.001)
            for rate in (probe.up_bytes_per_s, probe.down_bytes_per_s, probe.bandwidth_bytes_per_s):
                assert rate == pytest.approx(link.rate_bytes_per_s, rel=0.02)
            assert b.got.bulk == b.got.notices == []

    run_scripted(main())


def test_probe_of_a_real_link() -> None:
    async def main() -> None:
        async with pair() as (_, b, link_a, link_b):
            mine, theirs = await asyncio.gather(probe_link(link_a, seconds=0.5), probe_link(link_b, seconds=0.5))
            for probe in (mine, theirs):
                assert probe.rtt_s > 0
                assert probe.bandwidth_bytes_per_s > 0
            assert b.got.bulk == b.got.notices == []
            assert b.got.events == ["link"], "the upper layer does not see a probe"
            with pytest.raises(ConfigError, match="at most 10"):
                await probe_link(link_a, seconds=60)

    run(main())
