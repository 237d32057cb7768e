"""The clock that decisions go by, and an event loop whose clock is scripted.

Whatever waits, times out or judges silence goes by the clock of the running event loop. On a real loop that is the
computer's clock. On a `ScriptedLoop` it is virtual: when nothing is ready to run, the clock jumps to the next timer,
so 300 seconds of patience take no time, and two runs of one program see the same order of events.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fusionai.errors import FusionError

_Result = TypeVar("_Result")


class NothingLeftToHappen(FusionError):
    """A scripted program waits for something that no timer and no task will ever bring."""


def now_s() -> float:
    """Return seconds on the clock of the running event loop, to compare with other values of this function only.

    The time of a real loop may be a millisecond old, so there it is the computer's precise clock.
    """
    loop = asyncio.get_running_loop()
    return loop.time() if isinstance(loop, ScriptedLoop) else time.perf_counter()


class _NeverWaiting(selectors.SelectSelector):
    """Tells the loop how long it would have waited, instead of waiting."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and (timeout is None or timeout > 0):
            self._jump(timeout)
        return ready


class ScriptedLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual clock that starts at 0.

    Work for another thread (`asyncio.to_thread`, `run_in_executor`) runs in the loop's own thread, so it takes no
    virtual time and its place in the order of events is fixed. Nothing outside the loop may wake it: no sockets, no
    threads. A program that waits for such a thing gets NothingLeftToHappen, or sees its timers run out.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_NeverWaiting(self._jump))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Call `func` in this thread at the loop's next turn."""
        done: asyncio.Future[Any] = self.create_future()
        self.call_soon(_run_inline, done, func, args)
        return done

    def _jump(self, wait_s: float | None) -> None:
        if wait_s is None:
            waiting = sorted(str(task.get_coro()) for task in asyncio.all_tasks(self))
            raise NothingLeftToHappen(
                f"{len(waiting)} tasks wait, and nothing will wake them: {'; '.join(waiting)[:2000]}"
            )
        self._now_s += wait_s


def _run_inline(done: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if done.cancelled():
        return
    try:
        result = func(*args)
    except Exception as error:
        done.set_exception(error)
    else:
        done.set_result(result)


def run_scripted(main: Coroutine[Any, Any, _Result]) -> _Result:
    """Run `main` to its end on a `ScriptedLoop`, like `asyncio.run`."""
    with asyncio.Runner(loop_factory=ScriptedLoop) as runner:
        return runner.run(main)
