"""A request to end a job early, as its training loop sees it.

A request that comes before the first step is done ends everything at once: there is nothing to keep. After that the
step under way is ended and a checkpoint is written. If the step does not end, because a machine is gone or slow, the
wait is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fusionai.errors import FusionError

LEAST_PATIENCE_S = 30.0
"""Seconds that the step under way may take to end, at least. With less, one slow link would cost the checkpoint."""

PATIENCE_STEPS = 3.0
"""The step under way may also take so many times the longest step so far. With more, whoever pressed Ctrl-C would wait
long on a pool that is broken; a second Ctrl-C ends the wait in any case."""


class JobStopped(FusionError):
    """A job ended early because its owner asked for it. Callers of the package see `TrainingInterrupted` instead."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training ended early because of Ctrl-C or SIGTERM. The text says what is kept, and how to go on."""


class StopRequest:
    """Whether a job is to end early. Make it inside the event loop, in the task that is to be cancelled."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a job runs in a task"
        self._task: asyncio.Task[Any] = task
        self._asked = asyncio.Event()
        self._patience_s: float | None = None
        self._saving = False
        self._timer: asyncio.TimerHandle | None = None
        self.moment = "before the first step was done"
        """When the job was ended, if it was ended at once; for people."""
        self.heard: Callable[[], None] = lambda: None
        """Called when the request comes and the step under way will be ended."""

    @property
    def asked(self) -> bool:
        """Whether the job is to end."""
        return self._asked.is_set()

    def ask(self) -> None:
        """End the job: at once if no step is done yet, else after the step under way."""
        if self.asked:
            return
        self._asked.set()
        if self._patience_s is None:
            self._task.cancel()
            return
        self._start_timer()
        self.heard()

    def ask_at_once(self) -> None:
        """End the job without waiting for anything."""
        self._asked.set()
        if self._patience_s is not None:
            self.moment = "twice, so the step under way was not ended"
        self._task.cancel()

    def step_done(self, longest_s: float) -> None:
        """From now on there is something to keep. The longest step so far took `longest_s`."""
        self._patience_s = max(LEAST_PATIENCE_S, PATIENCE_STEPS * longest_s)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While a checkpoint is written, its own patience counts: it may take longer than a step."""
        self._stop_timer()
        self._saving = True
        try:
            yield
        finally:
            self._saving = False
            if self.asked:
                self._start_timer()

    async def wait_for(self, work: asyncio.Future[Any]) -> bool:
        """Wait until `work` is done, or the job is to end. Return whether it is done."""
        if not work.done() and not self.asked:
            asked = asyncio.ensure_future(self._asked.wait())
            try:
                await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                asked.cancel()
        return work.done()

    def close(self) -> None:
        """Wait for nothing any more: the job is over."""
        self._stop_timer()

    def _start_timer(self) -> None:
        if self._timer is None and not self._saving and self._patience_s is not None:
            self._timer = asyncio.get_running_loop().call_later(self._patience_s, self._give_up, self._patience_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, waited_s: float) -> None:
        self.moment = f"during a step, which did not end within {waited_s:.0f} s"
        self._task.cancel()
