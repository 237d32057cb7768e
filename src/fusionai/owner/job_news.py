"""What the broker says to the owner of jobs, handed to whoever drives each of them."""

from __future__ import annotations

from collections.abc import Callable

from fusionai.network.endpoint import Link
from fusionai.pool.codec import decode, kind_of
from fusionai.pool.identifiers import JobEpoch, JobId
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import JobLost, PlanLost, PoolChanged, ReleaseShare
from fusionai.training.reports import printable

_MOST_LOST = 64
"""Lost jobs and plans that nobody has asked for yet: the word may come before the launch's answer is read."""


class JobNews(MemberPart):
    """The part of an owner's member that calls whoever wants to hear what becomes of a job, or of one plan of it."""

    broker_kinds = frozenset({kind_of(each) for each in (JobLost, PlanLost, ReleaseShare, PoolChanged)})

    def __init__(self) -> None:
        self._on_lost: dict[JobId | JobEpoch, Callable[[str], None]] = {}
        self._lost: dict[JobId | JobEpoch, str] = {}
        self._on_pool_changed: dict[JobId, Callable[[PoolChanged], None]] = {}

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Call whoever the broker's word concerns. A share that is released is a plan that is lost."""
        if kind == kind_of(PoolChanged):
            self.pool_changed(decode(PoolChanged, payload))
        elif kind == kind_of(JobLost):
            lost = decode(JobLost, payload)
            self.lost(lost.job, lost.reason)
        else:
            over = decode(PlanLost, payload) if kind == kind_of(PlanLost) else decode(ReleaseShare, payload)
            self.lost(JobEpoch(over.job, over.epoch), over.reason)

    def on_lost(self, what: JobId | JobEpoch, callback: Callable[[str], None] | None) -> None:
        """Have `callback(reason)` called once when a job, or one plan of it, is given up; at once if it was already.
        None: no more, since it is over."""
        if callback is None:
            self._on_lost.pop(what, None)
            return
        reason = self._lost.pop(what, None)
        if reason is not None:
            callback(reason)
        else:
            self._on_lost[what] = callback

    def lost(self, what: JobId | JobEpoch, reason: str) -> None:
        """A job or a plan is given up; it is remembered for a callback that is still to come."""
        reason = printable(reason)
        callback = self._on_lost.pop(what, None)
        if callback is not None:
            callback(reason)
        else:
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
