"""A machine goes on by a later roster: real broker, members, programs and sockets, in one process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from broker_pool import first_plan, until
from job_party import Party, run, undisturbed
from msgspec.structs import replace

from fusionai.errors import ProtocolError
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch
from fusionai.training.messages import BeginRound, PullWeights
from fusionai.training.roster import Roster
from fusionai.training.stage_host import StageHost

LATER = Epoch(5)


def hosts(party: Party) -> list[StageHost]:
    found = [party.members[name].hosting.host(first_plan(party.launched)) for name in "ab"]
    assert None not in found
    return [each for each in found if each is not None]


def later(host: StageHost, epoch: Epoch = LATER) -> Roster:
    return replace(host.roster, epoch=epoch)


def test_a_job_goes_on_under_a_later_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares and weights stay; only the roster is another one."""

    async def course(party: Party) -> None:
        first = party.driver
        for host in hosts(party):
            share = host.share
            assert host.take_roster(later(host))
            assert host.share is share
        machine = party.members["a"].identity.peer_id
        with pytest.raises(ProtocolError, match=r"epoch 0 of job .* no part in"):
            await party.owner.wire.request(machine, PullWeights(first.job, FIRST_EPOCH, ()), timeout_s=60)
        stale = BeginRound(first.job, FIRST_EPOCH, 0, 0, True, {"s0": 2}, (1.0,))
        await party.owner.wire.notify(machine, stale)
        party.running.driver = party.make_driver(LATER, first.machines)
        await party.steps(6)

    assert run(tmp_path / "one", monkeypatch, course) == run(tmp_path / "other", monkeypatch, undisturbed)


def test_which_rosters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Party(tmp_path, monkeypatch) as party:
            host = hosts(party)[0]
            before = host.roster
            assert not host.take_roster(before), "of this epoch"
            assert host.take_roster(later(host))
            assert not host.take_roster(later(host, Epoch(4)))
            assert not host.take_roster(before), "of an older epoch"
            assert host.roster == replace(before, epoch=LATER)
            stolen = replace(later(host, Epoch(6)), pipelines=(("f" * 64, "f" * 64),))
            with pytest.raises(ProtocolError, match="is not this machine's"):
                host.take_roster(stolen)
            begin = BeginRound(before.job, LATER, 0, 0, True, {"s0": 2}, (1.0,))
            await party.owner.wire.notify(host._wire.me, begin)
            await until(lambda: not host._rounds.idle)
            with pytest.raises(ProtocolError, match="a round is in progress"):
                host.take_roster(later(host, Epoch(6)))

    asyncio.run(main())
