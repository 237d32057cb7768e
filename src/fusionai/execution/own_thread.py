"""Heavy work in a thread of its own, which ends with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


def in_own_thread(work: Callable[[], _Result]) -> _Result:
    """Run `work` in a new thread and return its result. Blocks.

    Work that is done once, such as a calibration or a capture, must not leave OpenMP workers behind. OpenMP keeps a
    pool of workers for every thread that ever ran something parallel, as long as the thread lives. With two pools there
    are more workers than cores, and GNU's OpenMP then stops spinning between loops, which makes a training step in the
    other thread up to half as long again.
    """
    outcome: Future[_Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="once", daemon=True)
    thread.start()
    thread.join()
    return outcome.result()
