"""Machines of a job in one process, on a scripted clock, that die when a script says so.

The driver, the hosts, the wire, the endpoints and their links are the real ones. Only the planes, the compute threads,
the network and the clock are twins, so a run of a few rounds takes milliseconds and always goes the same way.

    async with ScriptedPool("owner", "a", "b", "c") as pool:
        driver = await pool.launch(pipeline)
        pool.faults.at(Point("b", "sends boundary", round=1, nth=3), lambda other: pool.network.kill("b"))
        with pytest.raises(JobError, match="compnode b"):
            await pool.train(driver, steps=4)
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_plane import FakePlane, FakeProgram
from toy_pipelines import OPTIONS, OWNER, STATES, Pipeline, Start, batch

from fusionai.errors import NetworkError
from fusionai.graph.evaluation import faces
from fusionai.graph.model import WeightKey
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import Identity, PeerId
from fusionai.network.lab import EmulatedLink, LabConfig
from fusionai.network.limits import Limits
from fusionai.network.link import Link
from fusionai.network.memory import MemoryNetwork
from fusionai.network.memory_channel import CarriedMessage, Fate
from fusionai.pool.contacts import Contact
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobEpoch, JobId
from fusionai.pool.job_wire import JobWire
from fusionai.tensor import TensorData
from fusionai.training.compute import ProgramCall
from fusionai.training.driver import Driver, RoundResult
from fusionai.training.machine import Machine
from fusionai.training.messages import TRAINING_MESSAGES
from fusionai.training.roster import Roster
from fusionai.training.scripted_compute import ScriptedCompute, Transition
from fusionai.training.share import Share
from fusionai.training.stage_host import StageHost

JOB = JobId("toy")
LAN = LabConfig(default=EmulatedLink(rate_mbit=800, one_way_ms=1.0))
PREFIX = "train."


@cache
def identity_of(name: str) -> Identity:
    """The same key for the same name in every run, so that whatever sorts by it does so alike."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def peer_of(name: str) -> PeerId:
    """A machine's peer id."""
    return identity_of(name).peer_id


@dataclass(frozen=True)
class Point:
    """A moment in a run: the `nth` time, from 1, that a machine does something in a round.

    `event` is "sends KIND" or "gets KIND" for a message of the job (KIND without its prefix, such as "boundary"; an
    answer is "sends answer to KIND"), or what the machine's ledger counts: "delivered", "taken", "finished",
    "completed". `round` is -1 for messages of no round.
    """

    machine: str
    event: str
    round: int = -1
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.machine} {self.event} {self.nth} of round {self.round}"


@dataclass(frozen=True)
class Seen:
    """A point that a run came by."""

    point: Point
    other: str
    """The other end of a message; "" for a transition of the ledger."""


class _Numbered(msgspec.Struct):
    """What a message says of its round."""

    round: int = -1


class Faults:
    """What a script does at which point, and the points that the run has come by."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._counts: Counter[tuple[str, str, int]] = Counter()
        self._actions: dict[Point, Callable[[str], object]] = {}
        self.fired: list[Point] = []

    def at(self, point: Point, action: Callable[[str], object]) -> None:
        """Do something at a point; the action gets the other end of a message.

        At "sends" the message has not left yet, at "gets" the receiver has not seen it yet.
        """
        self._actions[point] = action

    def come_by(self, machine: str, event: str, round: int, other: str = "") -> None:
        """Count an event, and do what is due."""
        self._counts[machine, event, round] += 1
        point = Point(machine, event, round, self._counts[machine, event, round])
        self.seen.append(Seen(point, other))
        if point in self._actions:
            self.fired.append(point)
            self._actions.pop(point)(other)


class ScriptedMachine:
    """A machine: its endpoint's handler, its wire, and its hosts by epoch."""

    def __init__(self, pool: ScriptedPool, name: str, limits: Limits) -> None:
        self.name = name
        self.pool = pool
        self.identity = identity_of(name)
        self.peer = self.identity.peer_id
        self.plane = FakePlane()
        self.hosts: dict[Epoch, StageHost] = {}
        self.ended: list[str] = []
        """Reasons with which hosts ended by themselves."""
        self.endpoint = Endpoint(
            self.identity,
            self,
            authorise=self._authorise,
            limits=limits,
            name=name,
            transport=pool.network.transport(name, self.peer, limits),
        )
        self.wire = JobWire(self.endpoint, [TRAINING_MESSAGES])
        self.address = ""

    @property
    def alive(self) -> bool:
        """Whether no script has killed it."""
        return self.pool.network.alive(self.name)

    @property
    def program(self) -> FakeProgram:
        """The program that was made last."""
        return self.plane.programs[-1]

    async def hold(self, share: Share, roster: Roster, **options: Any) -> StageHost:
        """Take part in a job."""
        compute = partial(
            ScriptedCompute,
            duration_s=lambda call: self.pool.duration_s(self.name, call),
            alive=lambda: self.alive,
            on_transition=self._on_transition,
        )
        options = {"limit_bytes": 1 << 30, "on_end": self._on_end, "compute": compute, **options}
        host = await StageHost.create(share, roster, self.plane, self.wire, **options)
        self.hosts[roster.epoch] = host
        return host

    async def _on_end(self, reason: str) -> None:
        self.ended.append(reason)

    def _on_transition(self, transition: Transition) -> None:
        self.pool.faults.come_by(self.name, transition.kind, transition.round)

    async def _authorise(self, peer: PeerId, credential: bytes) -> None:
        pass

    # --- handler of the endpoint ------------------------------------------------------------------------------

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        return await self.wire.on_request(link, kind, payload)

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        await self.wire.on_notice(link, kind, payload)

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        await self.wire.on_bulk(link, kind, header, body)

    async def on_link(self, link: Link) -> None:
        pass

    async def on_close(self, link: Link, error: NetworkError) -> None:
        await self.wire.on_peer_closed(link.peer, error)


class ScriptedPool:
    """Machines that are linked to the owner, and to each other once a job needs it."""

    def __init__(
        self,
        *names: str,
        lab: LabConfig = LAN,
        limits: Limits | None = None,
        duration_s: Callable[[str, ProgramCall], float] = lambda machine, call: 0.005,
    ) -> None:
        """`duration_s` tells how long a machine takes for a call to its program."""
        self.network = MemoryNetwork(lab)
        self.network.on_send = self._on_send
        self.network.on_arrival = self._on_arrival
        self.faults = Faults()
        self.fate: Callable[[CarriedMessage], Fate | None] = lambda message: None
        """What becomes of messages, where no fault is due."""
        self.duration_s = duration_s
        self._names = names
        self._limits = limits or Limits()
        self.machines: dict[str, ScriptedMachine] = {}
        self._drivers: list[Driver] = []
        self._callers: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> ScriptedPool:
        self._callers = asyncio.all_tasks()
        for name in self._names:
            machine = self.machines[name] = ScriptedMachine(self, name, self._limits)
            machine.address = await machine.endpoint.listen()
        for machine in self.machines.values():
            if machine.name != OWNER:
                await self.owner.endpoint.connect(machine.peer, [machine.address], timeout_s=5)
                await machine.endpoint.wait_for_link(self.owner.peer, 5)
        return self

    async def __aexit__(self, *details: object) -> None:
        self.network.on_send = self.network.on_arrival = None
        for driver in self._drivers:
            closing = asyncio.ensure_future(driver.close("the test is over"))
            await asyncio.wait({closing}, timeout=5)
            closing.cancel()  # on a dead machine it waits for ever
        for machine in self.machines.values():
            for host in machine.hosts.values():
                await host.close("the test is over")
        await self.until(lambda: not self.holding(), within_s=5)  # a share that is ending already
        for machine in self.machines.values():
            await machine.endpoint.close()
        await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()} - self._callers
        assert not left, f"tasks are left: {left}"
        broken = {name: machine.plane.broken for name, machine in self.machines.items() if machine.plane.broken}
        assert not broken, f"programs were called against their contract: {broken}"

    @property
    def owner(self) -> ScriptedMachine:
        return self.machines[OWNER]

    def _on_send(self, message: CarriedMessage) -> Fate | None:
        self._come_by(message, message.source, "sends", message.target)
        return self.fate(message)

    def _on_arrival(self, message: CarriedMessage) -> None:
        self._come_by(message, message.target, "gets", message.source)

    def _come_by(self, message: CarriedMessage, machine: str, verb: str, other: str) -> None:
        if not message.kind.startswith(PREFIX):
            return
        kind = message.kind.removeprefix(PREFIX)
        if message.frame.name in ("ANSWER", "FAILURE"):
            self.faults.come_by(machine, f"{verb} answer to {kind}", -1, other)
        else:
            try:
                number = msgspec.msgpack.decode(message.content, type=_Numbered).round
            except msgspec.MsgspecError:
                number = -1  # a test sends nonsense
            self.faults.come_by(machine, f"{verb} {kind}", number, other)

    # --- jobs -------------------------------------------------------------------------------------------------

    def assignment(
        self, pipeline: Pipeline, name: str, epoch: Epoch = FIRST_EPOCH, **changes: Any
    ) -> tuple[Share, Roster]:
        """What a machine holds of a pipeline, and who holds the rest; `changes` are of the roster."""
        sums = pipeline.tied()
        own = pipeline.of(name)
        keys = {weight.key for subdag in own for weight in subdag.weights}
        around = {OWNER} if name != OWNER else set(pipeline.machines)
        for part in (part for subdag in own for part in faces(subdag)):
            around |= {pipeline.holders[each.target] for each in part.sends}
            around |= {pipeline.holders[each.source] for each in part.receives}
        around |= {holder for key, holders in sums.items() if key in keys for holder in holders}
        in_flight = {subdag.index: pipeline.in_flight.get(subdag.index, 2) for subdag in own}
        fields: dict[str, Any] = {
            "job": JOB,
            "epoch": epoch,
            "owner": self.owner.peer,
            "driver": self.owner.peer,
            "pipelines": (tuple(peer_of(holder) for holder in pipeline.holders),),
            "sums": {key: tuple(map(peer_of, holders)) for key, holders in sums.items() if key in keys},
            "neighbours": tuple(self.contact(name, other) for other in sorted(around - {name})),
        }
        return Share(JOB, own, in_flight, OPTIONS, 0), Roster(**{**fields, **changes})

    def contact(self, name: str, other: str) -> Contact:
        """How a machine reaches another one: the one with the smaller name dials."""
        return Contact(peer_of(other), other, (self.machines[other].address,), name < other)

    def driver(self, pipeline: Pipeline, epoch: Epoch = FIRST_EPOCH) -> Driver:
        """The driver of a job whose machines hold their shares already."""
        machines = [Machine(peer_of(name), name, pipeline.of(name)) for name in pipeline.machines]
        driver = Driver(
            JobEpoch(JOB, epoch),
            self.owner.wire,
            pipeline.graph,
            machines,
            privacy="open",
            gradient_clip=1.0,
            clipping=self.owner.plane.clipping,
        )
        self._drivers.append(driver)
        return driver

    async def launch(
        self, pipeline: Pipeline, epoch: Epoch = FIRST_EPOCH, *, prepare: bool = True, handing: Pipeline | None = None
    ) -> Driver:
        """Have all machines hold their shares, and load them. `handing` is the plan whose weights a new one takes."""
        names = dict.fromkeys(pipeline.machines)
        for name in names:
            changes: dict[str, Any] = {}
            if handing is not None:
                others = sorted({*handing.machines, *pipeline.machines} - {name})
                changes["handing"] = tuple(self.contact(name, other) for other in others)
            await self.machines[name].hold(*self.assignment(pipeline, name, epoch, **changes))
        driver = self.driver(pipeline, epoch)
        if prepare:
            await driver.prepare(Start(), optimizer_states=())
        return driver

    async def train(
        self, driver: Driver, steps: int, *, first: int = 0, microbatches: int = 2, rate: float = 0.125
    ) -> list[RoundResult]:
        """Run steps; what went before an error is lost to the caller, so count with `applied`."""
        results = []
        for step in range(first, first + steps):
            weights = [1 / microbatches] * microbatches
            results.append(await driver.train_step(step, batch(step, microbatches), weights, rate))
        return results

    async def tensors(self, driver: Driver) -> dict[tuple[str, str | None], bytes]:
        """Every weight and its state, pulled."""
        found: dict[tuple[str, str | None], bytes] = {}

        async def sink(key: WeightKey, state: str | None, tensor: TensorData) -> None:
            assert (key, state) not in found
            found[key, state] = bytes(tensor.data)

        await driver.pull(STATES, sink)
        return found

    def holding(self) -> list[str]:
        """Names of the living machines that still take messages of a job, hold a program, or run tasks for it."""
        return [
            name
            for name, machine in self.machines.items()
            if machine.alive
            and (
                machine.wire._receivers
                or any(not program.closed for program in machine.plane.programs)
                or any(host._tasks for host in machine.hosts.values())
            )
        ]

    async def until(self, condition: Callable[[], object], within_s: float) -> float:
        """Wait until something is true; return the scripted seconds that it took."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while not condition():
            assert loop.time() < began_s + within_s, f"not so within {within_s} s"
            await asyncio.sleep(0.01)
        return loop.time() - began_s
