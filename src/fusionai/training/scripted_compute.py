"""The compute thread's twin: calls run on the event loop, and take the seconds that a script says.

For tests on a scripted clock (`fusionai.network.clock`): the order of calls is fixed, and a script sees every
transition of a round's ledger at the moment it happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fusionai.tensor import TensorData
from fusionai.training.compute import Compute, OnPass, ProgramCall, ProgramCalls, Round
from fusionai.training.ledger import ReadyPass, Slot
from fusionai.training.slowdown import Slowdown


@dataclass(frozen=True, slots=True)
class Transition:
    """Something that a machine's ledger has just counted."""

    kind: Literal["delivered", "taken", "finished", "completed"]
    round: int
    what: Slot | ReadyPass | None
    """What was delivered (a Slot), taken or finished (a ReadyPass)."""


class ScriptedCompute(Compute):
    """Makes the calls on the event loop.

    Args:
        duration_s: how long a call takes, before the emulated slowdown.
        alive: whether the machine still lives; once it does not, nothing more is called, and nothing ends.
        on_transition: told of every transition of the ledger, just after it.
    """

    def __init__(
        self,
        *,
        slowdown: Slowdown,
        on_pass: OnPass,
        on_complete: Callable[[Round], None],
        on_error: Callable[[BaseException], None],
        name: str = "",
        on_cpu: bool = True,
        duration_s: Callable[[ProgramCall], float] = lambda call: 0.0,
        alive: Callable[[], bool] = lambda: True,
        on_transition: Callable[[Transition], None] = lambda transition: None,
    ) -> None:
        super().__init__(slowdown=slowdown, on_pass=on_pass, on_complete=on_complete, on_error=on_error)
        self._duration_s = duration_s
        self._alive = alive
        self._on_transition = on_transition
        self._working = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def stop(self) -> None:
        """End after the call in progress."""
        self._stopping = True
        if self._alive():
            await self._idle.wait()
        self._drop()

    def deliver(self, slot: Slot, tensor: TensorData, *, limit_bytes: int | None = None) -> None:
        """Give a tensor to the ledger, and tell the script."""
        current = self._round
        super().deliver(slot, tensor, limit_bytes=limit_bytes)
        if current is not None:
            self._on_transition(Transition("delivered", current.number, slot))

    def _take(self, current: Round) -> ReadyPass | None:
        task = super()._take(current)
        if task is not None:
            self._on_transition(Transition("taken", current.number, task))
        return task

    def _finish(self, current: Round, task: ReadyPass) -> bool:
        complete = super()._finish(current, task)
        self._on_transition(Transition("finished", current.number, task))
        if complete:
            self._on_transition(Transition("completed", current.number, None))
        return complete

    # --- on the event loop ------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._working and not self._stopping:
            self._working = True
            self._idle.clear()
            self._loop.call_soon(self._begin_next)

    def _begin_next(self) -> None:
        calls = None if self._stopping or not self._alive() else self._next()
        if calls is None:
            self._working = False
            self._idle.set()
            return
        self._go_on(calls, lambda: next(calls))

    def _go_on(self, calls: ProgramCalls, resume: Callable[[], ProgramCall]) -> None:
        try:
            call = resume()
        except StopIteration:
            self._loop.call_soon(self._begin_next)
        except BaseException as error:
            self._fail(error)
            self._working = False
            self._idle.set()
            self._drop()
        else:
            seconds = self._slowdown * self._duration_s(call)
            self._loop.call_later(seconds, self._run, calls, call, seconds)

    def _run(self, calls: ProgramCalls, call: ProgramCall, seconds: float) -> None:
        if not self._alive():
            return
        self.busy_s += seconds
        try:
            result: Any = call.run()
        except BaseException as error:
            failure = error
            self._go_on(calls, lambda: calls.throw(failure))
        else:
            self._go_on(calls, lambda: calls.send(result))
