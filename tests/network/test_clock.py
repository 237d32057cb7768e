"""The scripted event loop: time jumps, order is fixed, and a deadlock is told."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from fusionai.network.clock import NothingLeftToHappen, now_s, run_scripted


def test_hours_take_no_time_and_happen_in_order() -> None:
    events: list[tuple[float, str]] = []

    async def after(seconds: float, name: str) -> None:
        await asyncio.sleep(seconds)
        events.append((now_s(), name))

    async def main() -> float:
        await asyncio.gather(after(3600, "late"), after(0.25, "early"), after(0.25, "early too"))
        return asyncio.get_running_loop().time()

    began_s = time.perf_counter()
    assert run_scripted(main()) == 3600
    assert time.perf_counter() - began_s < 600
    assert events == [(0.25, "early"), (0.25, "early too"), (3600, "late")]


def test_timeouts_go_by_the_scripted_clock() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(300):
                await asyncio.sleep(301)
        assert now_s() == pytest.approx(300)

    run_scripted(main())


def test_work_for_threads_runs_in_place_and_takes_no_time() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        assert await asyncio.to_thread(threading.get_ident) == threading.get_ident()
        with pytest.raises(ValueError, match="no"):
            await asyncio.to_thread(fail)
        assert now_s() == 0

    run_scripted(main())


def test_waiting_for_what_never_comes_is_told() -> None:
    async def wait_for_nobody() -> None:
        await asyncio.Event().wait()

    with pytest.raises(NothingLeftToHappen, match="wait_for_nobody"):
        run_scripted(wait_for_nobody())


def test_a_real_loop_has_the_real_clock() -> None:
    async def main() -> None:
        before_s = now_s()
        time.sleep(0.01)  # noqa: ASYNC251 (the clock must not be the loop's, which stands still meanwhile)
        assert now_s() - before_s >= 0.01

    asyncio.run(main())
