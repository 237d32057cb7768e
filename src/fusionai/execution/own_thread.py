"""Heavy work in a thread of its own, which ends with it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


def in_own_thread(work: Callable[[], _Result]) -> _Result:
    """Run `work` in a new thread and return its result. Blocks.

    OpenMP keeps a pool of workers for every thread that ever ran something parallel, for as long as that thread lives.
    With the pools of two threads there are more workers than cores, and GNU's OpenMP then stops spinning between loops:
    measured, a training step in the second thread took up to half as long again. So what is computed once, such as a
    calibration or a capture, does not leave a pool behind.
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
