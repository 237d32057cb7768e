"""One machine's share of a job, message by message: what it takes in which state, what it refuses, and how it ends.

Machine b holds the middle stage of three. Nobody else takes part: the test speaks for the driver and the neighbours.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from fake_plane import data
from scripted_pool import JOB, ScriptedPool, peer_of
from toy_pipelines import OWNER, ROWS, WIDTH, Pipeline, Start, noise, three_machines

from fusionai.errors import FusionError, GraphError, JobError, NetworkError, PeerTimeout, ProtocolError
from fusionai.graph.model import ValueName, WeightKey
from fusionai.network.clock import now_s, run_scripted
from fusionai.network.identity import PeerId
from fusionai.network.limits import Limits
from fusionai.pool.contacts import LINK_TIMEOUT_S
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobEpoch
from fusionai.scheduling.recovery import PATIENCE
from fusionai.tensor import TensorData
from fusionai.training.messages import (
    BeginRound,
    Boundary,
    BulkHeader,
    CommitRound,
    Control,
    EndShare,
    FinishLoading,
    HandOverWeights,
    InheritWeights,
    PulledWeight,
    PullWeights,
    RoundReport,
    ShareFailed,
    TiedGradient,
    WeightTensor,
)
from fusionai.training.roster import Roster
from fusionai.training.stage_host import StageHost
from fusionai.training.weight_traffic import LOAD_TIMEOUT_S

A, B, C, DRIVER = peer_of("a"), peer_of("b"), peer_of("c"), peer_of(OWNER)
MIDDLE = WeightKey("middle")
IN, OUT = ValueName("m0"), ValueName("m1")
"""What stage 1 takes from stage 0, and what it gives to stage 2."""


class Ear:
    """Takes what one side of the job is sent."""

    def __init__(self, kinds: tuple[type, ...]) -> None:
        self.kinds = kinds
        self.control: list[Control] = []
        self.bulk: list[tuple[BulkHeader, TensorData]] = []
        self.gate: asyncio.Event | None = None
        """While it is not set, bulk waits here, and with it whoever sends."""

    def takes(self, message: Control | BulkHeader) -> bool:
        return isinstance(message, self.kinds)

    async def on_control(self, peer: PeerId, message: Control) -> bytes:
        self.control.append(message)
        return b""

    async def on_tensor(self, peer: PeerId, header: BulkHeader, tensor: TensorData) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.bulk.append((header, tensor))

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        pass


class Stage:
    """Machine b, and the ears of the others."""

    def __init__(self, pool: ScriptedPool, host: StageHost) -> None:
        self.pool = pool
        self.host = host
        self.machine = pool.machines["b"]
        self.driver = Ear((RoundReport, ShareFailed, PulledWeight))
        self.a, self.c = Ear((Boundary,)), Ear((Boundary,))
        for name, ear in ((OWNER, self.driver), ("a", self.a), ("c", self.c)):
            pool.machines[name].wire.attach(JobEpoch(JOB, FIRST_EPOCH), ear)

    @property
    def failures(self) -> list[ShareFailed]:
        return [each for each in self.driver.control if isinstance(each, ShareFailed)]

    @property
    def reports(self) -> list[RoundReport]:
        return [each for each in self.driver.control if isinstance(each, RoundReport)]

    async def load(self) -> None:
        await self.host.on_tensor(DRIVER, weight(), Start().read("middle"))
        await self.host.on_control(DRIVER, FinishLoading(JOB, FIRST_EPOCH, 1, 0))

    async def run_round(self, number: int = 0) -> None:
        """From the begin to the report."""
        await self.host.on_control(DRIVER, begin(number))
        await self.tensors(number)
        await self.pool.until(lambda: len(self.reports) > number, within_s=5)

    async def tensors(self, number: int = 0) -> None:
        for index in range(2):
            await self.host.on_tensor(A, value(number, index), noise("value", ROWS))
            await self.host.on_tensor(C, gradient(number, index), noise("gradient", ROWS))

    async def bring_to(self, state: str) -> None:
        """One of "loading", "ready", "in a round", "reported", "closed"."""
        if state == "loading":
            return
        await self.load()
        if state == "in a round":
            await self.host.on_control(DRIVER, begin(0))
        elif state == "reported":
            await self.run_round()
        elif state == "closed":
            await self.host.close("enough")

    async def ended(self) -> str:
        """Wait for the end; return its reason."""
        await self.pool.until(lambda: self.machine.ended, within_s=200)
        assert "b" not in self.pool.holding()
        [reason] = self.machine.ended
        return reason


@asynccontextmanager
async def stage(**options: Any) -> AsyncIterator[Stage]:
    limits = options.pop("limits", None)
    async with ScriptedPool(OWNER, "a", "b", "c", limits=limits) as pool:
        b = pool.machines["b"]
        for name in "ac":
            other = pool.machines[name]
            await other.endpoint.connect(B, [b.address], timeout_s=5)
            await b.endpoint.wait_for_link(other.peer, 5)
        host = await b.hold(*pool.assignment(three_machines(), "b"), **options)
        made = Stage(pool, host)
        try:
            yield made
        finally:
            await host.close("the test is over")
            for name, ear in ((OWNER, made.driver), ("a", made.a), ("c", made.c)):
                pool.machines[name].wire.detach(JobEpoch(JOB, FIRST_EPOCH), ear)


def go(course: Callable[[Stage], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def main() -> None:
        async with stage(**options) as here:
            await course(here)

    run_scripted(main())


def begin(number: int = 0, *, train: bool = True, microbatches: int = 2, rows: int = ROWS) -> BeginRound:
    return BeginRound(JOB, FIRST_EPOCH, number, number, train, {"s0": rows}, (0.5,) * microbatches)


def commit(number: int = 0, *, apply: bool = True) -> CommitRound:
    return CommitRound(JOB, FIRST_EPOCH, number, 0.125, 1.0, apply)


def weight(key: WeightKey = MIDDLE, shape: tuple[int, ...] = (WIDTH,)) -> WeightTensor:
    return WeightTensor(JOB, FIRST_EPOCH, key, None, "float64", shape)


def value(number: int = 0, index: int = 0, **changes: Any) -> Boundary:
    fields: dict[str, Any] = {"value": IN, "source": 0, "target": 1, "gradient": False, "shape": (ROWS, WIDTH)}
    fields |= {"job": JOB, "epoch": FIRST_EPOCH, "round": number, "index": index, "dtype": "float64"}
    return Boundary(**{**fields, **changes})


def gradient(number: int = 0, index: int = 0) -> Boundary:
    return value(number, index, value=OUT, source=2, gradient=True)


# --- commands ---------------------------------------------------------------------------------------------------


COMMANDS: dict[str, Control] = {
    "begin": begin(0),
    "begin a later round": begin(1),
    "commit": commit(0),
    "hand over": HandOverWeights(JOB, FIRST_EPOCH, FIRST_EPOCH, {}),
    "pull": PullWeights(JOB, FIRST_EPOCH, ()),
    "inherit": InheritWeights(JOB, FIRST_EPOCH, {MIDDLE: A}),
    "finish loading": FinishLoading(JOB, FIRST_EPOCH, 1, 0),
    "report": RoundReport(JOB, FIRST_EPOCH, 0, {}, {}, 0, 0, {}, 0, {}, {}),
}
OK = ""
ANSWERS = {
    # command: what it says when ready, in a round, and when it has reported
    "begin": (OK, "round 0 cannot begin; round 1 is next", "round 0 cannot begin; round 1 is next"),
    "begin a later round": ("round 0 is next", "round 1 cannot begin", "round 1 cannot begin"),
    "commit": ("it is not complete here", "it is not complete here", OK),
    "hand over": (OK, "between two steps", "between two steps"),
    "pull": (OK, OK, OK),
    "inherit": ("have been sent or announced", "have been sent or announced", "have been sent or announced"),
    "finish loading": (OK, OK, OK),
    "report": ("a stage does not take RoundReport",) * 3,
}


@pytest.mark.parametrize("command", ANSWERS)
@pytest.mark.parametrize("state", ["ready", "in a round", "reported"])
def test_commands_in_each_state(command: str, state: str) -> None:
    expected = ANSWERS[command][["ready", "in a round", "reported"].index(state)]

    async def course(here: Stage) -> None:
        await here.bring_to(state)
        if expected:
            with pytest.raises(ProtocolError, match=expected):
                await here.host.on_control(DRIVER, COMMANDS[command])
        else:
            await here.host.on_control(DRIVER, COMMANDS[command])
        assert not here.failures
        assert not here.machine.ended, "what is refused ends the link that it came by, not the share by itself"

    go(course)


@pytest.mark.parametrize("command", [*ANSWERS, "end"])
def test_only_the_driver_commands(command: str) -> None:
    message = COMMANDS.get(command, EndShare(JOB, FIRST_EPOCH))

    async def course(here: Stage) -> None:
        await here.load()
        with pytest.raises(ProtocolError, match="is not the driver"):
            await here.host.on_control(A, message)

    go(course)


@pytest.mark.parametrize("microbatches", [0, 65_537])
def test_a_round_has_a_bounded_number_of_microbatches(microbatches: int) -> None:
    async def course(here: Stage) -> None:
        await here.load()
        with pytest.raises(ProtocolError, match=f"a round of {microbatches} microbatches"):
            await here.host.on_control(DRIVER, begin(microbatches=microbatches))

    go(course)


def test_a_round_larger_than_the_machine_is_refused_and_the_driver_hears_why() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(rows=1_000))
        assert "this machine offers 10,000" in await here.ended()
        [failure] = here.failures
        assert (failure.error, "a round at sizes {'s0': 1000}" in failure.text) == ("JobError", True)

    go(course, limit_bytes=10_000)


def test_impossible_sizes_are_refused_and_the_driver_hears_why() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(rows=-1))
        assert "negative size" in await here.ended()
        assert len(here.failures) == 1

    go(course)


def test_a_wrong_commit_is_refused() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.run_round()
        with pytest.raises(ProtocolError, match="round 1 cannot be committed"):
            await here.host.on_control(DRIVER, commit(1))
        assert here.machine.program.updates == 0

    go(course)


# --- rounds -----------------------------------------------------------------------------------------------------


def test_a_round_from_begin_to_commit() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.run_round()
        [report] = here.reports
        assert (report.round, report.losses, report.norms.keys()) == (0, {}, {MIDDLE})
        size = ROWS * WIDTH * 8
        assert report.bytes_sent == here.host.bytes_sent == {C: 2 * size, A: 2 * size}
        assert [header for header, _ in here.c.bulk] == [
            value(0, index, value=OUT, source=1, target=2) for index in (0, 1)
        ]
        back = [value(0, index, value=IN, source=1, target=0, gradient=True) for index in (0, 1)]
        assert [header for header, _ in here.a.bulk] == back
        await here.host.on_control(DRIVER, commit())
        await here.run_round(1)
        await here.host.on_control(DRIVER, commit(1, apply=False))
        await here.pool.until(lambda: here.machine.program.discards, within_s=1)
        assert here.machine.program.updates == 1
        assert here.reports[1].bytes_sent == report.bytes_sent, "counted by round"
        assert here.host.bytes_sent == {C: 4 * size, A: 4 * size}, "and by job"

    go(course)


def test_an_evaluation_needs_no_commit() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        for number in range(2):
            await here.host.on_control(DRIVER, begin(number, train=False))
            for index in range(2):
                await here.host.on_tensor(A, value(number, index), noise("value", ROWS))
            await here.pool.until(lambda number=number: len(here.reports) > number, within_s=1)  # type: ignore[misc]
        assert here.reports[1].norms == {}
        assert not here.a.bulk, "no gradient goes back"

    go(course)


def test_an_early_tensor_waits_for_its_round() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        early = asyncio.ensure_future(here.host.on_tensor(A, value(0, 0), noise("value", ROWS)))
        await asyncio.sleep(60)
        assert not early.done(), "its sender is held back by its credit"
        await here.host.on_control(DRIVER, begin(0))
        await early
        with pytest.raises(ProtocolError, match="a tensor of round 2 came, but round 1 is next"):
            await here.host.on_tensor(A, value(2, 0), noise("value", ROWS))

    go(course)


def test_a_flood_before_the_round_is_held_back() -> None:
    """A neighbour that sends ahead gets no further than its window, until the round begins."""
    sent: list[int] = []

    async def course(here: Stage) -> None:
        await here.load()

        async def flood() -> None:
            for index in range(40):
                await here.pool.machines["a"].wire.send(B, value(0, index), noise("value", ROWS))
                sent.append(index)

        flooding = asyncio.ensure_future(flood())
        await asyncio.sleep(100)
        assert len(sent) == 4, "each counts as 4096 bytes of the window"
        await here.host.on_control(DRIVER, begin(0, train=False, microbatches=40))
        await flooding
        await here.pool.until(lambda: here.reports, within_s=5)

    go(course, limits=Limits(window_bytes=4 * 4096))


def test_a_late_or_repeated_tensor_changes_nothing() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(0))
        for _ in range(3):
            await here.host.on_tensor(A, value(0, 0), noise("value", ROWS))
        await here.tensors()
        await here.pool.until(lambda: here.reports, within_s=1)
        await here.tensors()
        await here.host.on_control(DRIVER, commit())
        await here.tensors()  # of a round that is over
        assert len(here.c.bulk) == len(here.a.bulk) == 2

    go(course)


REFUSED_TENSORS: dict[str, tuple[PeerId, Boundary, str]] = {
    "another machine's stage": (C, value(), "which has other stages"),
    "the driver's inputs from a machine": (A, value(source=-1), "which has other stages"),
    "no such stage": (A, value(source=7), "stage 7 does not exist"),
    "a stage that is elsewhere": (A, value(target=2), "stage 2 is not on this machine"),
    "another shape": (A, value(shape=(ROWS + 1, WIDTH)), "but the OP-DAG says"),
    "another microbatch": (A, value(index=2), "not due in this round of 2 microbatches"),
    "another value": (A, value(value=ValueName("m7")), "not due"),
    "a gradient that nobody needs": (A, value(gradient=True), "not due"),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_are_refused(case: str) -> None:
    peer, header, says = REFUSED_TENSORS[case]

    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(0))
        with pytest.raises(ProtocolError, match=says):
            await here.host.on_tensor(peer, header, noise("tensor", header.shape[0]))
        await here.tensors()  # and the round goes on
        await here.pool.until(lambda: here.reports, within_s=1)

    go(course)


def test_another_kind_of_number_is_refused() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(0))
        with pytest.raises(ProtocolError, match="came as int64"):
            await here.host.on_tensor(A, value(), data([[1] * WIDTH] * ROWS, "int64"))

    go(course)


def test_what_waits_for_its_turn_is_bounded_by_what_the_machine_offers() -> None:
    """Forwards that cannot run, since two are in flight and no gradient has come."""
    size = ROWS * WIDTH * 8

    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(microbatches=40))
        for index in range(2 + 20):  # two run, and twenty have room to wait
            await here.host.on_tensor(A, value(0, index), noise("value", ROWS))
            await asyncio.sleep(0.1)
        with pytest.raises(ProtocolError, match="bytes wait for their turn here"):
            await here.host.on_tensor(A, value(0, 22), noise("value", ROWS))

    go(course, limit_bytes=20 * size)


def test_a_gradient_of_a_tied_weight_that_is_not_held_is_refused() -> None:
    header = TiedGradient(JOB, FIRST_EPOCH, 0, WeightKey("embedding"), "float64", (WIDTH,))

    async def course(here: Stage) -> None:
        await here.load()
        with pytest.raises(ProtocolError, match="holds no tied weight"):
            await here.host.on_tensor(A, header, noise("gradient"))

    go(course)


def shared(number: int = 0, shape: tuple[int, ...] = (WIDTH,)) -> TiedGradient:
    return TiedGradient(JOB, FIRST_EPOCH, number, WeightKey("embedding"), "float64", shape)


def test_gradients_of_a_tied_weight_are_kept_for_their_round_only() -> None:
    """Of machine a, which shares the weight with c."""

    async def main() -> None:
        async with ScriptedPool(OWNER, "a", "b", "c") as pool:
            a = pool.machines["a"]
            host = await a.hold(*pool.assignment(three_machines(), "a"))
            await host.on_control(DRIVER, begin(0))
            for number in (*range(-50, 0), 0, 0):
                await host.on_tensor(C, shared(number), noise("gradient"))
            assert len(host._rounds.exchange) == 1
            with pytest.raises(ProtocolError, match="a tensor of round 2 came, but round 1 is next"):
                await host.on_tensor(C, shared(2), noise("gradient"))
            for peer, header, says in (
                (B, shared(), "holds no tied weight"),
                (C, shared(shape=(4, WIDTH)), "but the weight is float64"),
            ):
                with pytest.raises(ProtocolError, match=says):
                    await host.on_tensor(peer, header, noise("gradient", None if len(header.shape) == 1 else 4))
            assert len(host._rounds.exchange) == 1

    run_scripted(main())


def test_a_neighbour_that_takes_evaluated_tensors_too_slowly_ends_the_share() -> None:
    async def course(here: Stage) -> None:
        here.c.gate = asyncio.Event()
        await here.load()
        await here.host.on_control(DRIVER, begin(train=False, microbatches=60))
        for index in range(60):
            await here.host.on_tensor(A, value(0, index), noise("value", ROWS))
            await asyncio.sleep(0.01)
            if here.machine.ended:
                break
        assert "the next compnode takes them too slowly" in await here.ended()
        assert [each.error for each in here.failures] == ["JobError"]
        here.c.gate.set()

    # The window of the link lets some out before they wait here: each counts as 4096 bytes at least.
    go(course, limit_bytes=20 * ROWS * WIDTH * 8, limits=Limits(window_bytes=4096))


# --- weights ----------------------------------------------------------------------------------------------------


REFUSED_WEIGHTS: dict[str, tuple[PeerId, WeightTensor, str]] = {
    "not from the driver": (A, weight(), "is not the driver"),
    "not held here": (DRIVER, weight(WeightKey("embedding")), "a weight from .* is not held here"),
    "another shape": (DRIVER, weight(shape=(2, WIDTH)), "came as float64"),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_weights_that_are_refused(case: str) -> None:
    peer, header, says = REFUSED_WEIGHTS[case]

    async def course(here: Stage) -> None:
        tensor = noise("w") if len(header.shape) == 1 else noise("w", 2)
        with pytest.raises(ProtocolError, match=says):
            await here.host.on_tensor(peer, header, tensor)

    go(course)


def test_loading_waits_for_tensors_that_come_after_the_request() -> None:
    async def course(here: Stage) -> None:
        ready = asyncio.ensure_future(here.host.on_control(DRIVER, FinishLoading(JOB, FIRST_EPOCH, 1, 7)))
        await asyncio.sleep(LOAD_TIMEOUT_S - 1)
        assert not ready.done()
        await here.host.on_tensor(DRIVER, weight(), Start().read("middle"))
        await ready
        assert here.machine.program.optimizer_step() == 7

    go(course)


@pytest.mark.parametrize(
    ("announced", "says"), [(2, r"only 0 of 2 weights .* within 100 s"), (0, "1 weights were not")]
)
def test_loading_without_all_weights_fails_for_whoever_asked(announced: int, says: str) -> None:
    async def course(here: Stage) -> None:
        with pytest.raises(JobError, match=says):
            await here.host.on_control(DRIVER, FinishLoading(JOB, FIRST_EPOCH, announced, 0))
        assert now_s() < LOAD_TIMEOUT_S + 1

    go(course)


REFUSED_SOURCES: dict[str, tuple[dict[WeightKey, str], str]] = {
    "too few": ({}, "sources of 0 weights are named, but 1 are held"),
    "another weight": ({WeightKey("embedding"): A}, "sources of 1 weights"),
    "a stranger": ({MIDDLE: "f" * 64}, "is no machine of this job"),
}


@pytest.mark.parametrize("case", REFUSED_SOURCES)
def test_sources_that_are_refused(case: str) -> None:
    sources, says = REFUSED_SOURCES[case]

    async def course(here: Stage) -> None:
        with pytest.raises(ProtocolError, match=says):
            await here.host.on_control(DRIVER, InheritWeights(JOB, FIRST_EPOCH, sources))

    go(course)


def test_inherited_weights_come_once_each_from_their_machine() -> None:
    async def course(here: Stage) -> None:
        await here.host.on_control(DRIVER, InheritWeights(JOB, FIRST_EPOCH, {MIDDLE: A}))
        for peer in (DRIVER, C):
            with pytest.raises(ProtocolError, match="to send"):
                await here.host.on_tensor(peer, weight(), noise("w"))
        await here.host.on_tensor(A, weight(), noise("w"))
        with pytest.raises(ProtocolError, match="handed over twice"):
            await here.host.on_tensor(A, weight(), noise("w"))
        with pytest.raises(JobError, match="1 weights were not sent, such as 'middle::momentum_buffer'"):
            await here.host.on_control(DRIVER, FinishLoading(JOB, FIRST_EPOCH, 1, 0))

    go(course)


def test_pulling_sends_what_is_asked_for() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        wanted = ((MIDDLE, None), (MIDDLE, "momentum_buffer"))
        await here.host.on_control(DRIVER, PullWeights(JOB, FIRST_EPOCH, wanted))
        await here.pool.until(lambda: len(here.driver.bulk) == 2, within_s=1)
        assert [(header.key, header.state) for header, _ in here.driver.bulk if isinstance(header, PulledWeight)] == [
            *wanted
        ]
        assert bytes(here.driver.bulk[0][1].data) == bytes(Start().read("middle").data)

    go(course)


def test_handing_over_a_weight_that_is_not_held_is_refused() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        message = HandOverWeights(JOB, FIRST_EPOCH, FIRST_EPOCH, {WeightKey("embedding"): (A,)})
        with pytest.raises(ProtocolError, match="'embedding' is not held here"):
            await here.host.on_control(DRIVER, message)

    go(course)


# --- rosters ----------------------------------------------------------------------------------------------------


def roster_of(here: Stage, epoch: int, *holders: str) -> Roster:
    pipeline = Pipeline(three_machines().graph, (1, 2), holders)
    return here.pool.assignment(pipeline, "b", Epoch(epoch))[1]


def test_a_later_roster_is_taken_between_steps_and_an_older_one_is_dropped() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.run_round()
        later = roster_of(here, 2, "c", "b", "a")  # a and c change places
        with pytest.raises(ProtocolError, match="between two steps, and a round is in progress"):
            here.host.take_roster(later)
        await here.host.on_control(DRIVER, commit())
        with pytest.raises(ProtocolError, match="by the new roster stage 1 is not this machine's"):
            here.host.take_roster(roster_of(here, 2, "a", "c", "b"))
        assert here.host.take_roster(later)
        for epoch in (0, 1, 2):
            assert not here.host.take_roster(roster_of(here, epoch, "a", "b", "c"))
        assert here.host.roster is later
        # By the old epoch nothing comes any more; by the new one stage 0's tensors come from c.
        await here.pool.owner.wire.notify(B, begin(1))
        await asyncio.sleep(1)
        await here.pool.owner.wire.notify(B, msgspec.structs.replace(begin(1), epoch=Epoch(2)))
        await asyncio.sleep(1)
        header = value(1, epoch=Epoch(2))
        with pytest.raises(ProtocolError, match="which has other stages"):
            await here.host.on_tensor(A, header, noise("value", ROWS))
        await here.host.on_tensor(C, header, noise("value", ROWS))

    go(course)


# --- failures and ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "named", "says"),
    [
        (GraphError("no such operator"), "GraphError", "no such operator"),
        (MemoryError("full"), "JobError", "MemoryError: full"),
    ],
)
@pytest.mark.parametrize("call", ["forward 1 of 0/0", "backward 1 of 0/1", "norms", "memory"])
def test_what_fails_in_the_program_is_told_once_and_ends_the_share(
    error: Exception, named: str, says: str, call: str
) -> None:
    async def course(here: Stage) -> None:
        await here.load()

        def on_call(made: str) -> None:
            if made == call:
                raise error

        here.machine.plane.on_call = on_call
        await here.host.on_control(DRIVER, begin(0))
        await here.tensors()
        assert await here.ended() == says
        assert [(each.error, each.text) for each in here.failures] == [(named, says)]
        assert not here.reports
        assert here.machine.program.closed

    go(course)


def test_an_update_that_fails_is_told() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.run_round()

        def on_call(made: str) -> None:
            raise MemoryError("no room for an update")

        here.machine.plane.on_call = on_call
        await here.host.on_control(DRIVER, commit())
        assert await here.ended() == "MemoryError: no room for an update"

    go(course)


def test_a_failure_that_the_driver_cannot_be_told_ends_the_share_all_the_same() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        here.pool.network.vanish(OWNER)

        def on_call(made: str) -> None:
            raise MemoryError("full")

        here.machine.plane.on_call = on_call
        await here.host.on_control(DRIVER, begin(0))
        await here.host.on_tensor(A, value(), noise("value", ROWS))
        assert await here.ended() == "MemoryError: full"

    go(course)


def test_the_driver_ends_the_share() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.pool.owner.wire.notify(B, EndShare(JOB, FIRST_EPOCH, "all steps are done"))
        assert await here.ended() == "all steps are done"
        assert not here.failures
        with pytest.raises(ProtocolError, match="which this machine has no part in"):
            await here.pool.owner.wire.request(B, PullWeights(JOB, FIRST_EPOCH, ()), timeout_s=1)
        await here.pool.owner.wire.notify(B, begin(0))  # dropped: the job is over here

    go(course)


def test_the_loss_of_the_owner_ends_the_share() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        here.pool.network.kill(OWNER)
        assert (await here.ended()).startswith("the owner's machine is lost: ")

    go(course)


@pytest.mark.parametrize("neighbour", ["a", "c"])
def test_the_loss_of_a_neighbour_is_left_to_the_driver_for_a_while(neighbour: str) -> None:
    async def course(here: Stage) -> None:
        await here.load()
        began_s = now_s()
        here.pool.network.kill(neighbour)
        assert f"its link to compnode {neighbour} is gone" in await here.ended()
        assert PATIENCE.neighbour_link_s <= now_s() - began_s < PATIENCE.neighbour_link_s + 1
        assert len(here.failures) == 1

    go(course)


def test_a_neighbour_that_breaks_the_protocol_ends_the_share_at_once() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        await here.host.on_control(DRIVER, begin(0))
        began_s = now_s()
        await here.pool.machines["a"].wire.send(B, value(index=5), noise("value", ROWS))
        assert "not due" in await here.ended()
        assert now_s() - began_s < 1

    go(course)


@pytest.mark.parametrize("state", ["loading", "ready", "in a round", "reported", "closed"])
def test_closing_frees_everything(state: str) -> None:
    async def course(here: Stage) -> None:
        await here.bring_to(state)
        early = asyncio.ensure_future(
            here.host.on_tensor(A, value(1 if state == "reported" else 0), noise("value", ROWS))
        )
        await asyncio.sleep(0.001)
        await here.host.close("enough")
        await here.host.close("enough")
        await early
        assert "b" not in here.pool.holding()
        assert here.machine.program.closed
        assert not here.machine.ended, "who closes it knows why"

    go(course)


@pytest.mark.parametrize("first", ["a caller", "a caller that goes", "the driver"])
def test_whoever_closes_waits_until_the_memory_is_free(first: str) -> None:
    async def course(here: Stage) -> None:
        await here.bring_to("in a round")
        here.pool.duration_s = lambda machine, call: 10.0
        await here.host.on_tensor(A, value(), noise("value", ROWS))
        await asyncio.sleep(1)  # a pass is in progress, and cannot be broken off
        closing = None
        if first == "the driver":
            await here.host.on_control(DRIVER, EndShare(JOB, FIRST_EPOCH, "all steps are done"))
        else:
            closing = asyncio.ensure_future(here.host.close("enough"))
        await asyncio.sleep(1)
        if first == "a caller that goes" and closing is not None:
            closing.cancel()
        assert not here.machine.program.closed
        began_s = now_s()
        await asyncio.gather(*(here.host.close("enough, I say") for _ in range(2)))
        assert here.machine.program.closed
        assert now_s() - began_s == pytest.approx(8)
        if closing is not None:
            await asyncio.wait({closing})
            assert closing.cancelled() == (first == "a caller that goes")
            assert not here.machine.ended
        else:
            assert await here.ended() == "all steps are done"

    go(course)


def test_weights_larger_than_the_machine_make_no_program() -> None:
    async def main() -> None:
        async with ScriptedPool(OWNER, "a", "b", "c") as pool:
            with pytest.raises(JobError, match="this machine offers 10"):
                await pool.machines["b"].hold(*pool.assignment(three_machines(), "b"), limit_bytes=10)
            assert not pool.machines["b"].plane.programs

    run_scripted(main())


def test_a_program_that_cannot_be_made_leaves_nothing() -> None:
    async def main() -> None:
        async with ScriptedPool(OWNER, "a", "b", "c") as pool:

            def on_call(call: str) -> None:
                raise GraphError("no such operator here")

            b = pool.machines["b"]
            b.plane.on_call = on_call
            with pytest.raises(GraphError, match="no such operator here"):
                await b.hold(*pool.assignment(three_machines(), "b"))
            assert not pool.holding()

    run_scripted(main())


def test_a_neighbour_that_never_links_is_named() -> None:
    async def main() -> None:
        async with ScriptedPool(OWNER, "a", "b", "c") as pool:
            host = await pool.machines["b"].hold(*pool.assignment(three_machines(), "b"))
            began_s = now_s()
            with pytest.raises(PeerTimeout, match=r"no link to compnode a: .* has not connected within 30 s"):
                await host.connect()  # a is the one that dials
            assert now_s() - began_s == pytest.approx(LINK_TIMEOUT_S)

    run_scripted(main())


def test_messages_over_the_wire_are_checked_before_the_share_sees_them() -> None:
    async def course(here: Stage) -> None:
        await here.load()
        link = here.pool.owner.endpoint.link(B)
        assert link is not None
        for kind, payload, says in (
            ("train.begin_round", b"\xc1", "malformed train.begin_round"),
            ("train.dance", b"", "'train.dance' is unknown"),
            ("train.begin_round", msgspec.msgpack.encode({"type": "train.begin_round", "job": 7}), "malformed"),
        ):
            with pytest.raises(FusionError, match=says):
                await link.request(kind, payload, timeout_s=1)
        assert not here.machine.ended

    go(course)
