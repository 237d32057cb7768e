"""When a request to stop ends a job at once, when it waits, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from fusionai.network.clock import run_scripted
from fusionai.owner.stop_request import LEAST_PATIENCE_S, PATIENCE_STEPS, StopRequest

Job = Callable[[StopRequest], Coroutine[Any, Any, None]]


def ended(job: Job, ask: Callable[[StopRequest], None], *, asked_after_s: float) -> tuple[float, StopRequest, bool]:
    """Run a job, ask it to stop after some seconds; return when it ended, its request, and whether it was cancelled."""

    async def main() -> tuple[float, StopRequest, bool]:
        made: list[StopRequest] = []

        async def run() -> None:
            made.append(StopRequest())
            try:
                await job(made[0])
            finally:
                made[0].close()

        task = asyncio.ensure_future(run())
        await asyncio.sleep(asked_after_s)
        ask(made[0])
        await asyncio.wait({task})
        return asyncio.get_running_loop().time(), made[0], task.cancelled()

    return run_scripted(main())


async def steps(stop: StopRequest) -> None:
    """Do steps of 5 s until a stop is asked for."""
    while not stop.asked:
        await asyncio.sleep(5)
        stop.step_done(5)


def test_before_the_first_step_is_done_it_ends_at_once() -> None:
    now, stop, cancelled = ended(steps, StopRequest.ask, asked_after_s=3)
    assert (now, cancelled, stop.moment) == (3, True, "before the first step was done")


def test_the_step_under_way_is_ended() -> None:
    assert ended(steps, StopRequest.ask, asked_after_s=13)[::2] == (15, False)


@pytest.mark.parametrize("longest_s", [1.0, 100.0])
def test_a_step_that_does_not_end_is_given_up(longest_s: float) -> None:
    async def stuck(stop: StopRequest) -> None:
        stop.step_done(longest_s)
        await asyncio.sleep(1e6)

    now, stop, cancelled = ended(stuck, StopRequest.ask, asked_after_s=7)
    patience_s = max(LEAST_PATIENCE_S, PATIENCE_STEPS * longest_s)
    assert (now, cancelled) == (7 + patience_s, True)
    assert stop.moment == f"during a step, which did not end within {patience_s:.0f} s"


def test_a_checkpoint_is_waited_for() -> None:
    """Whether the request comes before it begins or while it is written; afterwards patience counts again."""

    async def saves(stop: StopRequest) -> None:
        stop.step_done(1)
        await asyncio.sleep(10)
        with stop.saving():
            await asyncio.sleep(5000)
        await asyncio.sleep(1e6)

    for asked_after_s in (3, 1000):
        now, _, cancelled = ended(saves, StopRequest.ask, asked_after_s=asked_after_s)
        assert (now, cancelled) == (5010 + LEAST_PATIENCE_S, True)


def test_a_second_request_waits_for_nothing() -> None:
    def twice(stop: StopRequest) -> None:
        stop.ask()
        stop.ask_at_once()

    now, stop, cancelled = ended(steps, twice, asked_after_s=13)
    assert (now, cancelled) == (13, True)
    assert "twice" in stop.moment


def test_it_wakes_who_waits_for_data() -> None:
    async def waits(stop: StopRequest) -> None:
        stop.step_done(1)
        assert not await stop.wait_for(asyncio.ensure_future(asyncio.sleep(1000)))
        done = asyncio.ensure_future(asyncio.sleep(0))
        await asyncio.sleep(0)
        await done
        assert await stop.wait_for(done), "what is there is not waited for"

    assert ended(waits, StopRequest.ask, asked_after_s=4)[::2] == (4, False)
