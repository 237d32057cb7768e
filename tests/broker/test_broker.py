"""A broker with members: joining, leaving, dying, restarting, and who is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from broker_pool import broker_at, member_of, observer_of, profile, states, status, until

from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import AuthenticationError, ConfigError, PeerLost, ProtocolError, TokenError
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import Identity, PeerId
from fusionai.network.link import Link
from fusionai.network.token import JoinToken
from fusionai.pool.codec import GRAPH, encode, kind_of
from fusionai.pool.member import MemberConfig
from fusionai.pool.messages import LeavePool, MeasureLinks, Status, StatusQuery


class Silent:
    """A handler for a stranger that only asks."""

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        return b""

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None: ...

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None: ...

    async def on_link(self, link: Link) -> None: ...

    async def on_close(self, link: Link, error: object) -> None: ...


async def admit_all(peer: PeerId, credential: bytes) -> None:
    return None


def test_members_and_links(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path) as broker:
            token = broker.token()
            async with (
                member_of(token, "a") as a,
                member_of(token, "a") as second,
                member_of(token, "quiet", listen=None),
                observer_of(token, "eye", listen=None) as eye,
            ):
                assert second.name == "a-2"

                async def measured() -> bool:
                    links = (await status(eye)).links
                    return (
                        len(
                            {
                                (each.source, each.target)
                                for each in links
                                if each.profile and not each.profile.estimated
                            }
                        )
                        == 12
                    )

                await until(measured)
                found = await status(eye)
                assert {each.name: each.state for each in found.compnodes} == dict.fromkeys(
                    ["a", "a-2", "quiet"], "idle"
                )
                assert found.broker == broker.status().broker
                assert all(each.reachable and each.profile is not None for each in found.links)
                pairs = {(each.source, each.target) for each in found.links}
                assert ("quiet", "a") in pairs, "the side that can be dialled is dialled"
                assert not [link for link in a.endpoint.links if link.peer != broker.status().broker], "probes end"
                again = await eye.request(MeasureLinks(), Status, timeout_s=60)
                assert len(again.links) == 12
                await a.close("enough")
                assert (await states(eye)) == {"a": "left", "a-2": "idle", "quiet": "idle"}
                assert {each.source for each in (await status(eye)).links} == {"a-2", "quiet", "broker"}

    asyncio.run(main())


def test_two_that_cannot_be_dialled_are_recorded(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path) as broker:
            token = broker.token()
            nowhere = {"advertise": ["127.0.0.1:9"]}
            async with (
                member_of(token, "a", listen=None),
                member_of(token, "b", **nowhere),
                member_of(token, "c", listen=None),
                observer_of(token, "eye", listen=None) as eye,
            ):

                async def settled() -> bool:
                    links = (await status(eye)).links
                    return len([each for each in links if each.profile is None or not each.profile.estimated]) == 12

                await until(settled)
                dead = {(each.source, each.target) for each in (await status(eye)).links if not each.reachable}
                among = {(one, other) for one in "abc" for other in "abc" if one != other}
                assert dead == among

    asyncio.run(main())


def test_a_vanished_compnode_is_lost_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path) as broker:
            token = broker.token()
            async with observer_of(token, "eye", listen=None) as eye, member_of(token, "a") as a:
                await a.endpoint.close()  # without a word

                async def lost() -> bool:
                    return (await states(eye))["a"] == "lost"

                await until(lost)

    asyncio.run(main())


def test_restart_keeps_key_port_members_and_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path) as broker:
            token, address = broker.token(), broker.address
            async with member_of(token, "gone"):
                pass
            stays = member_of(token, "a")
            member = await stays.__aenter__()
            away = member_of(token, "away")
            lost = await away.__aenter__()
        await lost.close()
        with pytest.raises(PeerLost):
            await status(member)
        await asyncio.sleep(0.3)
        async with broker_at(tmp_path) as broker:
            assert broker.address == address
            before = {each.name: each.state for each in broker.status().compnodes}
            assert before == {"a": "unreachable", "away": "unreachable", "gone": "left"}
            await until(lambda: {e.name: e.state for e in broker.status().compnodes}["a"] == "idle")
            assert member.name == "a"
            async with member_of(token, "new"):
                assert {each.name for each in broker.status().compnodes} == {"a", "away", "gone", "new"}
        await stays.__aexit__(None, None, None)

    asyncio.run(main())


def test_a_taken_port_is_replaced_unless_it_was_asked_for(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path / "one") as broker:
            port = int(broker.address.rpartition(":")[2])
        async with broker_at(tmp_path / "two", port=port):
            with pytest.raises(ConfigError, match=f"port {port}"):
                async with broker_at(tmp_path / "three", port=port):
                    pass
            async with broker_at(tmp_path / "one") as again:
                assert again.address != f"127.0.0.1:{port}"

    asyncio.run(main())


def test_who_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path / "a") as broker, broker_at(tmp_path / "b") as other:
            good = JoinToken.decode(broker.token())
            forged = JoinToken.issue(Identity.ephemeral(), good.addresses)
            with pytest.raises(TokenError, match="expired"):
                JoinToken.decode(broker.token(lifetime_s=0.001), now_s=good.expires_at_s)
            # Each is refused by the broker itself: a dishonest client skips the checks on its own side.
            stale = JoinToken.issue(broker._identity, good.addresses, lifetime_s=0.001)
            await asyncio.sleep(0.01)
            for bad, error, text in (
                (b"", TokenError, "a join token is needed"),
                (b"\xff", TokenError, "malformed"),
                (b"fusion-nonsense", TokenError, "malformed"),
                (stale.encode().encode(), TokenError, "expired"),
                (forged.encode().encode(), TokenError, "is for the broker"),
                (other.token().encode(), TokenError, "is for the broker"),
                (broker.token("spectator").encode(), TokenError, "role"),
            ):
                stranger = Endpoint(Identity.ephemeral(), Silent(), authorise=admit_all)
                with pytest.raises(error, match=text):
                    await stranger.connect(good.broker, good.addresses, credential=bad, timeout_s=60)
                await stranger.close()
            # The address of another broker: its key is not the token's.
            elsewhere = JoinToken.issue(broker._identity, [other.address])
            with pytest.raises(AuthenticationError, match="was to be reached"):
                async with member_of(elsewhere.encode(), "a"):
                    pass
            assert broker.status().compnodes == ()

    asyncio.run(main())


def test_the_unregistered_may_only_register(tmp_path: Path) -> None:
    async def main() -> None:
        async with broker_at(tmp_path) as broker:
            token = JoinToken.decode(broker.token())
            stranger = Endpoint(Identity.ephemeral(), Silent(), authorise=admit_all)
            link = await stranger.connect(
                token.broker, token.addresses, credential=broker.token().encode(), timeout_s=60
            )
            for message in (StatusQuery(), LeavePool("x")):
                with pytest.raises(AuthenticationError, match="not registered"):
                    await link.request(kind_of(message), encode(message), timeout_s=60)
            with pytest.raises(ProtocolError, match="malformed"):
                await link.request("broker.register_member", b"nonsense", timeout_s=60)
            with pytest.raises(ProtocolError, match="knows no request"):
                await link.request("broker.destroy", b"", timeout_s=60)
            await stranger.close()
            async with member_of(token.encode(), "a") as member:
                await member.send_bulk(GRAPH, b"0" * 64, b"x")  # which is for owners: the broker ends such a link
                await until(lambda: broker.status().compnodes[0].state == "lost")
                await until(lambda: broker.status().compnodes[0].state == "idle")

    asyncio.run(main())


def test_a_member_comes_back_with_a_token_that_has_expired(tmp_path: Path) -> None:
    async def main() -> None:
        identity = Identity.ephemeral()
        async with broker_at(tmp_path) as broker:
            token = JoinToken.decode(broker.token(lifetime_s=1.5))
            member = CompnodeMember(identity, token, MemberConfig(name="a"), profile=profile(), work=[])
            await member.start()
            await asyncio.sleep(1.6)
            link = member.endpoint.link(token.broker)
            assert link is not None
            await link.close("a broken line")
            await until(lambda: broker.status().compnodes[0].state == "lost")
            await until(lambda: broker.status().compnodes[0].state == "idle")
            await member.close()
            back = CompnodeMember(identity, token, MemberConfig(name="a"), profile=profile(), work=[])
            with pytest.raises(TokenError, match="expired"):
                await back.start()  # it left, so it needs a new one

    asyncio.run(main())
