"""The compute thread: the only thread that calls a program, one call at a time.

The event loop never computes and the compute thread never does I/O. Passes are taken straight from the round's
ledger under one lock, so between two passes there is no trip through the event loop. `Compute` decides what is called
next; `ComputeThread` calls it. Its twin for scripted clocks is in `scripted_compute`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, cast

from fusionai.errors import PeerLost
from fusionai.execution.program import MicrobatchKey, RoundProgram
from fusionai.graph.model import Sizes, ValueName
from fusionai.network.clock import now_s
from fusionai.tensor import TensorData
from fusionai.training.ledger import ReadyPass, RoundLedger, Slot
from fusionai.training.slowdown import Slowdown

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_PRECISE_S = 1e-3
"""Resolution of a clock that can time a pass; that of threads is 16 ms on some systems."""

_MOST_LATE_S = 0.02
"""Most of a late waking that the next call makes good. More is not a late waking: the machine has too much to do."""


@dataclass(slots=True)
class Round:
    """One round in progress on this machine."""

    number: int
    step: int
    train: bool
    sizes: Sizes
    loss_weights: tuple[float, ...]
    ledger: RoundLedger
    started_s: float = field(default_factory=now_s)
    busy_s: float = 0.0
    forward_s: dict[int, float] = field(default_factory=dict)
    backward_s: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ProgramCall:
    """One call to a program, made but not yet run."""

    kind: Literal["forward", "backward", "finish_backward", "other"]
    run: Callable[[], Any]
    stage: int = -1
    """Stage of a pass; -1 otherwise."""
    step: int = -1
    index: int = -1
    """Microbatch of a pass; -1 otherwise."""


ProgramCalls = Generator[ProgramCall, Any, None]
"""Calls that belong together; each is sent the result of the one before."""

OnPass = Callable[[Round, ReadyPass, dict[ValueName, TensorData]], None]


class Compute(ABC):
    """Runs the passes of the current round, and other calls to the program between them.

    `on_pass(round, task, outputs)` and `on_complete(round)` are called on the event loop; `on_error(error)` too,
    after which nothing more is run.
    """

    def __init__(
        self,
        *,
        slowdown: Slowdown,
        on_pass: OnPass,
        on_complete: Callable[[Round], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._slowdowns = slowdown
        self._slowdown = slowdown.factor
        self._on_pass = on_pass
        self._on_complete = on_complete
        self._on_error = on_error
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._program: RoundProgram | None = None
        self._round: Round | None = None
        self._stopping = False
        self.busy_s = 0.0
        """Total compute seconds, the emulated slowdown included."""

    def use(self, program: RoundProgram) -> None:
        """Set the program whose passes are run."""
        self._program = program

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Queue `work` to run before any further pass. Raises PeerLost when this machine's part has ended."""
        future: Future[_Result] = Future()
        with self._changed:
            if self._stopping:
                raise PeerLost("this machine's part of the job has ended")
            self._waiting.append((work, cast("Future[object]", future)))
            self._wake()
        return future

    async def call(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` before any further pass and return its result."""
        return await asyncio.wrap_future(self.submit(work))

    def begin(self, work: Round) -> None:
        """Start a round; tensors come through `deliver`."""
        with self._changed:
            self._round = work
            if work.train:  # an evaluation has no step of its own
                self._slowdown = self._slowdowns.at(work.step)
            self._wake()

    def deliver(self, slot: Slot, tensor: TensorData, *, limit_bytes: int | None = None) -> None:
        """Give a tensor to the current round's ledger; raises ProtocolError as `RoundLedger.deliver` does."""
        with self._changed:
            if self._round is None:
                return  # every pass is done: a repetition
            if self._round.ledger.deliver(slot, tensor, limit_bytes=limit_bytes):
                self._wake()

    @abstractmethod
    async def stop(self) -> None:
        """End after the call in progress; queued calls are cancelled."""

    # --- for whoever makes the calls --------------------------------------------------------------------------

    @abstractmethod
    def _wake(self) -> None:
        """Look for work again; the lock is held."""

    def _next(self) -> ProgramCalls | None:
        """Return what is to be called next, None when there is nothing; the lock is held."""
        if self._waiting:
            return self._other(*self._waiting.popleft())
        if self._round is not None and (task := self._take(self._round)) is not None:
            return self._pass(self._round, task)
        return None

    def _take(self, current: Round) -> ReadyPass | None:
        return current.ledger.take()

    def _finish(self, current: Round, task: ReadyPass) -> bool:
        """Count a pass as done; return whether the round is complete. The lock is held."""
        current.ledger.finish(task)
        return current.ledger.complete

    def _fail(self, error: BaseException) -> None:
        """Stop for this reason, which is told on the event loop."""
        with self._changed:
            self._stopping = True
        self._post(self._on_error, error)

    def _drop(self) -> None:
        """Cancel what waits."""
        with self._changed:
            for _, future in self._waiting:
                future.cancel()
            self._waiting.clear()
            self._round = None

    def _other(self, work: Callable[[], object], future: Future[object]) -> ProgramCalls:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = yield ProgramCall("other", work)
        except GeneratorExit:  # whoever makes the calls has gone: nobody will know
            raise
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def _pass(self, current: Round, task: ReadyPass) -> ProgramCalls:
        assert self._program is not None
        program, turn = self._program, task.turn
        key = MicrobatchKey(current.step, turn.index)
        before, posted = self.busy_s, False
        if turn.direction == "forward":
            outputs = yield ProgramCall(
                "forward",
                lambda: program.forward(task.stage, key, current.sizes, task.values, train=current.train),
                task.stage,
                current.step,
                turn.index,
            )
        else:
            weight = current.loss_weights[turn.index]
            outputs = yield ProgramCall(
                "backward",
                lambda: program.backward(task.stage, key, task.gradients, weight),
                task.stage,
                current.step,
                turn.index,
            )
            # The boundary gradients travel while the plane computes what it left for later.
            task.gradients.clear()
            self._post(self._on_pass, current, task, outputs)
            posted = True
            yield ProgramCall("finish_backward", program.finish_backward, task.stage, current.step, turn.index)
        spent = self.busy_s - before
        current.busy_s += spent
        seconds = current.forward_s if turn.direction == "forward" else current.backward_s
        seconds[task.stage] = seconds.get(task.stage, 0.0) + spent
        with self._changed:
            complete = self._finish(current, task)
            if complete:
                self._round = None
        # The values were the pass's inputs: let go of them now, so that their memory is free before the next.
        task.values.clear()
        task.gradients.clear()
        if not posted:
            self._post(self._on_pass, current, task, outputs)
        if complete:
            self._post(self._on_complete, current)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop has closed: nobody is left to be told
            log.debug("event loop closed before %s", callback)


class ComputeFactory(Protocol):
    """Makes what runs a program's calls; see `ComputeThread` for the arguments."""

    def __call__(
        self,
        *,
        name: str,
        slowdown: Slowdown,
        on_cpu: bool,
        on_pass: OnPass,
        on_complete: Callable[[Round], None],
        on_error: Callable[[BaseException], None],
    ) -> Compute: ...


class ComputeThread(Compute):
    """Makes the calls in a thread of its own.

    `slowdown` stretches every call (lab mode): of the thread's own time `on_cpu`, else of the clock's.
    """

    def __init__(
        self,
        *,
        name: str,
        slowdown: Slowdown,
        on_cpu: bool,
        on_pass: OnPass,
        on_complete: Callable[[Round], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        super().__init__(slowdown=slowdown, on_pass=on_pass, on_complete=on_complete, on_error=on_error)
        precise = time.get_clock_info("thread_time").resolution < _PRECISE_S
        self._late_s = 0.0
        self._own_clock = time.thread_time if on_cpu and precise else time.perf_counter
        self._thread = threading.Thread(target=self._run, name=f"compute-{name}", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after the call in progress; queued calls are cancelled."""
        with self._changed:
            self._stopping = True
            self._wake()
        await asyncio.to_thread(self._thread.join)

    def _wake(self) -> None:
        self._changed.notify()

    # --- in the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (calls := self._wait_for_next()) is not None:
                self._run_all(calls)
        except BaseException as error:
            log.debug("compute thread failed", exc_info=True)
            self._fail(error)
        finally:
            self._drop()

    def _wait_for_next(self) -> ProgramCalls | None:
        """Return what is to be called, once there is something; None when the thread is to end."""
        with self._changed:
            while not self._stopping:
                if (calls := self._next()) is not None:
                    return calls
                self._changed.wait()
        return None

    def _run_all(self, calls: ProgramCalls) -> None:
        try:
            call = next(calls)
            while True:
                try:
                    result = self._timed(call.run)
                except BaseException as error:
                    call = calls.throw(error)
                else:
                    call = calls.send(result)
                    del result
        except StopIteration:
            pass

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
