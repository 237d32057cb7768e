"""A running job goes over to a plan chosen by the test: real broker, members, programs and sockets, in one process."""

from __future__ import annotations

import asyncio
import random
import re
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from broker_pool import broker_at, graph, member_of, plane, states, status, submit, until

from fusionai.broker.broker import Broker
from fusionai.broker.messages import JobEnded, Launched, Prepared, Switch
from fusionai.compnode.member import Member
from fusionai.errors import JobError, ProtocolError
from fusionai.execution.plane import OptimizerConfig, ProgramOptions
from fusionai.graph.model import OpDag, WeightKey
from fusionai.owner.machines import machines_of
from fusionai.owner.replanning import ReplanEvent, Replanning, ReplanTerms
from fusionai.scheduling.corrections import Corrections, Drift
from fusionai.scheduling.evaluation import Task, evaluate
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.replanning import Replanned
from fusionai.tensor import TensorData
from fusionai.training.driver import Driver, Machine
from fusionai.training.messages import HandOver, Inherit, JobId, Tensor
from fusionai.training.weight_traffic import WeightTraffic

OPTIONS = ProgramOptions(optimizer=OptimizerConfig(kind="adamw", weight_decay=0.01))
STATES = OPTIONS.optimizer.states
WEIGHT_BYTES = 8 * 8 * 4


def noise(key: str, rows: int) -> TensorData:
    draw = random.Random(key)
    numbers = [draw.gauss(0, 0.5) for _ in range(8 * rows)]
    return TensorData("float32", (rows, 8), bytearray(struct.pack(f"{8 * rows}f", *numbers)))


class Start:
    """The weights that training starts from."""

    def read(self, name: str) -> TensorData:
        return noise(name, 8)


def batch(step: int) -> list[dict[str, TensorData]]:
    return [{"x": noise(f"x{step}{index}", 2), "y": noise(f"y{step}{index}", 2)} for index in range(2)]


class Party:
    """A broker, an owner, three compnodes, and a job on the first two."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, machines: tuple[str, ...] = (), **options: Any
    ) -> None:
        self._machines = machines
        self.offered: set[str] = set()
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._options = options
        self._stack = AsyncExitStack()
        self.dag: OpDag = graph()
        self.broker: Broker
        self.owner: Member
        self.members: dict[str, Member] = {}
        self.launched: Launched
        self.replanning: Replanning
        self.done = 0
        self.losses: list[float] = []

    async def __aenter__(self) -> Party:
        enter = self._stack.enter_async_context
        self._folder.mkdir(exist_ok=True)
        self.broker = await enter(broker_at(self._folder))
        token, torch = self.broker.token(), plane()
        self.owner = await enter(member_of(token, "owner", "owner", with_plane=torch))
        for name in "ab":
            self.members[name] = await enter(member_of(token, name, with_plane=torch, **self._options))
        self.launched = await submit(self.owner, self.dag, cuts=(2,), options=OPTIONS)
        self.members["c"] = await enter(member_of(token, "c", with_plane=torch, **self._options))
        machines = machines_of(self.dag, self.launched.plan, self.launched.names)
        driver = self.make_driver(self.launched.job, machines)
        terms = ReplanTerms(
            graph=self.dag,
            front=0,
            back=len(self.dag.nodes),
            options=OPTIONS,
            compnodes=0,
            machines=self._machines,
            steps=100,
            microbatches=2,
            allowed=True,
        )
        self.replanning = Replanning(terms, self.owner, self.launched, driver, self.make_driver)
        self.owner.on_job_lost(self.launched.job, self.replanning.fail)
        self._monkeypatch.setattr("fusionai.owner.replanning.LEAST_LEFT_S", 0.0)
        self._monkeypatch.setattr("fusionai.owner.replanning.PAUSE_STEPS", 0)
        await self.driver.prepare(Start())
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self.replanning.close()
        await self.driver.close("the test is over")
        await self._stack.aclose()

    def peer(self, name: str) -> str:
        return self.owner.identity.peer_id if name == "owner" else self.members[name].identity.peer_id

    @property
    def first(self) -> str:
        """Name of the compnode with the job's first stage."""
        return next(name for name in "ab" if self.peer(name) == self.launched.plan.stages[0].peer)

    @property
    def second(self) -> str:
        return "b" if self.first == "a" else "a"

    @property
    def driver(self) -> Driver:
        return self.replanning.driver

    def make_driver(self, job: JobId, machines: Sequence[Machine]) -> Driver:
        assert self.owner.plane is not None
        return Driver(job, self.owner.wire, self.dag, machines, gradient_clip=0.5, clipping=self.owner.plane.clipping)

    async def steps(self, count: int) -> None:
        for _ in range(count):
            result = await self.driver.train_step(self.done, batch(self.done), [0.5, 0.5], 1e-2)
            self.losses.append(result.loss)
            self.replanning.observe(self.done, result)
            self.done += 1

    async def prepare(self, cuts: Sequence[int], names: Sequence[str]) -> Prepared:
        """Have the broker prepare the plan that cuts there and runs on these."""

        def choose(dag: OpDag, *, running: Plan, pool: Any, owner: Any, **other: Any) -> Replanned:
            self.offered = {each.name for each in pool.members}
            task = Task(
                graph=dag,
                graph_hash=running.graph_hash,
                sizes=running.sizes,
                microbatches=running.microbatches,
                optimizer_states=other["optimizer_states"],
                precision=other["precision"],
                pool=pool,
                owner=owner,
                privacy=running.privacy,
                front=other["front"],
                back=other["back"],
            )
            plan = evaluate(task, cuts, [self.peer(name) for name in names], running.microbatches).plan
            return Replanned(plan, (), 0.0, 1.0, "the test wants it")

        self._monkeypatch.setattr("fusionai.broker.replanning.replanned", choose)
        drifted = (Drift(self.launched.plan.stages[0].peer, 2.0, 0),)
        with self._monkeypatch.context() as patch:
            patch.setattr(Corrections, "drifted", lambda corrections: drifted)
            assert await self.replanning.between_steps(self.done) is None
        asking = self.replanning._asking
        assert asking is not None
        await asyncio.wait({asking})
        return asking.result()

    async def take(self) -> ReplanEvent:
        """Have the owner do with the prepared plan what it does between two steps."""
        event = await self.replanning.between_steps(self.done)
        assert event is not None
        return event

    async def weights(self) -> dict[tuple[str, str | None], bytes]:
        found: dict[tuple[str, str | None], bytes] = {}

        async def sink(key: WeightKey, state: str | None, tensor: TensorData) -> None:
            found[key, state] = bytes(tensor.data)

        await self.driver.pull(STATES, sink)
        return found

    async def states(self) -> dict[str, str]:
        return await states(self.owner)


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, course: Callable[[Party], Awaitable[None]], **options: Any
) -> tuple[list[float], dict[tuple[str, str | None], bytes]]:
    """Return the losses and the final weights and states of a course of events."""

    async def main() -> tuple[list[float], dict[tuple[str, str | None], bytes]]:
        async with Party(folder, monkeypatch, **options) as party:
            await course(party)
            return party.losses, await party.weights()

    return asyncio.run(main())


async def undisturbed(party: Party) -> None:
    await party.steps(6)


@pytest.mark.parametrize(
    ("cuts", "names", "moved"),
    [
        ((1,), ("first", "second"), 1),
        ((2,), ("second", "first"), 4),
        ((2,), ("c", "second"), 2),
        ((1, 3), ("first", "c", "second"), 2),
        ((), ("c",), 4),
        ((2,), ("first", "owner"), 2),
    ],
    ids=["one layer", "exchanged", "a newcomer for one", "a newcomer between", "all to a newcomer", "the owner"],
)
def test_nothing_but_the_places_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: tuple[int, ...], names: tuple[str, ...], moved: int
) -> None:
    async def course(party: Party) -> None:
        await party.steps(3)
        chosen = [{"first": party.first, "second": party.second}.get(name, name) for name in names]
        prepared = await party.prepare(cuts, chosen)
        assert prepared.generation == f"{party.launched.job}.1"
        await party.steps(1)  # the old generation steps on
        event = await party.take()
        assert (event.error, event.bytes_moved) == (None, moved * 3 * WEIGHT_BYTES)
        expected = {name: "working" if name in chosen else "idle" for name in "abc"}
        assert await party.states() == expected
        await party.steps(2)
        for name, member in party.members.items():
            held = [prepared.generation] if name in chosen else []
            await until(lambda member=member, held=held: list(member.holds) == held)  # type: ignore[misc]
        await asyncio.sleep(0.3)  # three heartbeats
        assert await party.states() == expected
        assert [each.state for each in (await status(party.owner)).jobs] == ["running"]

    losses, weights = run(tmp_path / "one", monkeypatch, course)
    expected_losses, expected_weights = run(tmp_path / "other", monkeypatch, undisturbed)
    assert losses == expected_losses
    assert weights == expected_weights
    assert any(any(data) for (_, state), data in weights.items() if state is not None)


def test_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def course(party: Party) -> None:
        await party.steps(2)
        for cuts, names in (((1,), ("a", "c")), ((3,), ("c", "b")), ((2,), ("b", "a"))):
            await party.prepare(cuts, names)
            assert (await party.take()).error is None
            await party.steps(1)
        await party.steps(1)
        await party.owner.request(JobEnded(party.launched.job, "finished", ""), None, timeout_s=5)
        assert await party.states() == dict.fromkeys("abc", "idle")

    losses, _ = run(tmp_path / "one", monkeypatch, lambda party: ended(party, course))
    assert losses == run(tmp_path / "other", monkeypatch, undisturbed)[0]


async def ended(party: Party, course: Callable[[Party], Awaitable[None]]) -> None:
    await course(party)
    for member in party.members.values():
        await until(lambda member=member: not member.holds)  # type: ignore[misc]

    async def nothing() -> dict[tuple[str, str | None], bytes]:
        return {}

    party.weights = nothing  # type: ignore[method-assign]


def test_a_newcomer_that_dies_in_the_hand_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies after the first tensor came; the job goes on with the old plan, and computes what it should."""

    async def course(party: Party) -> None:
        await party.steps(3)
        prepared = await party.prepare((2,), (party.first, "c"))
        take = WeightTraffic.take
        came = 0
        closing: list[asyncio.Future[None]] = []

        async def dying(self: WeightTraffic, peer: Any, header: Tensor, tensor: TensorData) -> None:
            nonlocal came
            if header.job == prepared.generation and self._wire.me == party.peer("c"):
                came += 1
                if came == 2:
                    closing.append(asyncio.ensure_future(party.members["c"].endpoint.close()))
                    await asyncio.sleep(1)
            await take(self, peer, header, tensor)

        monkeypatch.setattr(WeightTraffic, "take", dying)
        event = await party.take()
        assert event.error is not None
        gone = f"c .*ended the link|compnode c|no link to {party.peer('c')[:12]}"
        assert re.search(gone, event.error)
        monkeypatch.setattr(WeightTraffic, "take", take)
        await party.driver.check()
        await party.steps(3)
        for name in "ab":
            await until(lambda name=name: list(party.members[name].holds) == [party.launched.job])  # type: ignore[misc]
        found = await party.states()
        assert (found["a"], found["b"]) == ("working", "working")

    disturbed = run(tmp_path / "one", monkeypatch, course)
    assert disturbed == run(tmp_path / "other", monkeypatch, undisturbed)


def test_a_machine_of_the_running_plan_that_dies_in_the_hand_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with Party(tmp_path, monkeypatch) as party:
            await party.steps(2)
            prepared = await party.prepare((2,), (party.first, "c"))
            take = WeightTraffic.take
            closing: list[asyncio.Future[None]] = []

            async def dying(self: WeightTraffic, peer: Any, header: Tensor, tensor: TensorData) -> None:
                if header.job == prepared.generation and self._wire.me == party.peer("c"):
                    closing.append(asyncio.ensure_future(party.members[party.second].endpoint.close()))
                    await asyncio.sleep(1)
                await take(self, peer, header, tensor)

            monkeypatch.setattr(WeightTraffic, "take", dying)

            async def go_on() -> None:
                assert (await party.take()).error, "or its loss is noticed at once"
                await party.steps(1)

            with pytest.raises(JobError, match=f"compnode {party.second} .stage 1. is lost"):
                await go_on()
            assert (await party.states())["c"] == "idle"

    asyncio.run(main())


def test_a_newcomer_that_goes_before_the_hand_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def course(party: Party) -> None:
        await party.steps(3)
        prepared = await party.prepare((2,), (party.first, "c"))
        assert (await party.states())["c"] == "working"
        await party.members["c"].close()
        assert (await party.take()).error is not None
        assert prepared.generation is not None
        with pytest.raises(JobError, match=r"no plan .* is prepared"):
            await party.owner.request(Switch(party.launched.job, prepared.generation), None, timeout_s=5)
        await party.steps(3)

    assert run(tmp_path / "one", monkeypatch, course) == run(tmp_path / "other", monkeypatch, undisturbed)


@pytest.mark.parametrize(("machines", "offered"), [((), {"a", "b", "c"}), (("a", "b"), {"a", "b"})])
def test_only_named_machines_are_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: tuple[str, ...], offered: set[str]
) -> None:
    async def course(party: Party) -> None:
        await party.steps(1)
        await party.prepare((1,), (party.first, party.second))
        assert party.offered == offered
        assert (await party.take()).error is None
        await party.steps(5)

    found = run(tmp_path / "one", monkeypatch, course, machines=machines)
    assert found == run(tmp_path / "other", monkeypatch, undisturbed)


def test_a_share_must_fit_beside_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def course(party: Party) -> None:
        need = sum(stage.predicted.memory_bytes for stage in party.launched.plan.stages_of(party.peer(party.first)))
        assert need <= 5000 < 2 * need, need
        await party.steps(1)
        prepared = await party.prepare((2,), (party.first, party.second))
        assert prepared.generation is None
        assert "beside each other" in prepared.reason
        assert await party.replanning.between_steps(party.done) is None
        await party.steps(5)

    run(tmp_path, monkeypatch, course, memory_bytes=5000)


def test_weights_come_only_from_whom_the_owner_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Party(tmp_path, monkeypatch) as party:
            await party.steps(1)
            prepared = await party.prepare((2,), (party.first, "c"))
            assert prepared.generation is not None
            c, key = party.members["c"], WeightKey("layers.2.weight")
            named = {key: party.peer(party.second), WeightKey("layers.3.weight"): party.peer(party.second)}
            with pytest.raises(ProtocolError, match="sources of 1 weights"):
                await party.owner.wire.request(
                    c.identity.peer_id, Inherit(prepared.generation, {key: party.peer("a")}), timeout_s=5
                )
            with pytest.raises(ProtocolError, match="no machine of this job"):
                await party.owner.wire.request(
                    c.identity.peer_id, Inherit(prepared.generation, dict.fromkeys(named, "f" * 64)), timeout_s=5
                )
            await party.owner.wire.request(c.identity.peer_id, Inherit(prepared.generation, named), timeout_s=5)
            with pytest.raises(ProtocolError, match="which is not the driver"):
                await party.members[party.second].wire.request(
                    c.identity.peer_id, HandOver(prepared.generation, prepared.generation, {}), timeout_s=5
                )
            host = c.host(prepared.generation)
            assert host is not None
            weight = noise("w", 8)
            header = Tensor(prepared.generation, key, None, "float32", (8, 8))
            with pytest.raises(ProtocolError, match="to send"):
                await host.on_tensor(party.owner.identity.peer_id, header, weight)
            second = party.members[party.second].identity.peer_id
            with pytest.raises(ProtocolError, match="float32"):
                await host.on_tensor(second, header, noise("w", 4))
            with pytest.raises(ProtocolError, match="twice"):
                await host.on_tensor(second, header, weight)

    asyncio.run(main())
