"""A member by itself: whom it admits, and how it goes on without its broker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fusionai.broker.broker import Broker
from fusionai.compnode.agent import Agent, AgentConfig
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import AuthenticationError, ConfigError, PeerLost, TokenError
from fusionai.execution.plane import Plane
from fusionai.network.identity import Identity
from fusionai.network.token import JoinToken
from fusionai.pool.member import MemberConfig, PoolMember
from fusionai.pool.session import FIRST_PAUSE_S
from fusionai.scheduling.profile import DeviceProfile

PROFILE = DeviceProfile("test CPU", "cpu", "torch", "2.13", 1 << 30, 1, {"matmul": 1e10}, 1e10, 1e-5)


def compnode(token: str | JoinToken, name: str = "a") -> CompnodeMember:
    return CompnodeMember(Identity.ephemeral(), token, MemberConfig(name=name), profile=PROFILE, work=[])


def test_a_listening_member_admits_only_whom_the_broker_names(tmp_path: Path) -> None:
    async def main() -> None:
        broker = Broker(Identity.ephemeral(), tmp_path)
        await broker.start()
        members = [compnode(broker.token(), name) for name in "ab"]
        one, other = members
        try:
            for member in members:
                await member.start()
            await broker._prober.settle([one.endpoint.peer_id, other.endpoint.peer_id], timeout_s=9)
            assert broker.status().links
            one.probes._expected.clear()
            assert one.address is not None
            with pytest.raises(AuthenticationError, match="only from machines of a job"):
                await other.endpoint.connect(one.identity.peer_id, [one.address], timeout_s=60)
        finally:
            for member in members:
                await member.close()
            await broker.close()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == [], "nothing stays behind"

    asyncio.run(main())


def test_another_key_in_the_brokers_place_is_final(tmp_path: Path) -> None:
    async def main() -> None:
        broker = Broker(Identity.ephemeral(), tmp_path / "first")
        await broker.start()
        port = int(broker.address.rpartition(":")[2])
        member = compnode(broker.token())
        await member.start()
        await broker.close()
        usurper = Broker(Identity.ephemeral(), tmp_path / "second", port=port)
        await usurper.start()
        with pytest.raises(AuthenticationError, match="was to be reached"):
            await asyncio.wait_for(member.wait_ended(), 400 * FIRST_PAUSE_S)
        assert usurper.status().compnodes == ()
        await member.close()
        await usurper.close()

    asyncio.run(main())


def test_nobody_at_the_address() -> None:
    async def main() -> None:
        token = JoinToken.issue(Identity.ephemeral(), ["127.0.0.1:1"])
        member = compnode(token)
        with pytest.raises(PeerLost, match=r"127\.0\.0\.1:1"):
            await member.start()

    asyncio.run(main())


def test_arguments() -> None:
    async def main() -> None:
        token = JoinToken.issue(Identity.ephemeral(), ["127.0.0.1:1"])
        with pytest.raises(ConfigError, match="name"):
            compnode(token, "a b")
        with pytest.raises(TokenError, match="malformed"):
            PoolMember(Identity.ephemeral(), "nonsense", "observer", MemberConfig(name="a"))

    asyncio.run(main())


def test_an_agent_that_is_stopped_while_it_loads(tmp_path: Path) -> None:
    """Ctrl-C during the import of a framework: nothing is joined."""

    async def main() -> None:
        token = JoinToken.issue(Identity.ephemeral(), ["127.0.0.1:1"]).encode()
        stop = asyncio.Event()

        def load() -> Plane:
            loop.call_soon_threadsafe(stop.set)
            raise AssertionError("the result of this is not asked for")

        loop = asyncio.get_running_loop()
        agent = Agent(AgentConfig(token=token, name="a", state_folder=tmp_path), load)
        with pytest.raises(AssertionError):
            await agent.run(asyncio.Event(), lambda member: None)
        stop.set()
        await agent.run(stop, lambda member: pytest.fail("it joined"))

    asyncio.run(main())
