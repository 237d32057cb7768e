"""The life of jobs once they are launched: progress, ends, and the loss of machines.

Tensors do not pass through the broker, so a lost connection with it is not yet the death of a machine: a job is
given up only when one of its machines has been gone for the grace time. Machines that really died are noticed
sooner, by the job's driver, at its own links. After a restart of the broker all machines are gone for a while; the
grace is longer then.
"""

from __future__ import annotations

import asyncio
import logging

from fusionai.broker.messages import Heartbeat, JobEnded, JobLost, JobProgress, Release
from fusionai.broker.pool import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import OVER, PRESENT, JobRecord, JobState
from fusionai.errors import ProtocolError
from fusionai.network.identity import PeerId
from fusionai.training.messages import JobId

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.5
"""An owner that tells more often than this is not heard: what it says is for people."""


class Lifecycle:
    """Ends jobs, by what members say and by what happens to them."""

    def __init__(self, state: PoolState, prober: Prober, *, grace_s: float, recovery_s: float) -> None:
        self._state = state
        self._prober = prober
        self._grace_s = grace_s
        self._recovery_s = recovery_s
        self._waiting: dict[PeerId, asyncio.Task[None]] = {}
        self._progress_s: dict[JobId, float] = {}
        self._releasing: set[PeerId] = set()
        """Members that are being told to drop jobs; one that does not listen is told nothing more meanwhile."""

    # --- what happens to members ------------------------------------------------------------------------------

    def recover(self) -> None:
        """After a restart: wait for the machines of running jobs."""
        for record in self._state.jobs.active():
            if record.state == "launching":
                self.finish(record.job, "failed", "the broker restarted while it launched the job")
                continue
            for peer in (record.owner, *record.compnodes):
                if peer != record.owner:
                    self._state.registry.lease(peer, record.job)
                self._wait(peer, self._recovery_s, "it did not come back after the broker's restart")

    def returned(self, peer: PeerId) -> None:
        """A member has registered, perhaps again."""
        waiting = self._waiting.pop(peer, None)
        if waiting is not None:
            waiting.cancel()

    def gone(self, peer: PeerId, why: str, *, for_good: bool) -> None:
        """A member's link is lost, or with `for_good` it has left."""
        if self._state.registry.job_of(peer) is None and not self._state.jobs.of_owner(peer):
            return
        if for_good:
            self._give_up(peer, why)
        else:
            self._wait(peer, self._grace_s, why)

    def _wait(self, peer: PeerId, patience_s: float, why: str) -> None:
        if peer not in self._waiting:
            task = self._state.tasks.start(self._give_up_later(peer, patience_s, why), "grace")
            if task is not None:
                self._waiting[peer] = task

    async def _give_up_later(self, peer: PeerId, patience_s: float, why: str) -> None:
        await asyncio.sleep(patience_s)
        self._waiting.pop(peer, None)
        self._give_up(peer, why)

    def _give_up(self, peer: PeerId, why: str) -> None:
        name = self._state.registry.name(peer)
        for record in self._state.jobs.of_owner(peer):
            self.finish(record.job, "failed", f"the owner {name} is lost: {why}")
        job = self._state.registry.job_of(peer)
        record_of_job = None if job is None else self._state.jobs.get(job)
        if record_of_job is not None:
            held = self._state.registry.activity(peer).holds.get(record_of_job.job, "")
            name = record_of_job.compnodes.get(peer, name)
            what = f"compnode {name} ({held})" if held else f"compnode {name}"
            self.finish(record_of_job.job, "failed", f"{what} is lost: {why}")

    # --- what members say -------------------------------------------------------------------------------------

    def heartbeat(self, peer: PeerId, message: Heartbeat) -> None:
        """Compare what a compnode holds with what it should hold."""
        leased = self._state.registry.job_of(peer)
        unwanted = []
        for held in message.holds:
            record = self._state.jobs.get(JobId(held))
            if record is None or record.state in OVER:
                reason = "the broker does not know it" if record is None else f"it is {record.state}"
                unwanted.append(Release(JobId(held), reason))
        if unwanted and peer not in self._releasing and (task := self._state.tell(peer, *unwanted)) is not None:
            self._releasing.add(peer)
            task.add_done_callback(lambda _: self._releasing.discard(peer))
        record = None if leased is None else self._state.jobs.get(leased)
        if record is not None and record.state == "running" and record.job not in message.holds:
            # It dropped the job by itself: the owner is gone, or its part failed and the owner knows.
            self._free(peer, record.job)

    def progress(self, peer: PeerId, message: JobProgress) -> None:
        """Note how far a job is."""
        record = self._owned(peer, message.job)
        now_s = self._state.now_s()
        last = message.step >= message.steps
        too_soon = now_s - self._progress_s.get(record.job, 0.0) < _PROGRESS_EVERY_S
        if record.state != "running" or (too_soon and not last):
            return
        self._progress_s[record.job] = now_s
        self._state.jobs.change(
            record.job,
            step=message.step,
            steps=message.steps,
            loss=message.loss,
            tokens_per_s=message.tokens_per_s,
        )

    def ended(self, peer: PeerId, message: JobEnded) -> None:
        """The owner says that its job is over."""
        record = self._owned(peer, message.job)
        if record.state not in OVER:
            self.finish(record.job, message.state, message.reason[:2000], tell_owner=False)

    def _owned(self, peer: PeerId, job: JobId) -> JobRecord:
        record = self._state.jobs.get(job)
        if record is None or record.owner != peer:
            raise ProtocolError(f"{self._state.registry.name(peer)} owns no job {job[:40]!r}")
        return record

    # --- the end ----------------------------------------------------------------------------------------------

    def finish(self, job: JobId, state: JobState, reason: str, *, tell_owner: bool = True) -> None:
        """End a job: note it, free its compnodes, tell everybody who takes part."""
        record = self._state.jobs.change(job, state=state, reason=reason)
        log.info("job %s (%s) is %s%s", job, record.name, state, f": {reason}" if reason else "")
        self._progress_s.pop(job, None)
        if tell_owner:
            self._state.tell(record.owner, JobLost(job, reason))
        for peer in record.compnodes:
            self._state.tell(peer, Release(job, reason or f"the job is {state}"))
            self._free(peer, job)
        if not self._state.jobs.of_owner(record.owner):
            self.returned(record.owner)

    def _free(self, peer: PeerId, job: JobId) -> None:
        if self._state.registry.release(peer, job):
            self.returned(peer)
            record = self._state.registry.get(peer)
            if record is not None and record.state in PRESENT:
                self._prober.consider(peer)
