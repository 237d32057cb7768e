"""The driver of a job against machines that do what a test says: what it feeds, waits for, commits, and gives up.

Machines a and b hold no program: they are ears that answer as the test wants.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from scripted_pool import JOB, ScriptedPool, peer_of
from toy_pipelines import OWNER, ROWS, STATES, WIDTH, Layer, Pipeline, Start, batch, chain, noise

from fusionai.errors import DataError, JobError, NetworkError, PeerLost, ProtocolError
from fusionai.graph.model import WeightKey
from fusionai.network.clock import now_s, run_scripted
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import FIRST_EPOCH, JobEpoch
from fusionai.scheduling.job_events import GivenUp
from fusionai.tensor import TensorData
from fusionai.training.driver import Driver, RoundResult
from fusionai.training.messages import (
    BeginRound,
    Boundary,
    BulkHeader,
    CommitRound,
    Control,
    EndShare,
    FinishLoading,
    PulledWeight,
    PullWeights,
    RoundReport,
    ShareFailed,
    WeightTensor,
)
from fusionai.training.weight_orders import PULL_TIMEOUT_S, READY_TIMEOUT_S

A, B = peer_of("a"), peer_of("b")
PIPELINE = Pipeline(chain([Layer("first"), Layer("second")]), (1,), ("a", "b"))
FIRST, SECOND = WeightKey("first"), WeightKey("second")


class FakeMachine:
    """Takes what a stage takes, and reports what the test says."""

    def __init__(self, pool: ScriptedPool, name: str) -> None:
        self.name = name
        self.pool = pool
        self.control: list[Control] = []
        self.bulk: list[tuple[BulkHeader, TensorData]] = []
        self.reports = True
        """Whether it reports each round by itself."""
        self.changes: dict[str, Any] = {}
        """What its reports say otherwise."""
        self.on_ask: Callable[[Control], Coroutine[Any, Any, bytes]] | None = None
        """Answers requests."""
        self.gate: asyncio.Event | None = None
        pool.machines[name].wire.attach(JobEpoch(JOB, FIRST_EPOCH), self)

    def takes(self, message: Control | BulkHeader) -> bool:
        return True

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        self.control.append(message)
        if isinstance(message, BeginRound) and self.reports:
            await self.say(self.report(message.round, len(message.loss_weights), train=message.train))
        if self.on_ask is not None and isinstance(message, FinishLoading | PullWeights):
            return await self.on_ask(message)
        return b""

    async def on_tensor(self, peer: PeerId, header: BulkHeader, tensor: TensorData) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.bulk.append((header, tensor))

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        pass

    def report(self, number: int, microbatches: int = 2, *, train: bool = True, **changes: Any) -> RoundReport:
        last = self.name == "b"
        key = SECOND if last else FIRST
        fields: dict[str, Any] = {
            "losses": {index: 3.0 + index for index in range(microbatches)} if last else {},
            "norms": {key: 4.0 if last else 3.0} if train else {},
            "busy_s": 0.5,
            "wall_s": 1.0,
            "bytes_sent": {},
            "memory_bytes": 7,
            "forward_s": {},
            "backward_s": {},
        }
        return RoundReport(JOB, FIRST_EPOCH, number, **{**fields, **self.changes, **changes})

    async def say(self, message: Control) -> None:
        await self.pool.machines[self.name].wire.notify(self.pool.owner.peer, message)

    async def send(self, header: BulkHeader, tensor: TensorData) -> None:
        await self.pool.machines[self.name].wire.send(self.pool.owner.peer, header, tensor)

    def got(self, kind: type) -> list[Any]:
        return [each for each in self.control if isinstance(each, kind)]


class Job:
    """A driver and two fake machines."""

    def __init__(self, pool: ScriptedPool) -> None:
        self.pool = pool
        self.a, self.b = FakeMachine(pool, "a"), FakeMachine(pool, "b")
        self.driver: Driver = pool.driver(PIPELINE)

    async def step(self, number: int = 0, microbatches: int = 2) -> RoundResult:
        weights = [1 / microbatches] * microbatches
        return await self.driver.train_step(number, batch(number, microbatches), weights, 0.25)


@asynccontextmanager
async def job() -> AsyncIterator[Job]:
    async with ScriptedPool(OWNER, "a", "b") as pool:
        made = Job(pool)
        yield made
        for machine in (made.a, made.b):
            pool.machines[machine.name].wire.detach(JobEpoch(JOB, FIRST_EPOCH), machine)


def go(course: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with job() as here:
            await course(here)

    run_scripted(main())


# --- loading ----------------------------------------------------------------------------------------------------


def test_every_machine_gets_its_weights_and_then_the_question() -> None:
    async def course(here: Job) -> None:
        await here.driver.prepare(Start(), optimizer_states=STATES, optimizer_step=5)
        for machine, key in ((here.a, FIRST), (here.b, SECOND)):
            assert [header for header, _ in machine.bulk] == [
                WeightTensor(JOB, FIRST_EPOCH, key, state, "float64", (WIDTH,)) for state in (None, *STATES)
            ]
            assert machine.control == [FinishLoading(JOB, FIRST_EPOCH, 2, 5)]

    go(course)


def test_a_machine_that_cannot_load_is_named() -> None:
    async def refuse(message: Control) -> bytes:
        raise ProtocolError("no room for it")

    async def course(here: Job) -> None:
        here.b.on_ask = refuse
        with pytest.raises(JobError, match=r"compnode b \(stage 1\): no room for it"):
            await here.driver.prepare(Start())

    go(course)


def test_a_machine_that_does_not_answer_is_named_in_time() -> None:
    async def hang(message: Control) -> bytes:
        await asyncio.sleep(10_000)
        return b""

    async def course(here: Job) -> None:
        here.a.on_ask = hang
        began_s = now_s()
        with pytest.raises(JobError, match=r"compnode a \(stage 0\): .* did not answer .* within 120 s"):
            await here.driver.prepare(Start())
        assert now_s() - began_s == pytest.approx(READY_TIMEOUT_S, abs=1)

    go(course)


# --- rounds -----------------------------------------------------------------------------------------------------


def test_a_step_is_begun_fed_and_committed() -> None:
    async def course(here: Job) -> None:
        result = await here.step(7)
        await here.pool.until(lambda: here.b.got(CommitRound), within_s=1)
        assert result.loss == 3.5
        assert result.gradient_norm == 5.0
        assert result.gradient_scale == pytest.approx(0.2), "clipped to 1"
        assert result.fed_bytes == {A: 2 * ROWS * WIDTH * 8, B: 2 * ROWS * WIDTH * 8}
        for machine in (here.a, here.b):
            assert machine.got(BeginRound) == [BeginRound(JOB, FIRST_EPOCH, 0, 7, True, {"s0": ROWS}, (0.5, 0.5))]
            assert machine.got(CommitRound) == [CommitRound(JOB, FIRST_EPOCH, 0, 0.25, result.gradient_scale, True)]
        for machine, name, stage in ((here.a, "x", 0), (here.b, "y", 1)):
            assert machine.bulk == [
                (
                    Boundary(JOB, FIRST_EPOCH, 0, index, name, -1, stage, False, "float64", (ROWS, WIDTH)),  # type: ignore[arg-type]
                    microbatch[name],
                )
                for index, microbatch in enumerate(batch(7, 2))
            ]

    go(course)


def test_rounds_are_numbered_without_gaps_and_an_evaluation_is_not_committed() -> None:
    async def course(here: Job) -> None:
        await here.step(0)
        evaluated = await here.driver.evaluate(batch(0, 2), [0.5, 0.5])
        assert (evaluated.loss, evaluated.gradient_norm, evaluated.gradient_scale) == (3.5, 0.0, 1.0)
        await here.step(1)
        await here.pool.until(lambda: len(here.b.got(CommitRound)) == 2, within_s=1)
        assert [(each.round, each.step, each.train) for each in here.a.got(BeginRound)] == [
            (0, 0, True),
            (1, 0, False),
            (2, 1, True),
        ]
        assert [each.round for each in here.a.got(CommitRound)] == [0, 2]

    go(course)


@pytest.mark.parametrize(
    ("which", "changes", "says"),
    [
        ("b", {"losses": {0: 1.0, 1: math.nan}}, "the loss is nan at step 1; the step was not applied"),
        ("b", {"losses": {0: 1e308, 1: 1e308 * 10}}, "the loss is inf at step 1"),
        ("a", {"norms": {FIRST: math.inf}}, r"the norm of the gradients is inf \(gradients of a\) at step 1"),
        ("b", {"norms": {SECOND: math.nan}}, r"the norm of the gradients is nan \(gradients of b\) at step 1"),
    ],
)
def test_what_is_not_finite_is_dropped_everywhere(which: str, changes: dict[str, Any], says: str) -> None:
    async def course(here: Job) -> None:
        getattr(here, which).changes = changes
        with pytest.raises(JobError, match=says):
            await here.step()
        await here.pool.until(lambda: here.b.got(CommitRound), within_s=1)
        for machine in (here.a, here.b):
            assert [each.apply for each in machine.got(CommitRound)] == [False]
        here.a.changes = here.b.changes = {}
        await here.step()  # nothing has failed but the step
        assert not here.driver.watch.failed

    go(course)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"losses": {0: 1.0}}, "losses of 1 microbatches, where 2 are due"),
        ({"norms": {FIRST: 1.0}}, "norms of gradients of weights that it does not train"),
        ({"busy_s": -1.0}, "times that are none"),
        ({"bytes_sent": {"f" * 64: 1}}, "bytes sent to machines outside the job"),
    ],
)
def test_a_report_that_cannot_be_ends_the_job(changes: dict[str, Any], says: str) -> None:
    async def course(here: Job) -> None:
        here.b.changes = changes
        with pytest.raises(JobError, match=rf"compnode b \(stage 1\) reports {says}"):
            await here.step()
        assert here.driver.watch.failed
        assert not here.a.got(CommitRound)

    go(course)


def test_reports_of_other_rounds_and_second_ones_count_for_nothing() -> None:
    async def course(here: Job) -> None:
        here.b.reports = False
        stepping = asyncio.ensure_future(here.step())
        await asyncio.sleep(1)
        await here.b.say(here.b.report(1))
        await here.a.say(here.a.report(0, busy_s=99.0))
        await asyncio.sleep(1)
        assert not stepping.done()
        await here.b.say(here.b.report(0))
        result = await stepping
        assert result.reports[A].busy_s == 0.5

    go(course)


def test_who_has_no_part_in_the_job_is_refused() -> None:
    async def course(here: Job) -> None:
        with pytest.raises(ProtocolError, match="has no part in job"):
            await here.driver.on_control(peer_of("stranger"), here.a.report(0))
        with pytest.raises(ProtocolError, match="has no part in job"):
            await here.driver.on_tensor(peer_of("stranger"), pulled(FIRST), noise("w"))
        await here.driver.on_peer_closed(peer_of("stranger"), PeerLost("gone"))
        assert not here.driver.watch.failed

    go(course)


def test_a_machine_that_lives_and_computes_no_more_is_given_up() -> None:
    async def course(here: Job) -> None:
        await here.step()
        here.b.reports = False
        began_s = now_s()
        with pytest.raises(JobError, match="no report from compnode b for 300 s: it is stalled"):
            await here.step(1)
        assert now_s() - began_s == pytest.approx(300, abs=1)

    go(course)


def test_patience_grows_with_the_longest_round() -> None:
    async def course(here: Job) -> None:
        here.b.reports = False

        async def late() -> None:
            await asyncio.sleep(100)
            await here.b.say(here.b.report(0))

        telling = asyncio.ensure_future(late())
        assert (await here.step()).seconds == pytest.approx(100, abs=1)
        await telling
        began_s = now_s()
        with pytest.raises(JobError, match="no report from compnode b for 2000 s"):
            await here.step(1)
        assert now_s() - began_s == pytest.approx(2000, abs=10)

    go(course)


def test_microbatches_of_a_step_have_one_shape() -> None:
    async def course(here: Job) -> None:
        with pytest.raises(DataError, match="must all have one shape"):
            await here.driver.train_step(0, [*batch(0, 1), *batch(0, 1, rows=5)], [0.5, 0.5], 0.1)
        with pytest.raises(DataError, match="lacks the input 'y'"):
            await here.driver.train_step(0, [{"x": noise("x", ROWS)}], [1.0], 0.1)
        assert not here.a.control
        await here.step()

    go(course)


# --- losses of machines -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "while fed", "while waited for"])
def test_a_lost_machine_ends_the_job_by_its_name(moment: str) -> None:
    async def course(here: Job) -> None:
        await here.step()
        here.b.reports = False
        if moment == "before":
            here.pool.network.kill("b")
            await asyncio.sleep(0.1)
        if moment == "while fed":
            here.b.gate = asyncio.Event()
        stepping = asyncio.ensure_future(here.step(1))
        await asyncio.sleep(0.1)
        here.pool.network.kill("b")
        with pytest.raises(JobError, match=r"compnode b \(stage 1\) is lost: "):
            await stepping
        assert here.driver.watch.failed
        with pytest.raises(JobError, match=r"compnode b \(stage 1\) is lost"):
            await here.driver.watch.check()
        assert [each.round for each in here.a.got(CommitRound)] == [0]

    go(course)


def test_the_first_reason_counts() -> None:
    async def course(here: Job) -> None:
        await here.driver.watch.check()
        here.driver.happened(GivenUp("the first"))
        here.driver.happened(GivenUp("the second"))
        for call in (here.step(), here.driver.watch.check(), here.driver.prepare(Start())):
            with pytest.raises(JobError, match="the first"):
                await call

    go(course)


def test_a_failed_machine_says_why_in_printable_words() -> None:
    async def course(here: Job) -> None:
        here.a.reports = False
        stepping = asyncio.ensure_future(here.step())
        await asyncio.sleep(0.1)
        await here.a.say(ShareFailed(JOB, FIRST_EPOCH, "JobError", "out of \x1b[2J memory"))
        with pytest.raises(JobError, match=r"compnode a \(stage 0\) failed: out of  \[2J memory"):
            await stepping

    go(course)


# --- pulling and closing ----------------------------------------------------------------------------------------


def pulled(key: WeightKey, state: str | None = None) -> PulledWeight:
    return PulledWeight(JOB, FIRST_EPOCH, key, state, "float64", (WIDTH,))


def obliging(machine: FakeMachine) -> Callable[[Control], Coroutine[Any, Any, bytes]]:
    async def answer(message: Control) -> bytes:
        if isinstance(message, PullWeights):
            for key, state in message.tensors:
                await machine.send(pulled(key, state), noise(f"{key}::{state}"))
        return b""

    return answer


async def nowhere(key: WeightKey, state: str | None, tensor: TensorData) -> None:
    pass


def test_every_weight_and_state_is_pulled_once() -> None:
    async def course(here: Job) -> None:
        for machine in (here.a, here.b):
            machine.on_ask = obliging(machine)
        found = await here.pool.tensors(here.driver)
        assert found == {
            (key, state): bytes(noise(f"{key}::{state}").data)
            for key in ("first", "second")
            for state in (None, *STATES)
        }

    go(course)


def test_an_answer_may_overtake_its_tensors() -> None:
    async def course(here: Job) -> None:
        here.b.on_ask = obliging(here.b)
        pulling = asyncio.ensure_future(here.pool.tensors(here.driver))
        await asyncio.sleep(100)
        assert not pulling.done()
        for state in (None, *STATES):
            await here.a.send(pulled(FIRST, state), noise("late"))
        assert len(await pulling) == 4

    go(course)


def test_a_machine_that_sends_nothing_when_pulled_is_given_up() -> None:
    async def course(here: Job) -> None:
        began_s = now_s()
        with pytest.raises(JobError, match="compnode a sent no tensor for 3600 s: it is stalled"):
            await here.driver.pull((), nowhere)
        assert now_s() - began_s == pytest.approx(PULL_TIMEOUT_S, abs=1)

    go(course)


def test_tensors_that_were_not_asked_for_are_refused() -> None:
    async def course(here: Job) -> None:
        with pytest.raises(ProtocolError, match="sent a tensor that was not asked for"):
            await here.driver.on_tensor(A, pulled(FIRST), noise("w"))
        pulling = asyncio.ensure_future(here.driver.pull((), nowhere))
        await asyncio.sleep(0.1)
        for peer, key, says in (
            (A, SECOND, "sent a tensor that was not asked for"),  # it is b's
            (B, SECOND, "was not asked for, or came twice"),  # it is a's turn
        ):
            with pytest.raises(ProtocolError, match=says):
                await here.driver.on_tensor(peer, pulled(key), noise("w"))
        await here.driver.on_tensor(A, pulled(FIRST), noise("w"))
        with pytest.raises(ProtocolError, match="was not asked for, or came twice"):
            await here.driver.on_tensor(A, pulled(FIRST), noise("w"))
        pulling.cancel()

    go(course)


def test_a_machine_lost_while_pulled_is_named() -> None:
    async def course(here: Job) -> None:
        pulling = asyncio.ensure_future(here.driver.pull((), nowhere))
        await asyncio.sleep(0.1)
        here.pool.network.kill("a")
        with pytest.raises(JobError, match=r"compnode a \(stage 0\)(:| is lost:)"):
            await pulling

    go(course)


def test_closing_tells_whoever_can_be_reached() -> None:
    async def course(here: Job) -> None:
        here.pool.network.kill("a")
        await asyncio.sleep(0.1)
        await here.driver.close("all steps are done")
        await here.pool.until(lambda: here.b.got(EndShare), within_s=1)
        assert here.b.got(EndShare) == [EndShare(JOB, FIRST_EPOCH, "all steps are done")]
        await here.b.say(here.b.report(0))  # dropped: nobody drives any more
        await asyncio.sleep(0.1)
        assert not here.pool.owner.wire._receivers

    go(course)
