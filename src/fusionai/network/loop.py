"""The event loop: uvloop where it is installed, asyncio's own elsewhere (Windows)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return the function that makes the fastest event loop of this machine; None stands for asyncio's default."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def run(main: Coroutine[Any, Any, _Result]) -> _Result:
    """Run `main` to its end, like `asyncio.run`.

    The first Ctrl-C cancels `main`, so that its `finally` blocks run, and then raises KeyboardInterrupt.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)
