"""Ending with the parent process, however that ends, on every system.

The parent holds the other end of this process's standard input and writes nothing. When it is gone, even killed, the
system closes the pipe, and reading it ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

GRACE_S = 5.0
"""What a process may take to end in order before it is ended at once."""

_gone = threading.Event()
_callbacks: list[Callable[[], None]] = []
_lock = threading.Lock()


def watch_parent() -> None:
    """Have this process end when its standard input does: in order where `on_parent_gone` was called, else at once."""
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def on_parent_gone(callback: Callable[[], None]) -> None:
    """Have `callback` called, in another thread, when the parent is gone; at once if it is."""
    with _lock:
        _callbacks.append(callback)
        gone = _gone.is_set()
    if gone:
        callback()


def _watch() -> None:
    try:
        # Not through sys.stdin: its lock, held by a waiting daemon thread, would break the interpreter's shutdown.
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
