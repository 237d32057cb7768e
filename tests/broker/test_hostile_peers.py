"""What members of a pool can do to each other and to its broker, over real sockets: nothing that lasts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from broker_pool import broker_at, member_of, owner_of, plane, states, status, submit, until

from fusionai.broker.broker import Broker
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import FusionError, JobError, PeerLost, ProtocolError
from fusionai.owner.membership import OwnerMember
from fusionai.pool.messages import JobEnded, JobLaunched, JobProgress, LinkProbed
from fusionai.scheduling.profile import LinkProfile

MIB = 1 << 20


@asynccontextmanager
async def pool_with_job(folder: Path) -> AsyncIterator[tuple[Broker, OwnerMember, CompnodeMember, JobLaunched]]:
    """A broker, and an owner whose job runs on two compnodes; one of them."""
    async with AsyncExitStack() as stack, asyncio.timeout(250):
        broker, torch = await stack.enter_async_context(broker_at(folder)), plane()
        owner = await stack.enter_async_context(owner_of(broker.token(), with_plane=torch))
        members = [await stack.enter_async_context(member_of(broker.token(), each, with_plane=torch)) for each in "ab"]
        yield broker, owner, members[0], await submit(owner, cuts=(2,))


@pytest.mark.parametrize(
    "lie",
    [
        LinkProfile(math.nan, 1e6),
        LinkProfile(0.1, math.nan),
        LinkProfile(0.1, math.inf),
        LinkProfile(0.1, -1.0),
        LinkProfile(0.1, 1e15),
    ],
)
def test_a_lie_about_a_link_does_not_reach_the_plans(tmp_path: Path, lie: LinkProfile) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(250):
            broker = await stack.enter_async_context(broker_at(tmp_path))
            token, torch = broker.token(), plane()
            liars = [await stack.enter_async_context(member_of(token, name, with_plane=torch)) for name in "ab"]

            async def probe(_: object) -> LinkProbed:
                return LinkProbed(lie, lie)

            for liar in liars:
                liar.probes.probe = probe  # type: ignore[method-assign]
            broker._prober.measure_again()
            peers = [each.identity.peer_id for each in liars]
            await broker._prober.settle(peers, timeout_s=60)
            found = broker._state.links.get(*peers)
            figures = [] if found is None else [each for each in (found.there, found.back) if each is not None]
            assert not figures, "nothing of what they say is kept"

    asyncio.run(main())


def test_an_infinite_throughput_does_not_keep_the_broker_from_restarting(tmp_path: Path) -> None:
    async def main() -> None:
        async with pool_with_job(tmp_path) as (_, owner, _, launched):
            owner.tell(JobProgress(launched.job, 1, 2, 0.5, math.inf))
            await until(lambda: owner._session._link is None)

    asyncio.run(main())

    async def restarted() -> int:
        async with broker_at(tmp_path) as broker:
            return len(broker.status().jobs)

    assert asyncio.run(restarted()) == 1


def test_one_owner_submits_one_job_at_a_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(250):
            broker = await stack.enter_async_context(broker_at(tmp_path))
            token, torch = broker.token(), plane()
            owner = await stack.enter_async_context(owner_of(token, with_plane=torch))
            for name in "ab":
                await stack.enter_async_context(member_of(token, name, with_plane=torch))
            found = await asyncio.gather(*(submit(owner, compnodes=1) for _ in range(4)), return_exceptions=True)
            launched = [each for each in found if isinstance(each, JobLaunched)]
            assert len(launched) == 1
            assert all(isinstance(each, (JobLaunched, JobError)) for each in found), found
            assert len((await status(owner)).jobs) == 1

    asyncio.run(main())


def test_nobody_ends_the_job_of_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with pool_with_job(tmp_path) as (broker, owner, compnode, launched):
            async with owner_of(broker.token(), with_plane=plane()) as thief:
                assert thief.name == "owner-2", "a name is its first bearer's"
                ended = JobEnded(launched.job, "finished", "")
                for hostile in (thief, compnode):
                    with pytest.raises(ProtocolError, match="owns no job"):
                        await hostile.request(ended, None, timeout_s=60)
            assert set((await states(owner)).values()) == {"working"}

    asyncio.run(main())


def test_large_requests_in_work_are_bounded(tmp_path: Path) -> None:
    """Requests that the broker cannot answer at once, each with a payload that nobody asked for."""

    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(250):
            broker = await stack.enter_async_context(broker_at(tmp_path))
            member = await stack.enter_async_context(member_of(broker.token(), "a"))
            waiting = asyncio.Event()

            async def slow(*_: object) -> bytes:
                await waiting.wait()
                return b""

            broker._requests["broker.measure_links"] = slow
            link, payload = member._session.link(), bytes(7 * MIB)
            asked = [
                asyncio.create_task(link.request("broker.measure_links", payload, timeout_s=60)) for _ in range(12)
            ]
            await until(lambda: sum(each.done() for each in asked) == 8)
            assert broker._state.link(member.identity.peer_id)._answering._bytes <= 32 * MIB
            waiting.set()
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert sum(each == b"" for each in answers) == 4
            assert sum(isinstance(each, FusionError) for each in answers) == 8
            assert not any(isinstance(each, PeerLost) for each in answers)

    asyncio.run(main())
