"""The compute thread: the only thread that calls a program, one call at a time.

The event loop never computes and the compute thread never does I/O. Passes are taken straight from the round's
ledger under one lock, so between two passes there is no trip through the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar, cast

from fusionai.errors import PeerLost
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.model import Sizes, ValueName
from fusionai.tensor import TensorData
from fusionai.training.ledger import RoundLedger, Slot, Task
from fusionai.training.slowdown import Slowdown

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_PRECISE_S = 1e-3
"""Resolution of a clock that can time a pass; that of threads is 16 ms on some systems."""

_MOST_LATE_S = 0.02
"""Of being late, what the next call makes good: more is not a late waking but a machine that has too much to do."""


@dataclass(slots=True)
class Round:
    """One round in progress on this machine."""

    number: int
    step: int
    train: bool
    sizes: Sizes
    loss_weights: tuple[float, ...]
    ledger: RoundLedger
    started_s: float = field(default_factory=time.perf_counter)
    busy_s: float = 0.0
    forward_s: dict[int, float] = field(default_factory=dict)
    backward_s: dict[int, float] = field(default_factory=dict)


class ComputeThread:
    """Runs the passes of the current round, and other calls to the program between them.

    `slowdown` stretches every call (lab mode): of the thread's own time `on_cpu`, else of the clock's.
    `on_pass(round, task, outputs)` and `on_complete(round)` are called on the event loop; `on_error(error)` too,
    after which the thread runs nothing more.
    """

    def __init__(
        self,
        *,
        name: str,
        slowdown: Slowdown,
        on_cpu: bool,
        on_pass: Callable[[Round, Task, dict[ValueName, TensorData]], None],
        on_complete: Callable[[Round], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._slowdowns = slowdown
        self._slowdown = slowdown.factor
        precise = time.get_clock_info("thread_time").resolution < _PRECISE_S
        self._late_s = 0.0
        self._own_clock = time.thread_time if on_cpu and precise else time.perf_counter
        self._on_pass = on_pass
        self._on_complete = on_complete
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._program: RoundProgram | None = None
        self._round: Round | None = None
        self._stopping = False
        self.busy_s = 0.0
        """Total compute seconds, the emulated slowdown included."""
        self._thread = threading.Thread(target=self._run, name=f"compute-{name}", daemon=True)
        self._thread.start()

    def use(self, program: RoundProgram) -> None:
        """Set the program whose passes are run."""
        self._program = program

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Queue `work` to run in the compute thread before any further pass."""
        future: Future[_Result] = Future()
        with self._wake:
            if self._stopping:
                raise PeerLost("this machine's part of the job has ended")
            self._calls.append((work, cast("Future[object]", future)))
            self._wake.notify()
        return future

    async def call(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` in the compute thread before any further pass and return its result."""
        return await asyncio.wrap_future(self.submit(work))

    def begin(self, work: Round) -> None:
        """Start a round; tensors come through `deliver`."""
        with self._wake:
            self._round = work
            if work.train:  # an evaluation has no step of its own
                self._slowdown = self._slowdowns.at(work.step)
            self._wake.notify()

    def deliver(self, slot: Slot, tensor: TensorData, *, limit_bytes: int | None = None) -> None:
        """Give a tensor to the current round's ledger; raises ProtocolError as `RoundLedger.deliver` does."""
        with self._wake:
            if self._round is None:
                return  # every pass is done: a repetition
            if self._round.ledger.deliver(slot, tensor, limit_bytes=limit_bytes):
                self._wake.notify()

    async def stop(self) -> None:
        """End the thread after the pass in progress; queued calls are cancelled."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    # --- in the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._run_next():
                pass
        except BaseException as error:
            log.debug("compute thread failed", exc_info=True)
            with self._wake:
                self._stopping = True
            self._post(self._on_error, error)
        finally:
            with self._wake:
                for _, future in self._calls:
                    future.cancel()
                self._calls.clear()
                self._round = None

    def _run_next(self) -> bool:
        """Run one call or one pass, waiting for it; False when the thread is to end."""
        task: Task | None = None
        with self._wake:
            while True:
                if self._stopping:
                    return False
                if self._calls:
                    work, future = self._calls.popleft()
                    break
                if self._round is not None and (task := self._round.ledger.take()) is not None:
                    break
                self._wake.wait()
            current = self._round
        if task is None:
            if not future.set_running_or_notify_cancel():
                return True
            try:
                result = self._timed(work)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            return True
        assert current is not None
        self._run_pass(current, task)
        return True

    def _run_pass(self, current: Round, task: Task) -> None:
        assert self._program is not None
        program, turn = self._program, task.turn
        key = MicrobatchKey(current.step, turn.index)
        before, posted = self.busy_s, False
        if turn.direction == "forward":
            outputs = self._timed(
                lambda: program.forward(task.stage, key, current.sizes, task.values, train=current.train)
            )
        else:
            weight = current.loss_weights[turn.index]
            outputs = self._timed(lambda: program.backward(task.stage, key, task.gradients, weight))
            # The boundary gradients travel while the plane computes what it left for later.
            task.gradients.clear()
            self._post(self._on_pass, current, task, outputs)
            posted = True
            self._timed(program.finish_backward)
        spent = self.busy_s - before
        current.busy_s += spent
        seconds = current.forward_s if turn.direction == "forward" else current.backward_s
        seconds[task.stage] = seconds.get(task.stage, 0.0) + spent
        with self._wake:
            current.ledger.finish(task)
            complete = current.ledger.complete
            if complete:
                self._round = None
        # The values were the pass's inputs: let go of them now, so that their memory is free before the next.
        task.values.clear()
        task.gradients.clear()
        if not posted:
            self._post(self._on_pass, current, task, outputs)
        if complete:
            self._post(self._on_complete, current)

    def _timed(self, work: Callable[[], _Result]) -> _Result:
        start_s = time.perf_counter()
        own_s = self._own_clock()
        result = work()
        if self._slowdown > 1:
            # Emulated machines share this one's cores: what one of them waits for another is not its own slowness. Nor
            # is being woken late, which the next call makes good.
            until_s = start_s - self._late_s + self._slowdown * (self._own_clock() - own_s)
            time.sleep(max(0.0, until_s - time.perf_counter()))
            self._late_s = min(max(0.0, time.perf_counter() - until_s), _MOST_LATE_S)
        self.busy_s += time.perf_counter() - start_s
        return result

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop has closed: nobody is left to be told
            log.debug("event loop closed before %s", callback)
