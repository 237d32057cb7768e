"""Ctrl-C and SIGTERM of an owner: they end its job in order."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

from fusionai.network.loop import run as run_loop
from fusionai.owner.resuming import what_is_left
from fusionai.owner.run_folder import RunFolder
from fusionai.owner.stop_request import JobStopped, StopRequest, TrainingInterrupted

_Result = TypeVar("_Result")

_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")


def run_interruptibly(
    main: Callable[[StopRequest], Coroutine[Any, Any, _Result]],
    folder: RunFolder,
    *,
    python: bool,
    second: Callable[[], None] | None = None,
) -> _Result:
    """Run a job on an event loop of its own, and end it in order on Ctrl-C or SIGTERM. Blocks.

    Args:
        main: trains; ends when the request that it gets says so.
        folder: of the run, for what the error says.
        python: whether the caller is a program (and not the command line). Signals for which the program has set
            handlers of its own are left to them.
        second: called in the signal handler on the second signal; without it, the second leaves without waiting for
            the step, and the third raises KeyboardInterrupt wherever the program is.

    Raises:
        TrainingInterrupted: the job ended early because of a signal.
        FusionError: as `main`.
    """
    request: StopRequest | None = None

    async def guarded() -> _Result:
        nonlocal request
        request = StopRequest()
        signals.attach(asyncio.get_running_loop(), request)
        try:
            return await main(request)
        finally:
            signals.detach()
            request.close()

    with _Signals(second, replace_handlers=not python) as signals:
        try:
            return run_loop(guarded())
        except JobStopped as stopped:
            raise TrainingInterrupted(str(stopped)) from None
        except asyncio.CancelledError:
            if request is None or not request.asked:
                raise
            left = what_is_left(folder.path, python=python)
            raise TrainingInterrupted(f"interrupted {request.moment}; {left}") from None


class _Signals:
    """Has signals ask for a stop, while this is entered. In other threads than the main one it does nothing."""

    def __init__(self, second: Callable[[], None] | None, *, replace_handlers: bool) -> None:
        self._second = second
        self._replace_handlers = replace_handlers
        self._before: dict[signal.Signals, Any] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._request: StopRequest | None = None
        self._count = 0

    def attach(self, loop: asyncio.AbstractEventLoop, request: StopRequest) -> None:
        """Signals go to this request from now on. Before, they raise KeyboardInterrupt."""
        self._loop, self._request = loop, request

    def detach(self) -> None:
        """The job is over: signals raise KeyboardInterrupt again."""
        self._loop = self._request = None

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and self._is_ours(signal.getsignal(number)):
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _is_ours(self, handler: Any) -> bool:
        """Whether a signal with this handler may be taken over. A shell has background jobs ignore SIGINT."""
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            return True
        return self._replace_handlers and callable(handler) and handler is not signal.SIG_IGN

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two byte codes of whatever runs there."""
        self._count += 1
        if self._count > 1 and self._second is not None:
            self._second()
        elif self._loop is None or self._request is None:
            raise KeyboardInterrupt
        elif self._count == 1:
            self._loop.call_soon_threadsafe(self._request.ask)
        elif self._count == 2:
            self._loop.call_soon_threadsafe(self._request.ask_at_once)
        else:
            raise KeyboardInterrupt
