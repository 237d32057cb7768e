"""A large pool's links: few are probed, the others estimated, and a plan's are measured before it is launched.

Real members over real sockets; the bound of what is a large pool is lowered, so that four of them are one.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import permutations
from pathlib import Path

import pytest
from broker_pool import broker_at, member_of, profile, status, until

from fusionai.broker import prober
from fusionai.broker.messages import Measure, Status
from fusionai.broker.planning import MOST_PLANS_AGAIN, plan_on_measured_links
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.scheduling.plan import Plan, StagePlan, StagePrediction
from fusionai.scheduling.profile import Member, Pool

SLOW = EmulatedLink(rate_mbit=8, one_way_ms=15)


def plan_of(peers: tuple[str, ...]) -> Plan:
    nothing = StagePrediction(0.0, 0.0, 0.0, 0, 0.0)
    stages = tuple(StagePlan(stage, peer, stage, stage + 1, 1, nothing) for stage, peer in enumerate(peers))
    return Plan("", {}, 1, "open", "", stages, 1.0, "")


class FastestPair:
    """Plans two stages on the pair with the fastest link, and keeps the pools that it was asked about."""

    def __init__(self) -> None:
        self.pools: list[Pool] = []

    def __call__(self, *, pool: Pool) -> Plan:
        self.pools.append(pool)
        pairs = permutations(sorted(each.peer for each in pool.members), 2)
        return plan_of(max(pairs, key=lambda pair: pool.link(*pair).bandwidth_bytes_per_s))


def test_a_plans_links_are_measured_and_the_plan_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three machines, which nobody probed with each other, only b and c have a fast link; the broker's are fast."""
    monkeypatch.setattr(prober, "ALL_PAIRS", 1)
    monkeypatch.setattr(prober, "AT_MOST", 0)
    lab = LabConfig(links={"a<->b": SLOW, "a<->c": SLOW})

    async def main() -> None:
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(broker_at(tmp_path))
            joined = {name: await stack.enter_async_context(member_of(broker.token(), name, lab=lab)) for name in "abc"}
            eye = await stack.enter_async_context(member_of(broker.token(), "eye", "observer", listen=None))

            async def estimated() -> bool:
                links = (await status(eye)).links
                return sum(each.profile is not None and each.profile.estimated for each in links) == 6

            await until(estimated)
            shown = await status(eye)
            assert {each.source for each in shown.links if each.profile and not each.profile.estimated} == {*"abc"} | {
                "broker"
            }
            access = [each.access for each in shown.compnodes]
            assert all(each is not None and each.up_bytes_per_s > 1e6 for each in access)
            peers = {name: each.identity.peer_id for name, each in joined.items()}
            members = [Member(peer, name, profile(), ("127.0.0.1:1",), True) for name, peer in peers.items()]
            make = FastestPair()
            state, measuring = broker._state, broker._prober
            made = await plan_on_measured_links(state, measuring, members, peers["a"], make)
            assert {stage.peer for stage in made.stages} == {peers["b"], peers["c"]}
            assert state.links.get(peers["b"], peers["c"]) is not None
            assert 1 <= len(make.pools) <= 1 + MOST_PLANS_AGAIN
            assert all(each.availability is not None for each in make.pools[0].members)
            # Once more: all it uses is measured now, so the first plan stands.
            again = FastestPair()
            assert await plan_on_measured_links(state, measuring, members, peers["a"], again) == made
            assert len(again.pools) == 1
            # A plan that insists on the slow link is asked for three times at most, and then stands.
            calls: list[Pool] = []

            def stubborn(*, pool: Pool) -> Plan:
                calls.append(pool)
                return plan_of((peers["a"], peers["bc"[len(calls) % 2]]))

            await plan_on_measured_links(state, measuring, members, peers["a"], stubborn)
            assert len(calls) <= 1 + MOST_PLANS_AGAIN
            slow = state.links.matrix(list(peers.values()))[f"{peers['a']}>{peers['b']}"]
            assert not slow.estimated
            assert slow.bandwidth_bytes_per_s == pytest.approx(1e6, rel=0.3)

    asyncio.run(main())


def test_a_newcomer_is_probed_a_bounded_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prober, "ALL_PAIRS", 1)
    monkeypatch.setattr(prober, "AT_MOST", 2)
    monkeypatch.setattr(prober, "FIRST", 1)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            broker = await stack.enter_async_context(broker_at(tmp_path))
            names = "abcdefg"
            for name in names:
                await stack.enter_async_context(member_of(broker.token(), name))
            eye = await stack.enter_async_context(member_of(broker.token(), "eye", "observer", listen=None))

            async def settled() -> bool:
                return not broker._prober._introducing and not broker._prober._wanted

            await until(settled, within_s=30)
            measured = [
                each
                for each in broker._state.links.records()
                if broker.status().broker not in (each.source, each.target)
            ]
            assert len(names) - 1 <= len(measured) <= 2 * len(names)
            # Becoming idle again asks for no more than that either.
            for record in broker._state.registry.idle():
                broker._prober.consider(record.peer)
            await until(settled, within_s=30)
            after = [
                each
                for each in broker._state.links.records()
                if broker.status().broker not in (each.source, each.target)
            ]
            assert len(after) <= 2 * len(names)
            shown = await eye.request(Measure(), Status, timeout_s=60)
            assert len(shown.links) == (len(names) + 1) * len(names), "measured or estimated, every pair is shown"

    asyncio.run(main())
