"""What the broker says to the owner of jobs, handed to whoever drives each of them."""

from __future__ import annotations

from collections.abc import Callable

from fusionai.pool.identifiers import JobId
from fusionai.pool.messages import Reconsider

_MOST_LOST = 64
"""Lost jobs that nobody has asked for yet: the word may come before the launch's answer is read."""


class JobNews:
    """Callbacks by job."""

    def __init__(self) -> None:
        self._on_lost: dict[JobId, Callable[[str], None]] = {}
        self._lost: dict[JobId, str] = {}
        self._on_pool_changed: dict[JobId, Callable[[Reconsider], None]] = {}

    def on_lost(self, job: JobId, callback: Callable[[str], None]) -> None:
        """Have `callback(reason)` called once when a job is given up; at once if it was already."""
        reason = self._lost.pop(job, None)
        if reason is not None:
            callback(reason)
        else:
            self._on_lost[job] = callback

    def lost(self, job: JobId, reason: str, *, keep: bool) -> None:
        """A job is given up. `keep`: remember it for a callback that is still to come."""
        callback = self._on_lost.pop(job, None)
        if callback is not None:
            callback(reason)
        elif keep:
            while len(self._lost) >= _MOST_LOST:
                del self._lost[next(iter(self._lost))]
            self._lost[job] = reason

    def on_pool_changed(self, job: JobId, callback: Callable[[Reconsider], None] | None) -> None:
        """Have a callback called whenever the pool has changed for a job; None: no more."""
        if callback is None:
            self._on_pool_changed.pop(job, None)
        else:
            self._on_pool_changed[job] = callback

    def pool_changed(self, message: Reconsider) -> None:
        """The pool has changed for a job."""
        if (callback := self._on_pool_changed.get(message.job)) is not None:
            callback(message)
