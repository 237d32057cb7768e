"""The compute thread, real and scripted: the order of calls, errors, stopping, slowness, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_plane import FakePlane, FakeProgram, data
from toy_pipelines import OPTIONS, ROWS, WIDTH, Start, noise, three_machines

from fusionai.errors import PeerLost, ProtocolError
from fusionai.graph.model import ValueName
from fusionai.network.clock import now_s, run_scripted
from fusionai.network.loop import run
from fusionai.training.compute import Compute, ComputeThread, Round
from fusionai.training.ledger import ReadyPass, RoundLedger, Slot
from fusionai.training.scripted_compute import ScriptedCompute, Transition
from fusionai.training.slowdown import FULL_SPEED, Slowdown, Throttle


class Heard:
    """What a compute told the event loop."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.outputs: list[dict[ValueName, Any]] = []
        self.errors: list[BaseException] = []
        self.complete = asyncio.Event()
        self.failed = asyncio.Event()

    def on_pass(self, current: Round, task: ReadyPass, outputs: dict[ValueName, Any]) -> None:
        self.events.append(f"{task.turn.direction} {task.turn.index}")
        self.outputs.append(outputs)

    def on_complete(self, current: Round) -> None:
        self.events.append("complete")
        self.complete.set()

    def on_error(self, error: BaseException) -> None:
        self.errors.append(error)
        self.failed.set()


class Bench:
    """A compute with the middle stage of a small pipeline: it takes a value and a gradient for each microbatch."""

    def __init__(self, compute: Compute, heard: Heard, plane: FakePlane) -> None:
        self.compute, self.heard, self.plane = compute, heard, plane
        pipeline = three_machines()
        self.subdag = pipeline.subdags[1]
        self.program: FakeProgram = plane.load([self.subdag], OPTIONS)
        for key in self.program.missing():
            self.program.load(key, Start().read(key))
        self.program.calls.clear()
        compute.use(self.program)

    def round(self, microbatches: int = 2, *, number: int = 0, step: int = 0, train: bool = True) -> Round:
        ledger = RoundLedger([self.subdag], microbatches, {1: 1}, train=train)
        return Round(number, step, train, {"s0": ROWS}, (1.0,) * microbatches, ledger)

    def value(self, index: int) -> None:
        [received] = self.subdag.receives
        self.compute.deliver(Slot(1, index, received.value, False, 0), noise(f"value {index}", ROWS))

    def gradient(self, index: int) -> None:
        [sent] = self.subdag.sends
        self.compute.deliver(Slot(1, index, sent.value, True, 2), noise(f"gradient {index}", ROWS))

    async def whole_round(self, **options: Any) -> Round:
        current = self.round(**options)
        self.compute.begin(current)
        for index in range(2):
            self.value(index)
            if current.train:
                self.gradient(index)
        await asyncio.wait_for(self.heard.complete.wait(), 100)
        return current


@asynccontextmanager
async def bench(kind: str, **options: Any) -> AsyncIterator[Bench]:
    heard, plane = Heard(), FakePlane()
    options = {
        "slowdown": FULL_SPEED,
        "name": "test",
        "on_cpu": True,
        "on_pass": heard.on_pass,
        "on_complete": heard.on_complete,
        "on_error": heard.on_error,
        **options,
    }
    compute: Compute = ComputeThread(**options) if kind == "thread" else ScriptedCompute(**options)
    try:
        yield Bench(compute, heard, plane)
    finally:
        await compute.stop()
        assert not [each for each in threading.enumerate() if each.name == "compute-test"]
        assert plane.broken == []


Go = Callable[[Callable[[str], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=["thread", "scripted"])
def go(request: pytest.FixtureRequest) -> Go:
    kind: str = request.param
    return lambda main: (run if kind == "thread" else run_scripted)(main(kind))


def test_passes_run_in_the_ledgers_order(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:
            current = await here.whole_round()
            # One microbatch in flight: each forward is followed by its backward.
            assert here.program.calls == [
                "forward 1 of 0/0",
                "backward 1 of 0/0",
                "forward 1 of 0/1",
                "backward 1 of 0/1",
            ]
            assert here.heard.events == ["forward 0", "backward 0", "forward 1", "backward 1", "complete"]
            assert [len(each) for each in here.heard.outputs] == [1, 1, 1, 1]
            assert current.forward_s.keys() == current.backward_s.keys() == {1}
            assert current.busy_s == pytest.approx(here.compute.busy_s)

    go(main)


def test_other_calls_go_before_passes(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:
            gate = threading.Event()
            if kind == "thread":
                holding = here.compute.submit(lambda: gate.wait(10))
            here.compute.begin(here.round())
            here.value(0)
            order: list[str] = []
            here.plane.on_call = order.append
            first = here.compute.submit(lambda: order.append("first"))
            second = here.compute.submit(lambda: order.append("second"))
            gate.set()
            for each in (first, second):
                await asyncio.wait_for(asyncio.wrap_future(each), 100)
            await here.compute.call(lambda: None)
            if kind == "thread":
                assert holding.result()
            await asyncio.sleep(0)
            here.gradient(0)
            here.value(1)
            here.gradient(1)
            await asyncio.wait_for(here.heard.complete.wait(), 100)
            assert order[:3] == ["first", "second", "forward 1 of 0/0"]

    go(main)


def test_a_call_that_fails_raises_for_its_caller_only(go: Go) -> None:
    def fail() -> None:
        raise ValueError("no such weight")

    async def main(kind: str) -> None:
        async with bench(kind) as here:
            with pytest.raises(ValueError, match="no such weight"):
                await here.compute.call(fail)
            assert await here.compute.call(lambda: 7) == 7
            assert not here.heard.errors

    go(main)


@pytest.mark.parametrize("failing", ["forward 1 of 0/0", "backward 1 of 0/0"])
def test_a_pass_that_fails_is_told_and_ends_everything(go: Go, failing: str) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:

            def on_call(call: str) -> None:
                if call == failing:
                    raise MemoryError("the device is full")

            here.plane.on_call = on_call
            here.compute.begin(here.round())
            here.value(0)
            here.gradient(0)
            await asyncio.wait_for(here.heard.failed.wait(), 100)
            assert [str(each) for each in here.heard.errors] == ["the device is full"]
            assert "complete" not in here.heard.events
            with pytest.raises(PeerLost, match="has ended"):
                here.compute.submit(lambda: None)

    go(main)


def test_a_finish_that_fails_is_told_after_the_gradients_have_left(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:

            def fail() -> None:
                raise MemoryError("no room for what was left for later")

            here.program.finish_backward = fail  # type: ignore[method-assign]
            here.compute.begin(here.round())
            here.value(0)
            here.gradient(0)
            await asyncio.wait_for(here.heard.failed.wait(), 100)
            assert here.heard.events == ["forward 0", "backward 0"]

    go(main)


def test_stopping_cancels_what_waits_and_runs_nothing_more(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind, **({} if kind == "thread" else {"duration_s": lambda call: 0.05})) as here:
            if kind == "thread":
                running = here.compute.submit(lambda: time.sleep(0.05))
            else:
                running = here.compute.submit(lambda: None)
            await asyncio.sleep(0.01)  # it is under way
            waiting = here.compute.submit(lambda: None)
            here.compute.begin(here.round())
            here.value(0)
            await here.compute.stop()
            await here.compute.stop()
            assert running.done()
            assert not running.cancelled()
            assert waiting.cancelled()
            assert here.program.calls == []
            here.value(1)  # nobody takes it, and nobody minds
            with pytest.raises(PeerLost, match="has ended"):
                await here.compute.call(lambda: None)

    go(main)


def test_a_call_given_up_before_its_turn_is_skipped(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind, **({} if kind == "thread" else {"duration_s": lambda call: 0.05})) as here:
            here.compute.submit(lambda: time.sleep(0.05) if kind == "thread" else None)
            await asyncio.sleep(0.01)
            ran: list[int] = []
            waiting = asyncio.ensure_future(here.compute.call(lambda: ran.append(1)))
            await asyncio.sleep(0)
            waiting.cancel()
            await here.compute.call(lambda: None)
            assert ran == []

    go(main)


def test_what_is_not_due_is_refused_and_repetitions_count_once(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:
            here.value(0)  # no round yet: nothing is due, and nothing is said
            here.compute.begin(here.round())
            here.value(0)
            here.value(0)
            with pytest.raises(ProtocolError, match="not due"):
                here.value(2)
            for index in range(2):
                here.value(index)
                here.gradient(index)
            await asyncio.wait_for(here.heard.complete.wait(), 100)
            assert here.heard.events.count("forward 0") == 1
            here.value(1)

    go(main)


def test_an_evaluation_has_forwards_only(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:
            await here.whole_round(train=False)
            assert here.program.calls == ["evaluate 1 of 0/0", "evaluate 1 of 0/1"]

    go(main)


def test_slowdown_stretches_calls_and_a_throttle_comes_with_its_step() -> None:
    slow = Slowdown(2.0, Throttle(after_steps=1, factor=3.0))

    async def main() -> None:
        async with bench("scripted", slowdown=slow, duration_s=lambda call: 1.0) as here:
            for step, seconds in ((0, 2.0), (1, 6.0)):
                began_s = now_s()
                here.heard.complete.clear()
                current = here.round(step=step)
                here.compute.begin(current)
                for index in range(2):
                    here.value(index)
                    here.gradient(index)
                await here.heard.complete.wait()
                # Two forwards, two backwards, and two finishes of a backward.
                assert now_s() - began_s == pytest.approx(6 * seconds)
                assert current.busy_s == pytest.approx(6 * seconds)
                assert current.forward_s == {1: pytest.approx(2 * seconds)}
                assert current.backward_s == {1: pytest.approx(4 * seconds)}
                here.program.update(0.1)

    run_scripted(main())


def test_the_threads_slowdown_takes_at_least_its_time() -> None:
    """Its own clock is the thread's, so what is stretched is what the thread computed, not what it waited for."""

    def work() -> float:
        began_s, spent_s = time.thread_time(), 0.0
        while spent_s < 0.02:
            spent_s = time.thread_time() - began_s
        return spent_s

    async def main() -> None:
        async with bench("thread", slowdown=Slowdown(4.0)) as here:
            began_s = time.perf_counter()
            await here.compute.call(work)
            assert time.perf_counter() - began_s >= 0.08
            assert here.compute.busy_s >= 0.08

    run(main())


def test_a_script_sees_every_transition_and_a_dead_machine_makes_none() -> None:
    seen: list[Transition] = []
    alive = True

    def on_transition(transition: Transition) -> None:
        nonlocal alive
        seen.append(transition)
        alive = len(seen) < 6

    async def main() -> None:
        async with bench("scripted", on_transition=on_transition, alive=lambda: alive) as here:
            here.compute.begin(here.round())
            here.value(0)
            here.gradient(0)
            here.value(1)
            await asyncio.sleep(60)
            # Dead from the taking of the backward on: it is never called.
            assert [each.kind for each in seen] == [*["delivered"] * 3, "taken", "finished", "taken"]
            assert here.program.calls == ["forward 1 of 0/0"]

    run_scripted(main())


def test_results_may_be_anything(go: Go) -> None:
    async def main(kind: str) -> None:
        async with bench(kind) as here:
            found = await here.compute.call(lambda: data([1.0] * WIDTH))
            assert found.shape == (WIDTH,)

    go(main)
