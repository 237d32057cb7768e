"""Jobs from submission to their end, with real planning, real programs and real sockets; no training here."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from broker_pool import (
    QUICK,
    broker_at,
    first_plan,
    graph,
    held,
    member_of,
    owner_of,
    plane,
    states,
    status,
    submit,
    until,
)
from msgspec.structs import replace

from fusionai.broker.broker import Broker
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import GraphError, JobError, PeerTimeout, PlacementError, ProtocolError
from fusionai.graph.encoding import content_hash
from fusionai.network.identity import PeerId
from fusionai.owner.membership import OwnerMember
from fusionai.pool.identifiers import FIRST_EPOCH, JobId
from fusionai.pool.messages import JobEnded, JobProgress, JobStatus
from fusionai.training.messages import BeginRound, FinishLoading


class Party:
    """A broker, an owner and two compnodes."""

    def __init__(self, folder: Path, **times: float) -> None:
        self._folder = folder
        self._times = replace(QUICK, **times)
        self._stack = AsyncExitStack()
        self.broker: Broker
        self.owner: OwnerMember
        self.a: CompnodeMember
        self.b: CompnodeMember

    async def __aenter__(self) -> Party:
        enter = self._stack.enter_async_context
        self.broker = await enter(broker_at(self._folder, times=self._times))
        token, torch = self.broker.token(), plane()
        self.owner = await enter(owner_of(token, with_plane=torch))
        self.a = await enter(member_of(token, "a", with_plane=torch))
        self.b = await enter(member_of(token, "b", with_plane=torch))
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._stack.aclose()

    async def states(self) -> dict[str, str]:
        return await states(self.owner)

    async def job(self) -> JobStatus:
        return (await status(self.owner)).jobs[-1]


IDLE, WORKING = {"a": "idle", "b": "idle"}, {"a": "working", "b": "working"}


def test_a_job_from_launch_to_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with Party(tmp_path) as party:
            launched = await submit(party.owner, cuts=(2,))
            assert launched.plan.cuts == (2,)
            assert sorted(launched.names.values()) == ["a", "b", "owner"]
            assert not launched.lab
            assert await party.states() == WORKING
            assert all(held(each) == [first_plan(launched)] for each in (party.a, party.b))
            assert party.owner.hosting.host(first_plan(launched)) is None, "nothing is pinned to the owner"
            for peer in (party.a.identity.peer_id, party.b.identity.peer_id):
                assert party.owner.endpoint.link(peer) is not None
            assert party.a.endpoint.link(party.b.identity.peer_id) is not None
            assert (await party.job()).state == "running"

            party.owner.tell(JobProgress(launched.job, 3, 10, 2.5, 100.0))

            async def told() -> bool:
                return (await party.job()).step == 3

            await until(told)

            async def shown() -> bool:
                return all(
                    [held.job for held in each.holds] == [launched.job]
                    for each in (await status(party.owner)).compnodes
                )

            await until(shown)
            with pytest.raises(JobError, match="weights"):
                await party.owner.wire.request(
                    party.a.identity.peer_id, FinishLoading(launched.job, FIRST_EPOCH, 0, 0), timeout_s=60
                )
            await party.owner.request(JobEnded(launched.job, "finished", ""), None, timeout_s=60)
            assert await party.states() == IDLE
            await until(lambda: not party.a.holds and not party.b.holds)
            again = await submit(party.owner, cuts=(1,))
            assert again.plan.cuts == (1,)

    asyncio.run(main())


def test_owners_share(tmp_path: Path) -> None:
    """Pinned ends: the owner holds its stages like any compnode."""

    async def main() -> None:
        async with Party(tmp_path) as party:
            launched = await submit(party.owner, privacy="private", front=1, back=3)
            peers = [stage.peer for stage in launched.plan.stages]
            assert peers[0] == peers[-1] == party.owner.identity.peer_id
            host = party.owner.hosting.host(first_plan(launched))
            assert host is not None
            assert host.description.startswith("stage 0")

    asyncio.run(main())


def test_what_cannot_be_launched(tmp_path: Path) -> None:
    async def main() -> None:
        async with Party(tmp_path) as party:
            dag = graph()
            with pytest.raises(GraphError, match="content hash"):
                await submit(party.owner, graph_hash="0" * 64)
            evil = replace(dag, nodes=(replace(dag.nodes[0], op="aten.from_file.default"), *dag.nodes[1:]))
            with pytest.raises(GraphError, match="from_file"):
                await submit(party.owner, evil, graph_hash=content_hash(evil))
            with pytest.raises(ProtocolError, match="microbatches"):
                await submit(party.owner, microbatches=0)
            with pytest.raises(ProtocolError, match="owns no job"):
                await party.a.request(JobEnded(JobId("none"), "failed", ""), None, timeout_s=60)
            await until_idle(party)
            # The owner is still welcome after all that.
            await submit(party.owner, cuts=(2,))
            with pytest.raises(JobError, match="has a job on this pool already"):
                await submit(party.owner)

    asyncio.run(main())


async def until_idle(party: Party) -> None:
    async def idle() -> bool:
        return await party.states() == IDLE

    await until(idle)


def test_nobody_there_and_nobody_free(tmp_path: Path) -> None:
    async def main() -> None:
        torch = plane()
        async with broker_at(tmp_path) as broker:
            token = broker.token()
            async with owner_of(token, with_plane=torch) as owner:
                with pytest.raises(PlacementError, match="fusionai join TOKEN"):
                    await submit(owner)
                async with (
                    member_of(token, "a", with_plane=torch),
                    owner_of(token, "second", with_plane=torch) as second,
                ):
                    await submit(owner, compnodes=1)
                    with pytest.raises(PlacementError, match="all 1 of the pool work"):
                        await submit(second)

    asyncio.run(main())


def test_a_failing_compnode_is_named_and_all_are_released(tmp_path: Path) -> None:
    async def main() -> None:
        async with Party(tmp_path) as party:
            token = party.broker.token()
            async with member_of(token, "broken") as broken:  # it has no plane
                await party.b.close()
                with pytest.raises(JobError, match="compnode broken cannot take its share"):
                    await submit(party.owner, cuts=(2,))
                await until(lambda: not party.a.holds and not broken.holds)
                found = await party.states()
                assert found == {"a": "idle", "broken": "idle", "b": "left"}
                job = await party.job()
                assert job.state == "failed"
                assert "broken" in job.reason

    asyncio.run(main())


def test_a_dead_compnode_ends_the_job_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with Party(tmp_path) as party:
            launched = await submit(party.owner, cuts=(2,))
            lost: list[str] = []
            party.owner.on_job_lost(launched.job, lost.append)
            # Equal machines: which of them comes first is up to the links as measured just now.
            held = [stage.peer for stage in launched.plan.stages].index(party.a.identity.peer_id)
            await party.a.endpoint.close()
            await until(lambda: lost)
            assert lost[0].startswith(f"compnode a (stage {held}: ")
            await until(lambda: not party.b.holds)
            assert await party.states() == {"a": "lost", "b": "idle"}
            assert (await party.job()).state == "failed"

    asyncio.run(main())


def test_a_blip_between_compnode_and_broker_does_not_end_the_job(tmp_path: Path) -> None:
    async def main() -> None:
        async with Party(tmp_path) as party:
            launched = await submit(party.owner, cuts=(2,))
            link = party.a.endpoint.link(PeerId(party.broker.status().broker))
            assert link is not None
            await link.close("a broken line")

            async def back() -> bool:
                return await party.states() == WORKING

            await until(back)
            assert not party.broker._lifecycle._waiting, "nobody's grace runs on"
            assert (await party.job()).state == "running"
            assert held(party.a) == [first_plan(launched)]

    asyncio.run(main())


def test_a_running_job_survives_the_brokers_restart(tmp_path: Path) -> None:
    async def main() -> None:
        torch = plane()
        async with AsyncExitStack() as stack:
            async with broker_at(tmp_path) as broker:
                token = broker.token()
                owner = await stack.enter_async_context(owner_of(token, with_plane=torch))
                a = await stack.enter_async_context(member_of(token, "a", with_plane=torch))
                b = await stack.enter_async_context(member_of(token, "b", with_plane=torch))
                launched = await submit(owner, cuts=(2,))
            # The data path does without the broker.
            begin = BeginRound(launched.job, FIRST_EPOCH, 0, 0, True, {"s0": 2}, (1.0,))
            await owner.wire.notify(a.identity.peer_id, begin)
            async with broker_at(tmp_path) as broker:
                await until(lambda: {each.state for each in broker.status().compnodes} == {"working"})
                await until(lambda: not broker._lifecycle._waiting)  # everybody is back: no recovery runs on
                assert broker.status().jobs[-1].state == "running"
                assert held(a) == held(b) == [first_plan(launched)]
                await until(lambda: owner.name and broker.status().jobs[-1].state == "running")
                await owner.request(JobEnded(launched.job, "finished", ""), None, timeout_s=60)
                assert {each.state for each in broker.status().compnodes} == {"idle"}

    asyncio.run(main())


def test_a_job_whose_owner_does_not_come_back_after_the_restart(tmp_path: Path) -> None:
    async def main() -> None:
        torch = plane()
        async with AsyncExitStack() as stack:
            async with broker_at(tmp_path) as broker:
                token = broker.token()
                a = await stack.enter_async_context(member_of(token, "a", with_plane=torch))
                owner = await stack.enter_async_context(owner_of(token, with_plane=torch))
                await submit(owner, compnodes=1)
            await owner.close()
            await until(lambda: not a.holds)
            async with broker_at(tmp_path, times=replace(QUICK, recovery_s=0.5)) as broker:
                await until(lambda: broker.status().jobs[-1].state == "failed")
                assert "owner" in broker.status().jobs[-1].reason
                await until(lambda: broker.status().compnodes[0].state == "idle")

    asyncio.run(main())


def test_an_owner_that_goes_while_it_submits_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with Party(tmp_path) as party:
            submitting = asyncio.create_task(submit(party.owner, cuts=(2,)))
            await until(lambda: any(each.state == "working" for each in party.broker.status().compnodes))
            submitting.cancel()
            await asyncio.gather(submitting, return_exceptions=True)
            await party.owner.close()
            await until(lambda: {each.state for each in party.broker.status().compnodes} == {"idle"})
            await until(lambda: not party.a.holds and not party.b.holds)
            assert party.broker.status().jobs[-1].state == "failed"

    asyncio.run(main())


def test_a_graph_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusionai.broker.launching.GRAPH_TIMEOUT_S", 0.2)

    async def main() -> None:
        async with Party(tmp_path) as party:
            with pytest.raises(PeerTimeout, match="did not arrive"):
                await submit(party.owner, graph_hash="1" * 64, cuts=(2,))

    # The graph that came is named otherwise, so the one asked for never does.
    async def other_name(member: OwnerMember, graph_hash: str, encoded: bytes) -> None:
        await send(member, "2" * 64, encoded)

    send = OwnerMember.send_graph
    monkeypatch.setattr(OwnerMember, "send_graph", other_name)
    asyncio.run(main())
