"""What members of a pool can do to each other and to its broker, over real sockets: nothing that lasts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from broker_pool import broker_at, first_plan, graph, member_of, owner_of, plane, states, status, submit, until
from msgspec.structs import replace

from fusionai.broker.broker import Broker
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import FusionError, JobError, NetworkError, PeerLost, ProtocolError
from fusionai.graph.model import OpDag, ValueName
from fusionai.network.identity import PeerId
from fusionai.owner.membership import OwnerMember
from fusionai.pool.identifiers import FIRST_EPOCH, JobId
from fusionai.pool.member import PoolMember
from fusionai.pool.messages import Heartbeat, HeldShare, JobEnded, JobLaunched, JobProgress, LinkProbed
from fusionai.scheduling.profile import LinkProfile
from fusionai.tensor import TensorData
from fusionai.training.messages import BeginRound, Boundary, Bulk, Control, ShareFailed, TiedGradient

MIB = 1 << 20


class Driver:
    """The owner's side of a job, as hostile as a test wants it: it sends what it likes, and keeps what comes."""

    def __init__(self, owner: OwnerMember, launched: JobLaunched) -> None:
        self.owner, self.launched = owner, launched
        self.failures: list[ShareFailed] = []
        self.closed: list[PeerId] = []
        owner.wire.attach(first_plan(launched), self)

    def takes(self, message: Control | Bulk) -> bool:
        return True

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        if isinstance(message, ShareFailed):
            self.failures.append(message)
        return b""

    async def on_tensor(self, peer: PeerId, header: Bulk, tensor: TensorData) -> None:
        pass

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        self.closed.append(peer)

    async def begin(self, *members: PoolMember, sizes: int = 2, microbatches: int = 1) -> None:
        message = BeginRound(self.launched.job, FIRST_EPOCH, 0, 0, True, {"s0": sizes}, (1.0,) * microbatches)
        for member in members:
            await self.owner.wire.notify(member.identity.peer_id, message)


class Pool:
    """A broker, an owner, and compnodes "a" and "b" that run the stages 0 and 1 of the owner's job."""

    broker: Broker
    owner: OwnerMember
    a: CompnodeMember
    b: CompnodeMember
    driver: Driver


def run_pool(folder: Path, play: Callable[[Pool], Awaitable[None]], dag: OpDag | None = None) -> None:
    """Launch a job and play a scene, in at most some minutes."""

    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(250):
            pool, torch = Pool(), plane()
            pool.broker = await stack.enter_async_context(broker_at(folder))
            token = pool.broker.token()
            pool.owner = await stack.enter_async_context(owner_of(token, with_plane=torch))
            pool.a = await stack.enter_async_context(member_of(token, "a", with_plane=torch))
            pool.b = await stack.enter_async_context(member_of(token, "b", with_plane=torch))
            launched = await submit(pool.owner, dag, cuts=(2,))
            if launched.plan.stages[0].peer != pool.a.identity.peer_id:
                pool.a, pool.b = pool.b, pool.a
            pool.driver = Driver(pool.owner, launched)
            await play(pool)

    asyncio.run(main())


def boundary(pool: Pool, *, round: int = 0, index: int = 0, source: int = 0, rows: int = 2) -> Boundary:
    """What stage 0 sends to stage 1."""
    job, value = pool.driver.launched.job, ValueName("h1")
    return Boundary(job, FIRST_EPOCH, round, index, value, source, 1, False, "float32", (rows, 8))


def zeros(header: Boundary | TiedGradient) -> TensorData:
    """A tensor for a header."""
    return TensorData(header.dtype, header.shape, bytes(4 * math.prod(header.shape)))


# --- an owner against a compnode -----------------------------------------------------------------------------


def test_sizes_that_explode_when_a_round_begins(tmp_path: Path) -> None:
    """The plan was made for two rows; the round then names a hundred million."""

    async def play(pool: Pool) -> None:
        await pool.driver.begin(pool.a, sizes=100_000_000)
        await until(lambda: pool.driver.failures)
        assert "this machine offers 1,073,741,824" in pool.driver.failures[0].text
        await until(lambda: pool.a.holds == ())

    run_pool(tmp_path, play)


def test_impossible_sizes(tmp_path: Path) -> None:
    async def play(pool: Pool) -> None:
        await pool.driver.begin(pool.a, sizes=-1)
        await until(lambda: pool.driver.failures)
        assert "negative size" in pool.driver.failures[0].text

    run_pool(tmp_path, play)


# --- a compnode against its neighbour ------------------------------------------------------------------------


def test_a_flood_before_the_round_is_held_back(tmp_path: Path) -> None:
    """A neighbour that sends ahead gets no further than its window, until the round begins or the job ends."""

    async def play(pool: Pool) -> None:
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for index in range(200):
                header = boundary(pool, index=index, rows=MIB // 32)
                await pool.a.wire.send(pool.b.identity.peer_id, header, zeros(header))
                sent += 1

        flooding = asyncio.create_task(flood())
        await until(lambda: sent)
        await asyncio.sleep(1)
        window_and_buffers = 64 + 32
        assert 1 <= sent <= window_and_buffers
        await pool.owner.request(JobEnded(pool.driver.launched.job, "cancelled", ""), None, timeout_s=60)
        await until(lambda: pool.b.holds == ())
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)

    run_pool(tmp_path, play)


def test_more_waiting_tensors_than_memory(tmp_path: Path) -> None:
    """Every tensor is due, but together they exceed what the machine offers."""

    async def play(pool: Pool) -> None:
        host = pool.b.hosting.host(first_plan(pool.driver.launched))
        assert host is not None
        host.limit_memory(8 * MIB)
        rows = MIB // 32
        await pool.driver.begin(pool.b, sizes=rows, microbatches=100)
        header = boundary(pool, rows=rows)
        for index in range(9):
            await pool.a.wire.send(pool.b.identity.peer_id, replace(header, index=index), zeros(header))
        await until(lambda: pool.driver.failures)
        assert "bytes wait for their turn here" in pool.driver.failures[0].text

    dag = graph()
    run_pool(tmp_path, play, dag)


def tied() -> OpDag:
    """The chain, its first and last weight tied."""
    dag = graph()
    first, *between, last = dag.weights
    return replace(dag, weights=(first, *between, replace(last, key=first.key)))


def test_tied_gradients_of_rounds_long_over_are_not_kept(tmp_path: Path) -> None:
    async def play(pool: Pool) -> None:
        job, host = pool.driver.launched.job, pool.b.hosting.host(first_plan(pool.driver.launched))
        assert host is not None
        await pool.driver.begin(pool.b)
        header = TiedGradient(job, FIRST_EPOCH, 0, dag.weights[0].key, "float32", (8, 8))
        for number in [*range(-50, 0), 0, 0]:
            await pool.a.wire.send(pool.b.identity.peer_id, replace(header, round=number), zeros(header))
        await until(lambda: len(host._rounds.exchange) == 1)
        await pool.a.endpoint.link(pool.b.identity.peer_id).ping(timeout_s=60)  # type: ignore[union-attr]
        assert len(host._rounds.exchange) == 1
        assert not pool.driver.failures

    dag = tied()
    run_pool(tmp_path, play, dag)


@pytest.mark.parametrize("shape", [(8,), (1024, 1024)])
def test_a_tied_gradient_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    async def play(pool: Pool) -> None:
        header = TiedGradient(pool.driver.launched.job, FIRST_EPOCH, 0, dag.weights[0].key, "float32", shape)
        await pool.a.wire.send(pool.b.identity.peer_id, header, zeros(header))
        await until(lambda: pool.driver.failures)
        assert any("but the weight is float32[8, 8]" in each.text for each in pool.driver.failures)

    dag = tied()
    run_pool(tmp_path, play, dag)


def test_a_broken_link_between_two_compnodes_ends_the_job_at_once(tmp_path: Path) -> None:
    """Both machines live, so nobody but they can tell the driver, which would wait for minutes."""

    async def play(pool: Pool) -> None:
        await pool.driver.begin(pool.b)
        header = boundary(pool, source=1)  # a stage that is not the sender's
        await pool.a.wire.send(pool.b.identity.peer_id, header, zeros(header))
        await until(lambda: pool.driver.failures)
        assert "its link to compnode" in pool.driver.failures[0].text
        assert not pool.driver.closed, "the driver's own links are whole"

    run_pool(tmp_path, play)


# --- members against the broker ------------------------------------------------------------------------------


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
            await broker._prober.settle(peers, timeout_s=10)
            found = broker._state.links.get(*peers)
            figures = [] if found is None else [each for each in (found.there, found.back) if each is not None]
            assert not figures, "nothing of what they say is kept"

    asyncio.run(main())


def test_an_infinite_throughput_does_not_keep_the_broker_from_restarting(tmp_path: Path) -> None:
    async def play(pool: Pool) -> None:
        pool.owner.tell(JobProgress(pool.driver.launched.job, 1, 2, 0.5, math.inf))
        await until(lambda: pool.owner._session._link is None)

    run_pool(tmp_path, play)

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


def test_heartbeats_of_a_member_that_does_not_listen_pile_nothing_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(250):
            broker = await stack.enter_async_context(broker_at(tmp_path))
            member = await stack.enter_async_context(member_of(broker.token(), "a"))
            link = broker._state.link(member.identity.peer_id)
            blocked = asyncio.Event()

            async def never(*_: object) -> None:
                await blocked.wait()

            link.notify = never  # type: ignore[method-assign]  # as when the member's window is full
            before = len(broker._state.tasks._tasks)
            beat = Heartbeat(
                0.0, 0, tuple(HeldShare(JobId(f"job-{number}"), FIRST_EPOCH, "") for number in range(16)), {}
            )
            for _ in range(200):
                member.tell(beat)
            await until(lambda: broker._state.registry.activity(member.identity.peer_id).holds)
            await asyncio.sleep(0.3)
            assert len(broker._state.tasks._tasks) <= before + 1
            blocked.set()

    asyncio.run(main())


def test_nobody_ends_the_job_of_another(tmp_path: Path) -> None:
    async def play(pool: Pool) -> None:
        async with owner_of(pool.broker.token(), with_plane=plane()) as thief:
            assert thief.name == "owner-2", "a name is its first bearer's"
            ended = JobEnded(pool.driver.launched.job, "finished", "")
            for hostile in (thief, pool.a):
                with pytest.raises(ProtocolError, match="owns no job"):
                    await hostile.request(ended, None, timeout_s=60)
        assert set((await states(pool.owner)).values()) == {"working"}

    run_pool(tmp_path, play)


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
                asyncio.create_task(link.request("broker.measure_links", payload, timeout_s=20)) for _ in range(12)
            ]
            await until(lambda: sum(each.done() for each in asked) == 8)
            assert broker._state.link(member.identity.peer_id)._answering._bytes <= 32 * MIB
            waiting.set()
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert sum(each == b"" for each in answers) == 4
            assert sum(isinstance(each, FusionError) for each in answers) == 8
            assert not any(isinstance(each, PeerLost) for each in answers)

    asyncio.run(main())
