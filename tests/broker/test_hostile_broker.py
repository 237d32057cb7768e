"""A broker that wants to read a private job: whatever it plans, the job ends, and nothing private has left the owner.

The broker, the compnodes and the owner are real, and talk over sockets in this process. Every frame that goes to
anybody but the owner is recorded and searched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from broker_pool import broker_at, member_of, owner_of, plane
from msgspec.structs import replace
from torch import Tensor, nn

from fusionai.broker import launching
from fusionai.broker.broker import Broker
from fusionai.compnode.compnode_member import CompnodeMember
from fusionai.errors import FusionError, JobError
from fusionai.execution.plane import OptimizerConfig
from fusionai.graph.capture import Captured, capture
from fusionai.graph.cuts import cut
from fusionai.graph.model import Node, OpDag, Ref, ValueName
from fusionai.graph.privacy import arrange_private
from fusionai.network.connection import Connection
from fusionai.network.identity import PeerId
from fusionai.network.messages import encode
from fusionai.owner import running_job, training_run
from fusionai.owner.checkpointing import CheckpointFiles
from fusionai.owner.membership import OwnerMember
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.stop_request import StopRequest
from fusionai.owner.training_job import Observer, StepEvent, TrainingJob, TrainingResult
from fusionai.pool.identifiers import FIRST_EPOCH, JobEpoch
from fusionai.pool.messages import JobLaunched
from fusionai.scheduling.plan import Plan, StagePlan
from fusionai.scheduling.recovery import Patience
from fusionai.scheduling.replanning import Replanned
from fusionai.training.assignment_parcels import Assignment, pack
from fusionai.training.config import PlacementConfig, TrainingConfig
from fusionai.training.corrections import Corrections, Drift
from fusionai.training.data.batches import TensorBatches
from fusionai.training.driver import Driver
from leaks import leaks

VOCABULARY, WIDTH, BATCH, LENGTH = 97, 8, 2, 16


class Net(nn.Module):
    """Tokens, of which some are replaced before they are looked up, four layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.embedding(input_ids.clamp(min=1))
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), labels.flatten())


def batch(step: int, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7 * step + index)
    ids, labels = torch.randint(1, VOCABULARY, (2, BATCH, LENGTH), generator=generator)
    return {"input_ids": ids.clone(), "labels": labels.clone()}


@cache
def captured() -> Captured:
    return capture(Net().train(), batch(0, 0))


@cache
def arranged() -> tuple[OpDag, int, int]:
    return arrange_private(captured().graph)


# --- the pool, and what leaves the owner ------------------------------------------------------------------------------


@dataclass
class Wiretap:
    """All that is sent to machines other than the owner's."""

    owner: str = ""
    sent: bytearray = field(default_factory=bytearray)

    def found(self) -> set[str]:
        """Names of the inputs of which a row was sent to anybody, in any form."""
        return {name for step in range(4) for index in range(2) for name in leaks(self.sent, batch(step, index))}


@pytest.fixture
def wiretap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    tap = Wiretap()
    send, send_large = Connection.send, Connection.send_large

    def recorded(self: Connection, kind: Any, header: Any, payload: Any = b"") -> int:
        if self.peer != tap.owner:
            tap.sent += encode(header) + bytes(payload)
        return send(self, kind, header, payload)

    async def recorded_large(self: Connection, kind: Any, raw: bytes, body: memoryview) -> int:
        if self.peer != tap.owner and bytes(body).strip(b"\0"):  # probes of links send zeros
            tap.sent += raw + bytes(body)
        return await send_large(self, kind, raw, body)

    monkeypatch.setattr(Connection, "send", recorded)
    monkeypatch.setattr(Connection, "send_large", recorded_large)
    return tap


class Steps(Observer):
    """Counts steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def stepped(self, event: StepEvent) -> None:
        self.losses.append(event.loss)


@dataclass
class Scene:
    """A pool of two compnodes, and an owner with a job."""

    folder: Path
    broker: Broker
    owner: OwnerMember
    compnodes: list[CompnodeMember]
    steps: Steps = field(default_factory=Steps)

    @property
    def me(self) -> PeerId:
        return self.owner.identity.peer_id

    async def train(self, **placement: Any) -> TrainingResult:
        """Train four steps of two microbatches, private unless `placement` says otherwise."""
        job = TrainingJob(
            name="net",
            graph=captured().graph,
            weights=captured(),
            batches=TensorBatches(batch),
            files=CheckpointFiles(),
            tokens_per_step=BATCH * LENGTH,
            description="",
            training=TrainingConfig(steps=4, microbatches=2, learning_rate=0.1),
            optimizer=OptimizerConfig(kind="sgd"),
            placement=PlacementConfig(**placement),
        )
        return await training_run.train(job, self.owner, RunFolder(self.folder / "run"), StopRequest(), self.steps)


@asynccontextmanager
async def scene(folder: Path, tap: Wiretap) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack, asyncio.timeout(250):
        broker, torch_plane = await stack.enter_async_context(broker_at(folder)), plane()
        owner = await stack.enter_async_context(owner_of(broker.token(), with_plane=torch_plane))
        tap.owner = owner.identity.peer_id
        compnodes = [
            await stack.enter_async_context(member_of(broker.token(), each, with_plane=torch_plane)) for each in "ab"
        ]
        yield Scene(folder, broker, owner, compnodes)


def refused(folder: Path, tap: Wiretap, **placement: Any) -> tuple[str, Steps]:
    """Train on a pool whose broker is hostile; return the error's text, and the steps done before."""

    async def main() -> tuple[str, Steps]:
        async with scene(folder, tap) as there:
            with pytest.raises(JobError) as caught:
                await there.train(**placement)
            return str(caught.value), there.steps

    return asyncio.run(main())


# --- hostile plans ----------------------------------------------------------------------------------------------------

Spoil = Callable[[Plan], Plan]


def with_stages(plan: Plan, stages: Sequence[StagePlan]) -> Plan:
    numbered = tuple(replace(stage, stage=number) for number, stage in enumerate(stages))
    return replace(plan, pipelines=(replace(plan.only_pipeline(), stages=numbered),))


def other_than_owner(plan: Plan) -> str:
    return next(stage.peer for stage in plan.stages if stage.peer != plan.owner)


def first_stage_elsewhere(plan: Plan) -> Plan:
    first, *others = plan.stages
    return with_stages(plan, [replace(first, peer=other_than_owner(plan)), *others])


def last_stage_elsewhere(plan: Plan) -> Plan:
    *others, last = plan.stages
    return with_stages(plan, [*others, replace(last, peer=other_than_owner(plan))])


def back_moved(plan: Plan) -> Plan:
    """The head runs on the compnode before it, the loss alone on the owner's machine."""
    *others, before, last = plan.stages
    return with_stages(plan, [*others, replace(before, stop=last.start + 1), replace(last, start=last.start + 1)])


def front_moved(plan: Plan) -> Plan:
    """The owner clamps the tokens, and sends them on to be looked up."""
    first, second, *others = plan.stages
    return with_stages(plan, [replace(first, stop=1), replace(second, start=1), *others])


def cut_inside_the_front(plan: Plan) -> Plan:
    """A compnode holds a stage between two parts of the front."""
    first, *others = plan.stages
    inner = replace(first, start=1, peer=other_than_owner(plan))
    return with_stages(plan, [replace(first, stop=1), inner, *others])


SPOILED: dict[str, tuple[Spoil, int]] = {
    "first stage elsewhere": (first_stage_elsewhere, 0),
    "last stage elsewhere": (last_stage_elsewhere, 2),
    "back moved": (back_moved, 1),
    "front moved": (front_moved, 1),
    "cut inside the front": (cut_inside_the_front, 1),
}
"""With the stage that the error is to name, of a plan for one compnode."""


def plan_spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Spoil) -> None:
    """Have the broker spoil every first plan that it makes."""
    honest = launching.plan_on_measured_links

    async def spoiled(*arguments: Any) -> Plan:
        return spoil(await honest(*arguments))

    monkeypatch.setattr(launching, "plan_on_measured_links", spoiled)


@pytest.fixture(params=SPOILED)
def spoiled(request: pytest.FixtureRequest) -> tuple[Spoil, int]:
    return SPOILED[request.param]


def test_a_plan_that_shows_private_data_is_refused(
    spoiled: tuple[Spoil, int], tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, stage = spoiled
    plan_spoiled(monkeypatch, spoil)
    text, steps = refused(tmp_path, wiretap, compnodes=1)
    assert f"stage {stage} (operators" in text
    assert "would run on a (" in text or "would run on b (" in text
    assert "private job keeps operators" in text
    assert steps.losses == []
    assert wiretap.found() == set()
    assert not (tmp_path / "run" / "plan.json").exists(), "what was refused is not noted as the plan"


def test_without_the_checks_the_broker_would_read_everything(
    tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the recording would find if these tests were about nothing."""
    plan_spoiled(monkeypatch, lambda plan: last_stage_elsewhere(first_stage_elsewhere(plan)))
    monkeypatch.setattr(running_job, "accepted", lambda terms, plan, names, me: plan)
    monkeypatch.setattr(running_job, "check_share", lambda *arguments: None)
    monkeypatch.setattr(Driver, "_check_may_get", lambda *arguments: None)

    async def main() -> None:
        async with scene(tmp_path, wiretap) as there:
            await there.train(compnodes=1)

    asyncio.run(main())
    assert wiretap.found() == {"input_ids", "labels"}


def test_the_driver_alone_sends_no_private_input_elsewhere(
    tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever becomes of the check of plans."""
    plan_spoiled(monkeypatch, first_stage_elsewhere)
    monkeypatch.setattr(running_job, "accepted", lambda terms, plan, names, me: plan)
    monkeypatch.setattr(running_job, "check_share", lambda *arguments: None)
    text, _ = refused(tmp_path, wiretap, compnodes=1)
    assert "stage 0 on " in text
    assert "'input_ids', which a private job sends to no other machine" in text
    assert wiretap.found() == set()


def test_an_honest_broker_trains_and_reads_nothing(tmp_path: Path, wiretap: Wiretap) -> None:
    async def main() -> TrainingResult:
        async with scene(tmp_path, wiretap) as there:
            return await there.train(compnodes=2)

    result = asyncio.run(main())
    assert len(result.compnodes) == 3
    assert wiretap.found() == set()
    assert wiretap.sent


def test_a_new_plan_that_shows_private_data_ends_the_job(
    tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replan(problem: Any, running: Plan, steps_left: int) -> Replanned:
        return Replanned(first_stage_elsewhere(running), (), 0.0, 1.0, "the broker wants to see the tokens")

    monkeypatch.setattr("fusionai.broker.replanner.replanned", replan)
    monkeypatch.setattr("fusionai.scheduling.recovery.PATIENCE", Patience(least_left_s=0.0, pause_steps=0))

    def drifted(self: Corrections) -> tuple[Drift, ...]:
        return (Drift(other_than_owner(self._plan), 2.0, 0),)

    monkeypatch.setattr(Corrections, "drifted", drifted)
    slowed = training_run.TrainingLoop._batch

    async def batch_when_answered(self: Any, step: int) -> Any:
        if step > 1 and self._running.seeker.asking is not None:
            await asyncio.wait({self._running.seeker.asking})
        return await slowed(self, step)

    monkeypatch.setattr(training_run.TrainingLoop, "_batch", batch_when_answered)
    text, steps = refused(tmp_path, wiretap, compnodes=1)
    assert "stage 0 (operators 0 to 2) would run on" in text
    assert 1 <= len(steps.losses) < 4, "it trained by the plan before"
    for order in ("train.inherit_weights", "train.hand_over_weights"):
        assert order.encode() not in wiretap.sent, "no weight was to go by it either"
    assert wiretap.found() == set()


# --- hostile shares and rosters of the owner's own machine ------------------------------------------------------------


def share_spoiled(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Assignment, str], Assignment]) -> None:
    """Have the broker spoil what it assigns to the owner; `spoil` gets the peer of a compnode too."""
    honest = launching.assignments

    def spoiled(*arguments: Any, owner: PeerId, **options: Any) -> dict[PeerId, Assignment]:
        found = honest(*arguments, owner=owner, **options)
        other = next(peer for peer in found if peer != owner)
        return {**found, owner: spoil(found[owner], other)}

    monkeypatch.setattr(launching, "assignments", spoiled)


def tokens_as_a_boundary(share: Assignment, other: str) -> Assignment:
    """The first stage sends the clamped tokens on, as if the compnode took them."""
    first, *others = share.share.subdags
    clamped = first.nodes[0].outputs[0]
    sent = replace(first.sends[0], value=clamped, type=first.types[clamped], gradient=False)
    doctored = replace(first, sends=(*first.sends, sent))
    return replace(share, share=replace(share.share, subdags=(doctored, *others)))


def tokens_for_embeddings(share: Assignment, other: str) -> Assignment:
    """The first stage sends tokens in place of their embeddings: the same weights, the same boundary tensor."""
    first, *others = share.share.subdags
    clamp, look_up = first.nodes
    result = look_up.outputs[0]
    wide, narrow = first.types[result], first.types[clamp.outputs[0]]
    looked_up, nothing, column = (ValueName(name) for name in ("looked_up", "nothing", "column"))
    doctored = replace(
        first,
        nodes=(
            clamp,
            replace(look_up, name=looked_up, outputs=(looked_up,)),
            Node(nothing, "aten.mul.Tensor", (Ref(looked_up), 0.0), {}, (nothing,)),
            Node(column, "aten.unsqueeze.default", (Ref(clamp.outputs[0]), -1), {}, (column,)),
            Node(result, "aten.add.Tensor", (Ref(nothing), Ref(column)), {}, (result,)),
        ),
        types={
            **first.types,
            looked_up: wide,
            nothing: wide,
            column: replace(narrow, shape=(*narrow.shape, 1)),
        },
    )
    return replace(share, share=replace(share.share, subdags=(doctored, *others)))


def in_the_roster(**changes: Any) -> Callable[[Assignment, str], Assignment]:
    def spoil(share: Assignment, other: str) -> Assignment:
        fields = {name: each(share, other) for name, each in changes.items()}
        return replace(share, roster=replace(share.roster, **fields))

    return spoil


def holders_changed(stage: int) -> Callable[[Assignment, str], Assignment]:
    def holders(share: Assignment, other: str) -> tuple[tuple[str, ...], ...]:
        (pipeline,) = share.roster.pipelines
        return ((*pipeline[:stage], "e" * 64, *pipeline[stage + 1 :]),)

    return in_the_roster(pipelines=holders)


DOCTORED: dict[str, tuple[Callable[[Assignment, str], Assignment], str]] = {
    "a further boundary tensor": (tokens_as_a_boundary, "stage 0 in the share of the owner's own machine"),
    "another first stage": (tokens_for_embeddings, "stage 0 in the share of the owner's own machine"),
    "no stage": (
        lambda share, other: replace(share, share=replace(share.share, subdags=(), in_flight={})),
        "has the stages [], the plan gives it [0, 2]",
    ),
    "other options": (
        lambda share, other: replace(share, share=replace(share.share, options=replace(share.share.options, seed=1))),
        "other options than the job",
    ),
    "a stage of another machine": (holders_changed(1), "gives stage 1 to eeeeeeeeeeee, the plan to "),
    "two pipelines": (
        in_the_roster(pipelines=lambda share, other: share.roster.pipelines * 2),
        "has 2 pipelines",
    ),
    "another neighbour": (
        in_the_roster(
            neighbours=lambda share, other: (
                *share.roster.neighbours,
                replace(share.roster.neighbours[0], peer="e" * 64, dial=False),
            )
        ),
        "names eeeeeeeeeeee as a neighbour",
    ),
    "no neighbour": (in_the_roster(neighbours=lambda share, other: ()), "names 0 neighbours, the plan 1"),
    "sums with others": (
        in_the_roster(sums=lambda share, other: dict.fromkeys(share.share.weights(), (share.roster.owner, other))),
        "exchanges gradients",
    ),
}


@pytest.mark.parametrize("name", DOCTORED)
def test_a_share_of_the_owner_that_is_not_the_plan_is_refused(
    name: str, tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, says = DOCTORED[name]
    share_spoiled(monkeypatch, spoil)
    # A hostile broker does not care whether the owner can link to neighbours that do not exist.
    if "neighbour" in name:
        monkeypatch.setattr("fusionai.pool.hosting.link_all", _nothing)
    text, steps = refused(tmp_path, wiretap, compnodes=1)
    assert says in text
    assert steps.losses == []
    assert wiretap.found() == set()


async def _nothing(*arguments: Any, **options: Any) -> None:
    pass


def test_the_doctored_first_stage_would_send_the_tokens(
    tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share alone is doctored, every stage is where it belongs; without its check the tokens are sent."""
    share_spoiled(monkeypatch, tokens_for_embeddings)
    monkeypatch.setattr(running_job, "check_share", lambda *arguments: None)

    async def main() -> None:
        async with scene(tmp_path, wiretap) as there:
            await there.train(compnodes=1)

    asyncio.run(main())
    tokens = batch(0, 0)["input_ids"].float().unsqueeze(-1).expand(-1, -1, WIDTH)
    assert tokens.numpy().tobytes() in wiretap.sent


@pytest.mark.parametrize("role", ["driver", "owner"])
def test_the_owner_takes_no_share_of_somebody_elses_job(
    role: str, tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_spoiled(monkeypatch, in_the_roster(**{role: lambda share, other: other}))
    text = _launch_anyway(tmp_path, wiretap, monkeypatch)
    assert "lacks stage 0, which the plan gives it" in text
    assert wiretap.found() == set()


def _launch_anyway(folder: Path, tap: Wiretap, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train with a broker that says a job is launched although the owner refused its share."""
    from fusionai.broker import handing_out

    assign = handing_out._assign

    async def shameless(*arguments: Any) -> None:
        try:
            await assign(*arguments)
        except FusionError:
            pass

    monkeypatch.setattr(handing_out, "_assign", shameless)
    # A compnode would wait long for a link that the owner does not admit.
    monkeypatch.setattr(handing_out, "_connect", _nothing)
    return refused(folder, tap, compnodes=1)[0]


def test_a_checked_share_is_not_replaced(tmp_path: Path, wiretap: Wiretap, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker assigns what the plan says, and when the owner has checked it, assigns something else."""
    launched: list[JobLaunched] = []

    async def main() -> None:
        async with scene(tmp_path, wiretap) as there:
            prepare = Driver.prepare

            async def replaced_before(self: Driver, *arguments: Any, **options: Any) -> None:
                plan, hosting = JobEpoch(self.job, self.epoch), there.owner.hosting
                assert plan.epoch == FIRST_EPOCH
                share = hosting.work(plan)
                assert isinstance(share, Assignment)
                await hosting.release(plan, "the broker wants it back")
                other = there.compnodes[0].identity.peer_id
                with pytest.raises(JobError, match="takes no other one"):
                    await hosting.assign(plan, "training", pack(tokens_for_embeddings(share, other)))
                assert hosting.host(plan) is None
                await prepare(self, *arguments, **options)

            monkeypatch.setattr(Driver, "prepare", replaced_before)
            with pytest.raises(FusionError):
                await there.train(compnodes=1)

    asyncio.run(main())
    assert launched == []
    assert wiretap.found() == set()


def test_the_model_of_these_tests_has_two_operators_in_front() -> None:
    graph, front, back = arranged()
    assert [node.op for node in graph.nodes[:front]] == ["aten.clamp.default", "aten.embedding.default"]
    assert front == 2
    assert [stage.index for stage in cut(graph, [front, back])] == [0, 1, 2]
