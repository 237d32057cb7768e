"""How long members have been there and how often they were lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from broker_pool import broker_at, member_of, profile, until
from msgspec.structs import replace

from fusionai.broker.presence import BLIP_S, PRIOR_BETWEEN_LOSSES_S, Presence, arrived, availability, departed
from fusionai.broker.records import MemberRecord
from fusionai.broker.registry import Registry
from fusionai.broker.validation import check_heartbeat, check_link, check_register
from fusionai.compnode.disk_report import DiskReport
from fusionai.errors import ProtocolError
from fusionai.network.identity import Identity, PeerId
from fusionai.pool.messages import Heartbeat, RegisterMember
from fusionai.scheduling.profile import DiskProfile, LinkProfile

DAY = 86_400.0


def test_a_history() -> None:
    newcomer = arrived(Presence(), 1000.0)
    assert availability(newcomer, 1000.0).mean_time_between_losses_s == PRIOR_BETWEEN_LOSSES_S
    lost = departed(newcomer, "lost", 1000.0 + DAY)
    back = arrived(lost, 1000.0 + 2 * DAY)
    left = departed(back, "left", 1000.0 + 5 * DAY)
    found = availability(left, 1000.0 + 10 * DAY)
    assert (found.losses, found.leaves) == (1, 1)
    assert found.present_s == pytest.approx(4 * DAY)
    assert found.member_s == pytest.approx(10 * DAY)
    # (prior of a day + four days there) / (1 + one loss)
    assert found.mean_time_between_losses_s == pytest.approx(2.5 * DAY)
    assert departed(left, "lost", 2000.0 + 10 * DAY) == left, "who has left cannot be lost"


def test_a_blip_is_no_loss() -> None:
    lost = departed(arrived(Presence(), 0.0), "lost", 100.0)
    assert arrived(lost, 100.0 + BLIP_S / 2).losses == 0
    assert arrived(lost, 100.0 + 2 * BLIP_S).losses == 1
    there = arrived(Presence(), 5.0)
    assert arrived(there, 50.0) == there, "registering over a link that was not seen to break"


def test_what_happens_while_the_broker_is_away_counts_as_nothing() -> None:
    kept: dict[PeerId, MemberRecord] = {}
    peer = PeerId("a" * 64)
    book = Registry(lambda record: kept.update({record.peer: record}), kept.pop)
    book.register(peer, RegisterMember("a", "compnode", profile(), ()), 1000.0)
    again = Registry(lambda record: None, lambda peer: None)
    again.restore(kept.values(), alive_s=1000.0 + DAY)
    assert again.status(1000.0 + 3 * DAY)[0].availability == availability(
        Presence(first_s=1000.0, present_s=DAY), 1000.0 + 3 * DAY
    )
    again.register(peer, RegisterMember("a", "compnode", profile(), ()), 1000.0 + 3 * DAY)
    found = again.status(1000.0 + 4 * DAY)[0].availability
    assert found is not None
    assert (found.present_s, found.losses) == (2 * DAY, 0)


def test_the_history_survives_the_brokers_restart(tmp_path: Path) -> None:
    async def main() -> None:
        identity = Identity.ephemeral()
        disk = DiskProfile(10**12, 5e8, None)
        async with broker_at(tmp_path) as broker:
            token = broker.token()
            async with member_of(token, "a", identity=identity, disk=DiskReport(disk, tmp_path)) as member:

                async def told() -> bool:
                    shown = broker.status().compnodes[0].disk
                    return shown is not None and shown.free_bytes != disk.free_bytes

                await until(told)
                await member.endpoint.close()  # without a word
                await until(lambda: broker.status().compnodes[0].state == "lost")
            async with member_of(token, "b", identity=Identity.ephemeral()):
                await asyncio.sleep(0.3)
        async with broker_at(tmp_path) as broker:
            found = {each.name: each.availability for each in broker.status().compnodes}
            assert found["a"] is not None
            assert (found["a"].losses, found["a"].leaves) == (1, 0)
            assert found["a"].present_s > 0
            assert found["b"] is not None
            assert (found["b"].losses, found["b"].leaves) == (0, 1)
            assert 0.3 <= found["b"].present_s < 300

    asyncio.run(main())


NAN = float("nan")


@pytest.mark.parametrize(
    "disk",
    [
        DiskProfile(-1, None, None),
        DiskProfile(1 << 61, None, None),
        DiskProfile(1, NAN, None),
        DiskProfile(1, 0.0, None),
        DiskProfile(1, None, float("inf")),
        DiskProfile(1, None, -5.0),
    ],
)
def test_impossible_disks(disk: DiskProfile) -> None:
    message = RegisterMember("a", "compnode", profile(), (), disk=DiskProfile(1, 1e8, None))
    check_register(message)
    with pytest.raises(ProtocolError, match="disk"):
        check_register(replace(message, disk=disk))


def test_impossible_figures() -> None:
    with pytest.raises(ProtocolError, match="disk"):
        check_heartbeat(Heartbeat(0.0, 0, (), {}, disk_free_bytes=-1))
    check_heartbeat(Heartbeat(0.0, 0, (), {}, disk_free_bytes=5))
    for bandwidth in (0.0, NAN, 1e13):
        with pytest.raises(ProtocolError, match="bandwidth"):
            check_link(LinkProfile(0.1, bandwidth))
