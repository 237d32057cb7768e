"""Stops commands that run until they are stopped: by Ctrl-C, SIGTERM, or the end of a watched parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from fusionai.cli.parent_watch import on_parent_gone

_SECOND = 130


class Stop(asyncio.Event):
    """Set when the process is asked to end."""

    orphaned = False
    """Whether the watched parent has gone. Then nobody waits for this process, and its peers end as well."""


def stop_event() -> Stop:
    """Return an event that is set when the process is asked to end. A second request ends it at once.

    Call it inside the event loop, in the main thread.
    """
    loop = asyncio.get_running_loop()
    stop = Stop()

    def request() -> None:
        if stop.is_set():
            sys.stderr.write("stopped at once\n")
            sys.stderr.flush()
            os._exit(_SECOND)
        stop.set()

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is not None:
            _handle(loop, number, request)

    def orphaned() -> None:
        stop.orphaned = True
        stop.set()

    on_parent_gone(lambda: _call(loop, orphaned))
    return stop


def leave_at_once(*, json_wanted: bool) -> None:
    """End the process now, from within a signal handler."""
    # Written past Python's buffers, in whose midst the signal may have come. The sequence shows a hidden cursor again.
    screen = 2 if json_wanted else 1
    if os.isatty(screen):
        os.write(screen, b"\x1b[?25h")
    os.write(2, b"error: stopped at once\n")
    if json_wanted:
        message = {"error": "KeyboardInterrupt", "message": "stopped at once"}
        os.write(1, json.dumps(message).encode() + b"\n")
    os._exit(_SECOND)


def _handle(loop: asyncio.AbstractEventLoop, number: signal.Signals, request: Callable[[], None]) -> None:
    try:
        loop.add_signal_handler(number, request)
    except (NotImplementedError, RuntimeError):
        # On Windows the handler runs between byte codes of the main thread, so the loop must be woken to see the event.
        def handler(_number: int, _frame: FrameType | None) -> None:
            _call(loop, request)

        signal.signal(number, handler)


def _call(loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
    """Run `work` on the loop. A closed loop needs no stopping."""
    try:
        loop.call_soon_threadsafe(work)
    except RuntimeError:
        pass
