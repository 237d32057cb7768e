"""What a broker and its members note of others is removed when they are gone, or bounded in total."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from broker_pool import broker_at, member_of, observer_of, owner_of, plane, profile, until
from msgspec.structs import replace

from fusionai.broker.link_book import LinkBook
from fusionai.broker.records import LinkRecord
from fusionai.broker.registry import Registry
from fusionai.broker.validation import check_heartbeat
from fusionai.network.identity import PeerId
from fusionai.owner.job_news import JobNews
from fusionai.pool.hosting import Hosting, _Held
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.pool.messages import Heartbeat, RegisterMember
from fusionai.scheduling.profile import LinkProfile

A, B, C = (PeerId(letter * 64) for letter in "abc")


def test_a_broker_keeps_nothing_of_members_that_it_has_forgotten(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(250):
            broker = await stack.enter_async_context(broker_at(tmp_path))
            state, prober = broker._state, broker._prober
            state.registry._most = 3
            for number in range(8):
                async with member_of(broker.token(), f"m{number}") as member:
                    me, peer = state.endpoint.peer_id, member.identity.peer_id
                    await until(lambda peer=peer, me=me: state.links.get(peer, me))  # type: ignore[misc]
            async with owner_of(broker.token(), with_plane=plane()) as owner, observer_of(broker.token()):
                await until(lambda: state.links.get(owner.identity.peer_id, state.endpoint.peer_id))
            await until(lambda: not state.endpoint._not_gone)
            await until(lambda: not prober._wanted)
            known = state.registry._members.keys()
            assert 0 < len(known) <= 3
            assert state.registry._names.keys() == {each.name for each in state.registry._members.values()}
            assert state.registry._activity.keys() <= known
            linked = {peer for key in state.links._links for peer in key} - {state.endpoint.peer_id}
            assert linked <= known
            assert owner.identity.peer_id not in linked, "its next run has another key"
            assert state.links._of.keys() <= linked | {state.endpoint.peer_id}
            assert len(prober._locks) == len(prober._introducing) == len(broker._registered) == 0
            assert len(broker._launcher.graphs._parcels) == len(broker._launcher._submitting) == 0

    asyncio.run(main())


def test_links_of_members_that_are_not_known_are_not_restored() -> None:
    book = LinkBook(lambda record: None)
    there = LinkProfile(0.01, 1e6)
    records = [
        LinkRecord(source=one, target=other, there=there, back=there, measured_s=1) for one, other in ((A, B), (A, C))
    ]
    book.restore(records, {A, B})
    assert book.get(A, B)
    assert book.get(A, C) is None
    book.forget(B)
    assert book._links == {}
    assert book._of == {}


def test_what_a_member_has_sent_is_forgotten_when_it_goes() -> None:
    book = Registry(lambda record: None, lambda peer: None)
    book.register(A, RegisterMember("anna", "compnode", profile(), ()), 1)
    beat = Heartbeat(0.5, 7, (), {B: 10}, disk_free_bytes=3)
    book.heartbeat(A, beat, 2)
    assert book.bytes_sent(A, B) == 10
    book.depart(A, "lost", 3)
    assert book.activity(A) == replace(beat, bytes_sent={})


def test_a_compnode_that_has_worked_for_many_still_sends_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of an owner has a key of its own, and a heartbeat names at most so many receivers."""

    async def main() -> Hosting:
        wire: Any = SimpleNamespace(me=A, endpoint=SimpleNamespace(link=lambda peer: None))
        hosting = Hosting(wire, profile(), [], changed=lambda: None)
        monkeypatch.setattr(hosting, "_unlink", _nothing)
        for number in range(2000):
            plan, peer = JobEpoch(JobId(f"j{number}"), Epoch(0)), f"{number:064x}"
            host: Any = SimpleNamespace(busy_s=0.1, memory_bytes=0, bytes_sent={peer: number, "f" * 64: 1})
            work: Any = SimpleNamespace(memory_bytes=0, contacts=())
            hosting._held[plan] = _Held(work, host)
            hosting._drop(plan)
        await hosting.close("it is over")
        return hosting

    hosting = asyncio.run(main())
    beat = hosting.heartbeat(Heartbeat(0.0, 0, (), {}))
    check_heartbeat(beat)
    assert beat.bytes_sent[f"{1999:064x}"] == 1999
    assert beat.bytes_sent["f" * 64] == 2000, "who gets something again is not forgotten"
    assert len(beat.bytes_sent) == 256
    assert hosting.busy_s == pytest.approx(200)


async def _nothing(work: object) -> None:
    pass


def test_an_owner_hears_nothing_more_of_what_is_over() -> None:
    news, heard = JobNews(), list[str]()
    job = JobId("j")
    news.on_lost(job, heard.append)
    news.on_lost(JobEpoch(job, Epoch(1)), heard.append)
    news.on_lost(job, None)
    news.on_lost(JobEpoch(job, Epoch(1)), None)
    assert news._on_lost == {}
    news.lost(job, "too\x1blate")
    assert heard == []
    news.on_lost(job, heard.append)
    assert heard == ["too late"]
