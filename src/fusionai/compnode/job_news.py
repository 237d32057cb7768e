"""What the broker says to the owner of jobs, handed to whoever drives each of them."""

from __future__ import annotations

from collections.abc import Callable

from fusionai.pool.identifiers import JobEpoch, JobId
from fusionai.pool.messages import PoolChanged

_MOST_LOST = 64
"""Lost jobs and plans that nobody has asked for yet: the word may come before the launch's answer is read."""


class JobNews:
    """Callbacks by job, and by plan where a plan is lost without its job."""

    def __init__(self) -> None:
        self._on_lost: dict[JobId | JobEpoch, Callable[[str], None]] = {}
        self._lost: dict[JobId | JobEpoch, str] = {}
        self._on_pool_changed: dict[JobId, Callable[[PoolChanged], None]] = {}

    def on_lost(self, what: JobId | JobEpoch, callback: Callable[[str], None]) -> None:
        """Have `callback(reason)` called once when a job, or one plan of it, is given up; at once if it was already."""
        reason = self._lost.pop(what, None)
        if reason is not None:
            callback(reason)
        else:
            self._on_lost[what] = callback

    def lost(self, what: JobId | JobEpoch, reason: str, *, keep: bool) -> None:
        """A job or a plan is given up. `keep`: remember it for a callback that is still to come."""
        callback = self._on_lost.pop(what, None)
        if callback is not None:
            callback(reason)
        elif keep:
            while len(self._lost) >= _MOST_LOST:
                del self._lost[next(iter(self._lost))]
            self._lost[what] = reason

    def on_pool_changed(self, job: JobId, callback: Callable[[PoolChanged], None] | None) -> None:
        """Have a callback called whenever the pool has changed for a job; None: no more."""
        if callback is None:
            self._on_pool_changed.pop(job, None)
        else:
            self._on_pool_changed[job] = callback

    def pool_changed(self, message: PoolChanged) -> None:
        """The pool has changed for a job."""
        if (callback := self._on_pool_changed.get(message.job)) is not None:
            callback(message)
