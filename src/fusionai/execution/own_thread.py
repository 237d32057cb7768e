"""Heavy work in a thread of its own, which ends with it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")

_NAME = "fusionai-once"


def in_own_thread(work: Callable[[], _Result]) -> _Result:
    """Run `work` in a new thread and return its result. Blocks.

    Work that is done once, such as a calibration or a capture, must not leave OpenMP workers behind. OpenMP keeps a
    pool of workers for every thread that ever ran something parallel, as long as the thread lives. With two pools there
    are more workers than cores, and GNU's OpenMP then stops spinning between loops, which makes a training step in the
    other thread up to half as long again.
    """
    thread, outcome = _started(work)
    thread.join()
    return outcome.result()


async def from_own_thread(work: Callable[[], _Result]) -> _Result:
    """As `in_own_thread`, without blocking the event loop.

    When the caller is cancelled, the thread works on alone; it does not keep the process from ending.
    """
    return await asyncio.wrap_future(_started(work)[1])


def any_left() -> bool:
    """Whether a thread still works on whose caller has been cancelled."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def _started(work: Callable[[], _Result]) -> tuple[threading.Thread, Future[_Result]]:
    outcome: Future[_Result] = Future()
    outcome.set_running_or_notify_cancel()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name=_NAME, daemon=True)
    thread.start()
    return thread, outcome
