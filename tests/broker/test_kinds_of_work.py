"""A second kind of work, a few lines long, beside training on one machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack

import msgspec
import pytest
from broker_pool import graph, plane, profile, until
from job_party import OPTIONS, Start, batch

from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import JobError, NetworkError, PlacementError, ProtocolError
from fusionai.graph.cuts import cut
from fusionai.network.identity import Identity, PeerId
from fusionai.network.token import JoinToken
from fusionai.owner.membership import OwnerMember
from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobEpoch, JobId
from fusionai.pool.job_wire import JobWire, MessageKinds
from fusionai.pool.member import MemberConfig
from fusionai.tensor import DType, TensorData
from fusionai.training.assignment_parcels import Assignment, pack
from fusionai.training.driver import Driver
from fusionai.training.machine import Machine
from fusionai.training.messages import BeginRound
from fusionai.training.roster import Roster
from fusionai.training.share import Share
from fusionai.training.stage_host import StageHost
from fusionai.training.training_work import TrainingWork

MIB = 1 << 20
TRAINING, ECHO = JobEpoch(JobId("training"), FIRST_EPOCH), JobEpoch(JobId("echo"), FIRST_EPOCH)


class EchoQuestion(msgspec.Struct, frozen=True, tag="echo.question"):
    job: JobId
    epoch: Epoch
    text: str


class EchoTensor(msgspec.Struct, frozen=True, tag="echo.tensor"):
    job: JobId
    epoch: Epoch
    dtype: DType
    shape: tuple[int, ...]


class EchoShare(msgspec.Struct, frozen=True):
    job: JobId
    epoch: Epoch
    driver: str
    memory_bytes: int
    contacts: tuple[Contact, ...]

    @property
    def plan(self) -> JobEpoch:
        return JobEpoch(self.job, self.epoch)


class EchoHost:
    description = "echo"
    busy_s = 0.0
    bytes_sent: Mapping[str, int] = {}

    def __init__(self, share: EchoShare, wire: JobWire, limit_bytes: int, on_end: Callable[[str], Awaitable[None]]):
        self.memory_bytes, self.limit_bytes = share.memory_bytes, limit_bytes
        self.tensors: list[TensorData] = []
        self._share, self._wire, self._on_end = share, wire, on_end
        wire.attach(share.plan, self)

    def limit_memory(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes

    async def close(self, reason: str) -> None:
        self._wire.detach(self._share.plan, self)

    def takes(self, message: object) -> bool:
        return isinstance(message, EchoQuestion | EchoTensor)

    async def on_control(self, peer: PeerId, message: EchoQuestion) -> bytes:
        return message.text.encode()

    async def on_tensor(self, peer: PeerId, header: EchoTensor, tensor: TensorData) -> None:
        self.tensors.append(tensor)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        await self.close(str(error))
        await self._on_end(str(error))


class EchoWork:
    """All that a kind of work is, apart from its host and its messages."""

    name = "echo"
    messages = MessageKinds("echo.", (EchoQuestion,), (EchoTensor,))

    def unpack(self, packed: bytes) -> EchoShare:
        return msgspec.msgpack.decode(packed, type=EchoShare)

    async def host(
        self, work: EchoShare, wire: JobWire, *, limit_bytes: int, on_end: Callable[[str], Awaitable[None]]
    ) -> EchoHost:
        return EchoHost(work, wire, limit_bytes, on_end)


class Pair:
    """An owner that is linked to a compnode, which does both kinds of work; no broker is needed for that."""

    def __init__(self) -> None:
        token = JoinToken.issue(Identity.ephemeral(), ["127.0.0.1:1"])
        torch, device = plane(), profile(64 * MIB)
        self.clipping = torch.clipping
        self.compnode = CompnodeMember(
            Identity.ephemeral(),
            token,
            MemberConfig(name="a"),
            profile=device,
            work=[TrainingWork(torch), EchoWork()],
        )
        self.owner = OwnerMember(Identity.ephemeral(), token, MemberConfig(name="owner"), profile=device, plane=torch)
        self.dag = graph()
        self.contacts = (Contact(self.owner.identity.peer_id, "owner", (), dial=False),)
        self.peer = self.compnode.identity.peer_id

    async def hold_training(self, memory_bytes: int = 8 * MIB) -> StageHost:
        share = Share(TRAINING.job, tuple(cut(self.dag, ())), {0: 2}, OPTIONS, memory_bytes)
        owner = self.owner.identity.peer_id
        roster = Roster(TRAINING.job, TRAINING.epoch, owner, owner, ((self.peer,),), {}, self.contacts)
        await self.compnode.hosting.assign(TRAINING, "training", pack(Assignment(share, roster)))
        host = self.compnode.hosting.host(TRAINING)
        assert isinstance(host, StageHost)
        return host

    async def hold_echo(self, plan: JobEpoch = ECHO, memory_bytes: int = 8 * MIB) -> EchoHost:
        share = EchoShare(plan.job, plan.epoch, self.owner.identity.peer_id, memory_bytes, self.contacts)
        await self.compnode.hosting.assign(plan, "echo", msgspec.msgpack.encode(share))
        host = self.compnode.hosting.host(plan)
        assert isinstance(host, EchoHost)
        return host

    async def link(self) -> None:
        address = await self.compnode.endpoint.listen()
        await self.owner.endpoint.connect(self.peer, [address], timeout_s=60)


def play(scene: Callable[[Pair], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack, asyncio.timeout(60):
            pair = Pair()
            stack.push_async_callback(pair.owner.close)
            stack.push_async_callback(pair.compnode.close)
            await scene(pair)

    asyncio.run(main())


def test_two_kinds_of_work_beside_each_other() -> None:
    async def scene(pair: Pair) -> None:
        await pair.hold_training()
        echo = await pair.hold_echo()
        assert [(each.job, each.line) for each in pair.compnode.holds] == [
            ("training", "stage 0: layers.0-3, loss"),
            ("echo", "echo"),
        ]
        await pair.link()
        machine = Machine(pair.peer, "a", tuple(cut(pair.dag, ())))
        driver = Driver(
            TRAINING, pair.owner.wire, pair.dag, [machine], privacy="open", gradient_clip=0.5, clipping=pair.clipping
        )
        await driver.prepare(Start())
        first = await driver.train_step(0, batch(0), [0.5, 0.5], 1e-2)
        question = EchoQuestion(ECHO.job, ECHO.epoch, "is anybody there?")
        assert await pair.owner.wire.request(pair.peer, question, timeout_s=60) == b"is anybody there?"
        tensor = TensorData("float32", (2,), bytearray(8))
        await pair.owner.wire.send(pair.peer, EchoTensor(ECHO.job, ECHO.epoch, "float32", (2,)), tensor)
        second = await driver.train_step(1, batch(0), [0.5, 0.5], 1e-2)
        assert second.loss < first.loss
        assert [each.shape for each in echo.tensors] == [(2,)]
        # The end of one kind of work is not the other's.
        await driver.close("the test is over")
        assert await pair.owner.wire.request(pair.peer, question, timeout_s=60) == b"is anybody there?"
        await until(lambda: [each.job for each in pair.compnode.holds] == ["echo"])

    play(scene)


def test_a_message_of_another_kind_of_work_reaches_nobody() -> None:
    """The job and epoch are right, but its host takes other messages."""

    async def scene(pair: Pair) -> None:
        await pair.hold_training()
        await pair.hold_echo()
        await pair.link()
        for message in (
            EchoQuestion(TRAINING.job, TRAINING.epoch, "?"),
            BeginRound(ECHO.job, ECHO.epoch, 0, 0, True, {}, (1.0,)),
        ):
            with pytest.raises(ProtocolError, match="no part in"):
                await pair.owner.wire.request(pair.peer, message, timeout_s=60)

    play(scene)


def test_as_many_shares_as_memory_allows() -> None:
    """A machine of 64 MiB. Limits of all shares together never exceed it; one share alone may take it all."""

    async def scene(pair: Pair) -> None:
        training = await pair.hold_training(24 * MIB)
        assert training._rounds._limit_bytes == 64 * MIB
        echo = await pair.hold_echo(memory_bytes=8 * MIB)
        assert (training._rounds._limit_bytes, echo.limit_bytes) == (40 * MIB, 24 * MIB)
        third = JobEpoch(JobId("third"), FIRST_EPOCH)
        with pytest.raises(PlacementError, match=r"needs 34,603,008 bytes beside 33,554,432 that it holds"):
            await pair.hold_echo(third, memory_bytes=33 * MIB)
        await pair.hold_echo(third, memory_bytes=32 * MIB)
        assert (training._rounds._limit_bytes, echo.limit_bytes) == (24 * MIB, 8 * MIB)
        await pair.compnode.hosting.release(third, "over")
        await pair.compnode.hosting.release(TRAINING, "over")
        assert echo.limit_bytes == 64 * MIB

    play(scene)


def test_a_share_that_cannot_be_made_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(pair: Pair) -> None:
        training = await pair.hold_training(24 * MIB)
        seen: list[int] = []

        async def broken(self: EchoWork, work: EchoShare, wire: JobWire, **options: object) -> EchoHost:
            seen.append(training._rounds._limit_bytes)
            raise JobError("no program")

        monkeypatch.setattr(EchoWork, "host", broken)
        with pytest.raises(JobError, match="no program"):
            await pair.hold_echo(memory_bytes=8 * MIB)
        assert seen == [40 * MIB], "the first share gives way before the second is made"
        assert training._rounds._limit_bytes == 64 * MIB

    play(scene)


def test_what_hosting_refuses() -> None:
    async def scene(pair: Pair) -> None:
        await pair.hold_echo()
        with pytest.raises(JobError, match="works for job echo already"):
            await pair.hold_echo()
        with pytest.raises(JobError, match="no work of the kind 'dance'; it does training, echo"):
            await pair.compnode.hosting.assign(TRAINING, "dance", b"")
        later = JobEpoch(ECHO.job, Epoch(1))
        await pair.hold_echo(later)
        with pytest.raises(JobError, match="already"):
            await pair.hold_echo(JobEpoch(ECHO.job, Epoch(2)))
        for number in range(14):
            await pair.hold_echo(JobEpoch(JobId(f"job-{number}"), FIRST_EPOCH), memory_bytes=-(1 << 40))
        with pytest.raises(JobError, match="holds 16 shares of jobs already, which is the most"):
            await pair.hold_echo(JobEpoch(JobId("one too many"), FIRST_EPOCH), memory_bytes=0)

    play(scene)


def test_kinds_of_messages_begin_with_their_prefix() -> None:
    with pytest.raises(ValueError, match=r"echo\.question"):
        MessageKinds("other.", (EchoQuestion,), ())
