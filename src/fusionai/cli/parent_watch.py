"""Ends this process when its parent process ends, for whatever reason, on every operating system.

The parent holds the other end of this process's standard input and writes nothing. When the parent ends, even by a
kill, the system closes the pipe, and reading it ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

GRACE_S = 5.0
"""Seconds that a process may take to end in order. After them it is ended at once."""

_gone = threading.Event()
_callbacks: list[Callable[[], None]] = []
_lock = threading.Lock()


def watch_parent() -> None:
    """End this process when its standard input ends: in order if `on_parent_gone` was called before, else at once."""
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def on_parent_gone(callback: Callable[[], None]) -> None:
    """Call `callback` in another thread when the parent is gone; call it at once if the parent is gone already."""
    with _lock:
        _callbacks.append(callback)
        gone = _gone.is_set()
    if gone:
        callback()


def _watch() -> None:
    try:
        # Do not use sys.stdin here: a waiting daemon thread would hold its lock and break the interpreter's shutdown.
        while os.read(0, 4096):
            pass
    except OSError:
        pass
    with _lock:
        _gone.set()
        callbacks = list(_callbacks)
    for callback in callbacks:
        callback()
    if callbacks:
        threading.Event().wait(GRACE_S)
    os._exit(1)
