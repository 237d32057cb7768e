"""A job on real members, in one process, whose owner goes over to other plans: for tests of new plans."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from broker_pool import broker_at, graph, member_of, owner_of, plane, states, submit

from fusionai.broker.broker import Broker
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.execution.plane import OptimizerConfig, ProgramOptions
from fusionai.graph.encoding import content_hash
from fusionai.graph.model import OpDag, WeightKey
from fusionai.owner.membership import OwnerMember
from fusionai.owner.plan_terms import PlanTerms
from fusionai.owner.replan_event import ReplanEvent
from fusionai.owner.running_job import RunningJob
from fusionai.pool.identifiers import Epoch, JobEpoch
from fusionai.pool.messages import JobLaunched, PlanPrepared
from fusionai.scheduling.evaluation import evaluated_one
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import TrainingProblem
from fusionai.scheduling.recovery import Patience
from fusionai.scheduling.replanning import Replanned
from fusionai.tensor import TensorData
from fusionai.training.corrections import Corrections, Drift
from fusionai.training.driver import Driver
from fusionai.training.machine import Machine

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
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        machines: tuple[str, ...] = (),
        compnodes: int = 0,
        allowed: bool = True,
        **options: Any,
    ) -> None:
        self._machines, self._compnodes, self._allowed = machines, compnodes, allowed
        self.offered: set[str] = set()
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._options = options
        self._stack = AsyncExitStack()
        self.dag: OpDag = graph()
        self.broker: Broker
        self.owner: OwnerMember
        self.members: dict[str, CompnodeMember] = {}
        self.launched: JobLaunched
        self.running: RunningJob
        self.done = 0
        self.losses: list[float] = []

    async def __aenter__(self) -> Party:
        enter = self._stack.enter_async_context
        self._folder.mkdir(exist_ok=True)
        self.broker = await enter(broker_at(self._folder))
        token, torch = self.broker.token(), plane()
        self.owner = await enter(owner_of(token, with_plane=torch))
        for name in "ab":
            self.members[name] = await enter(member_of(token, name, with_plane=torch, **self._options))
        self.launched = await submit(self.owner, self.dag, cuts=(2,), options=OPTIONS)
        self.members["c"] = await enter(member_of(token, "c", with_plane=torch, **self._options))
        terms = PlanTerms(
            graph=self.dag,
            graph_hash=content_hash(self.dag),
            sizes={"s0": 2},
            privacy="open",
            front=0,
            back=len(self.dag.nodes),
            options=OPTIONS,
            compnodes=self._compnodes,
            machines=self._machines,
            steps=100,
            microbatches=2,
            allowed=self._allowed,
        )
        self._monkeypatch.setattr("fusionai.scheduling.recovery.PATIENCE", Patience(least_left_s=0.0, pause_steps=0))
        self.running = RunningJob(terms, self.owner, self.launched, self.make_driver)
        await self.driver.prepare(Start())
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self.running.close("cancelled", "the test is over")
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
        return self.running.driver

    def make_driver(self, epoch: Epoch, machines: Sequence[Machine]) -> Driver:
        plan = JobEpoch(self.launched.job, epoch)
        return Driver(
            plan,
            self.owner.wire,
            self.dag,
            machines,
            privacy="open",
            gradient_clip=0.5,
            clipping=self.owner.plane.clipping,
        )

    async def steps(self, count: int) -> None:
        for _ in range(count):
            result = await self.driver.train_step(self.done, batch(self.done), [0.5, 0.5], 1e-2)
            self.losses.append(result.loss)
            self.running.observe(self.done, result)
            self.done += 1

    async def prepare(self, cuts: Sequence[int], names: Sequence[str]) -> PlanPrepared:
        """Have the broker prepare the plan that cuts there and runs on these."""

        def choose(problem: TrainingProblem, running: Plan, steps_left: int) -> Replanned:
            self.offered = {each.name for each in problem.members}
            machines = [problem.number_of[self.peer(name)] for name in names]
            plan = evaluated_one(problem, cuts, machines, running.microbatches).plan()
            return Replanned(plan, (), 0.0, 1.0, "the test wants it")

        self._monkeypatch.setattr("fusionai.broker.replanner.replanned", choose)
        drifted = (Drift(self.launched.plan.stages[0].peer, 2.0, 0),)
        with self._monkeypatch.context() as patch:
            patch.setattr(Corrections, "drifted", lambda corrections: drifted)
            assert await self.running.between_steps(self.done) is None
        asking = self.running.seeker.asking
        assert asking is not None
        await asyncio.wait({asking})
        return asking.result()

    async def until_planned(self, steps: int = 40) -> ReplanEvent:
        """Run steps as an owner does until a new plan is taken, or fails."""
        for _ in range(steps):
            await self.steps(1)
            if (event := await self.running.between_steps(self.done)) is not None:
                return event
            await asyncio.sleep(0.1)
        raise AssertionError("no new plan came")

    async def take(self) -> ReplanEvent:
        """Have the owner do with the prepared plan what it does between two steps."""
        event = await self.running.between_steps(self.done)
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
