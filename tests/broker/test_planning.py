"""A large pool's links: few are probed, the others estimated, and a plan's are measured before it is launched.

Real members over real sockets; the bound of what is a large pool is lowered, so that four of them are one.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import permutations
from pathlib import Path

import pytest
from broker_pool import broker_at, member_of, observer_of, profile, status, until

from fusionai.broker import prober
from fusionai.broker.broker import Broker
from fusionai.broker.planning import MOST_PLANS_AGAIN, plan_on_measured_links
from fusionai.broker.records import LinkRecord
from fusionai.network.identity import PeerId
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.pool.messages import MeasureLinks, Status
from fusionai.scheduling.plan import PipelinePlan, Plan, StagePlan, StagePrediction
from fusionai.scheduling.profile import Member, Pool

SLOW = EmulatedLink(rate_mbit=8, one_way_ms=15)


def plan_of(peers: tuple[str, ...]) -> Plan:
    nothing = StagePrediction(0.0, 0.0, 0.0, 0, 0.0)
    stages = tuple(StagePlan(stage, peer, stage, stage + 1, 1, nothing) for stage, peer in enumerate(peers))
    return Plan("", {}, 1, "open", "", (PipelinePlan(stages, 1, 1.0),), 0.0, 1.0, "")


def among_members(broker: Broker) -> list[LinkRecord]:
    """Return the measured pairs without the broker's own."""
    me = broker.status().broker
    return [each for each in broker._state.links.records() if me not in (each.source, each.target)]


class FastestPair:
    """Plans two stages on the fastest link, one machine's own taken for faster as long as they are only estimated."""

    def __init__(self, favourite: str) -> None:
        self.favourite = favourite
        self.pools: list[Pool] = []

    def __call__(self, *, pool: Pool) -> Plan:
        self.pools.append(pool)

        def worth(pair: tuple[str, ...]) -> float:
            link = pool.link(*pair)
            return link.bandwidth_bytes_per_s * (100 if link.estimated and self.favourite in pair else 1)

        return plan_of(max(permutations(sorted(each.peer for each in pool.members), 2), key=worth))


def test_a_plans_links_are_measured_and_the_plan_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four machines that nobody probed with each other; a is slow with all of them, though fast with the broker."""
    monkeypatch.setattr(prober, "ALL_PAIRS", 1)
    monkeypatch.setattr(prober, "AT_MOST", 0)
    lab = LabConfig(links={f"a<->{name}": SLOW for name in "bcd"})

    async def main() -> None:
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(broker_at(tmp_path))
            joined = {
                name: await stack.enter_async_context(member_of(broker.token(), name, lab=lab)) for name in "abcd"
            }
            eye = await stack.enter_async_context(observer_of(broker.token(), "eye", listen=None))

            async def estimated() -> bool:
                links = (await status(eye)).links
                return sum(each.profile is not None and each.profile.estimated for each in links) == 12

            await until(estimated)
            shown = await status(eye)
            measured = {
                (each.source, each.target) for each in shown.links if each.profile and not each.profile.estimated
            }
            assert all("broker" in pair for pair in measured)
            assert len(measured) == 8
            assert all(each.access is not None and each.access.up_bytes_per_s > 0 for each in shown.compnodes)

            peers = {name: each.identity.peer_id for name, each in joined.items()}
            members = [Member(peer, name, profile(), ("127.0.0.1:1",), True) for name, peer in peers.items()]
            state, measuring = broker._state, broker._prober
            make = FastestPair(peers["a"])
            first = await plan_on_measured_links(state, measuring, members, peers["a"], make)
            assert len(make.pools) == 1 + MOST_PLANS_AGAIN, "each of a's links turns out slow, and then it is enough"
            assert peers["a"] in {stage.peer for stage in first.stages}
            assert all(each.availability is not None for each in make.pools[0].members)
            for name in "bcd":
                link = state.links.matrix(list(peers.values()))[f"{peers['a']}>{peers[name]}"]
                assert not link.estimated
                assert link.bandwidth_bytes_per_s < 3e6, "1 MB/s; how exactly, tests/network/test_lab.py shows"
                assert link.rtt_s >= 0.0295

            second = await plan_on_measured_links(state, measuring, members, peers["a"], FastestPair(peers["a"]))
            used = [PeerId(stage.peer) for stage in second.stages]
            assert peers["a"] not in used
            assert state.links.get(*used) is not None, "it was measured before the plan was given out"
            again = FastestPair(peers["a"])
            third = await plan_on_measured_links(state, measuring, members, peers["a"], again)
            assert state.links.get(*(PeerId(stage.peer) for stage in third.stages)) is not None

    asyncio.run(main())


def test_a_newcomer_is_probed_a_bounded_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "ALL_PAIRS", 1)
    monkeypatch.setattr(prober, "AT_MOST", 2)
    monkeypatch.setattr(prober, "FIRST", 1)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(broker_at(tmp_path))
            names = "abcde"
            for name in names:
                await stack.enter_async_context(member_of(broker.token(), name))
            eye = await stack.enter_async_context(observer_of(broker.token(), "eye", listen=None))

            async def settled() -> bool:
                return not broker._prober._introducing and not broker._prober._wanted

            await until(settled)
            measured = among_members(broker)
            assert len(names) - 1 <= len(measured) <= 2 * len(names)
            # Becoming idle again asks for no more than that either.
            for record in broker._state.registry.idle():
                broker._prober.consider(record.peer)
            await until(settled)
            assert len(among_members(broker)) <= 2 * len(names)
            shown = await eye.request(MeasureLinks(), Status, timeout_s=60)
            assert len(shown.links) == (len(names) + 1) * len(names), "measured or estimated, every pair is shown"

    asyncio.run(main())
