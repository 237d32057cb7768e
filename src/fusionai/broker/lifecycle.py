"""The life of jobs once they are launched: progress, ends, and the loss of machines.

Tensors do not pass through the broker, so a lost connection with it is not yet the death of a machine: a job is
given up only when one of its machines has been gone for the grace time. Machines that really died are noticed
sooner, by the job's driver, at its own links. After a restart of the broker all machines are gone for a while; the
grace is longer then.
"""

from __future__ import annotations

import asyncio
import logging

from fusionai.broker.pool_state import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import OVER, PRESENT, JobRecord, JobState, Preparation
from fusionai.errors import JobError, ProtocolError
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobId
from fusionai.pool.messages import Heartbeat, JobEnded, JobLost, JobProgress, PlanLost, ReleaseShare
from fusionai.scheduling.job_events import JobEvent, Left, Lost, sentence
from fusionai.scheduling.recovery import DropPlan, EndJob, JobView, LookAgain, Patience, decide

log = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 0.5
"""Shortest time between two reports of progress that count. They are for people, so earlier ones are ignored."""


class Lifecycle:
    """Ends a job when its owner says so, or when a machine of it is lost."""

    def __init__(self, state: PoolState, prober: Prober, *, patience: Patience) -> None:
        self._state = state
        self._prober = prober
        self._patience = patience
        self._waiting: dict[PeerId, asyncio.Task[None]] = {}
        self._progress_s: dict[JobId, float] = {}
        self._releasing: set[PeerId] = set()
        """Members to which orders to drop jobs are on their way; they get no more until the last has arrived."""

    # --- what happens to members ------------------------------------------------------------------------------

    def recover(self) -> None:
        """After a restart: wait for the machines of running jobs."""
        for record in self._state.jobs.active():
            if record.state == "launching":
                self.finish(record.job, "failed", "the broker restarted while it launched the job")
                continue
            # A plan that was being prepared is given up; machines that hold shares of it are told at their heartbeat.
            record = self._without_preparation(record)
            for peer in (record.owner, *record.compnodes):
                if peer != record.owner:
                    self._state.registry.lease(peer, record.job)
                self._consider(Lost(peer, "it did not come back after the broker's restart"), restarted=True)

    def returned(self, peer: PeerId) -> None:
        """A member has registered, perhaps again."""
        waiting = self._waiting.pop(peer, None)
        if waiting is not None:
            waiting.cancel()

    def gone(self, peer: PeerId, why: str, *, for_good: bool) -> None:
        """A member's link is lost, or with `for_good` it has left."""
        self._consider(Left(peer, why) if for_good else Lost(peer, why))

    def _consider(self, event: Lost | Left, *, waited_s: float = 0.0, restarted: bool = False) -> None:
        """Act on the absence of a member, for every job that the member takes part in."""
        peer = PeerId(event.peer)
        for record in self._jobs_of(peer):
            view = JobView(
                seen_by="broker",
                patience=self._patience,
                owner=record.owner,
                machines=frozenset(record.compnodes),
                prepared=frozenset(record.leased.keys() - record.compnodes.keys()),
                waited_s=waited_s,
                restarted=restarted,
            )
            for action in decide(view, event):
                match action:
                    case LookAgain(seconds):
                        self._look_again(event, seconds, waited_s=waited_s + seconds, restarted=restarted)
                    case DropPlan(because):
                        self.forget(record.job, self._sentence(record, because), tell_owner=True)
                    case EndJob(because):
                        self.finish(record.job, "failed", self._sentence(record, because))
                    case _:
                        raise AssertionError(f"a broker does not {type(action).__name__}")

    def _look_again(self, event: Lost | Left, seconds: float, *, waited_s: float, restarted: bool) -> None:
        peer = PeerId(event.peer)

        async def later() -> None:
            await asyncio.sleep(seconds)
            self._waiting.pop(peer, None)
            self._consider(event, waited_s=waited_s, restarted=restarted)

        if peer not in self._waiting:
            task = self._state.tasks.start(later(), "grace")
            if task is not None:
                self._waiting[peer] = task

    def _jobs_of(self, peer: PeerId) -> list[JobRecord]:
        """Return the jobs that a member owns, and the one that it is leased to."""
        job = self._state.registry.job_of(peer)
        leased = None if job is None else self._state.jobs.get(job)
        return [*self._state.jobs.of_owner(peer), *([] if leased is None else [leased])]

    def _sentence(self, record: JobRecord, event: JobEvent) -> str:
        def name(peer: str) -> str:
            return record.leased.get(PeerId(peer)) or self._state.registry.name(PeerId(peer))

        def who(peer: str) -> str:
            if peer == record.owner:
                return f"the owner {name(peer)}"
            held = self._held(PeerId(peer), record) if peer in record.compnodes else ""
            return f"compnode {name(peer)} ({held})" if held else f"compnode {name(peer)}"

        return sentence(event, name=name, who=who)

    def _held(self, peer: PeerId, record: JobRecord) -> str:
        """Return the line for people that a compnode last sent of its share of a job's running plan; "" if none."""
        told = [each for each in self._state.registry.activity(peer).holds if each.job == record.job]
        return next((each.line for each in told if each.epoch == record.epoch), "")

    # --- what members say -------------------------------------------------------------------------------------

    def heartbeat(self, peer: PeerId, message: Heartbeat) -> None:
        """Compare what a compnode holds with what it should hold."""
        leased = self._state.registry.job_of(peer)
        unwanted = []
        for held in message.holds:
            record = self._state.jobs.get(held.job)
            if record is None or record.state in OVER:
                reason = "the broker does not know it" if record is None else f"it is {record.state}"
                unwanted.append(ReleaseShare(held.job, held.epoch, reason))
            elif record.job != leased or held.epoch not in record.epochs:
                unwanted.append(ReleaseShare(held.job, held.epoch, "its job goes on by another plan"))
        if unwanted and peer not in self._releasing and (task := self._state.tell(peer, *unwanted)) is not None:
            self._releasing.add(peer)
            task.add_done_callback(lambda _: self._releasing.discard(peer))
        record = None if leased is None else self._state.jobs.get(leased)
        taking_part = record is not None and record.state == "running" and peer in record.compnodes
        if record is not None and taking_part and not any(each.job == record.job for each in message.holds):
            # It dropped the job by itself: the owner is gone, or its part failed and the owner knows.
            self._free(peer, record.job)

    def progress(self, peer: PeerId, message: JobProgress) -> None:
        """Note the progress of a job."""
        record = self.owned(peer, message.job)
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
        record = self.owned(peer, message.job)
        if record.state not in OVER:
            self.finish(record.job, message.state, message.reason[:2000], tell_owner=False)

    def owned(self, peer: PeerId, job: JobId) -> JobRecord:
        """Return an owner's job. Raises ProtocolError when it has none of that id."""
        record = self._state.jobs.get(job)
        if record is None or record.owner != peer:
            raise ProtocolError(f"{self._state.registry.name(peer)} owns no job {job[:40]!r}")
        return record

    # --- a new plan ---------------------------------------------------------------------------------------------

    def prepare(self, job: JobId, preparation: Preparation) -> None:
        """Note a plan that is to follow the running one, and lease the machines that it takes in."""
        record = self._state.jobs.get(job)
        assert record is not None
        for peer in preparation.compnodes:
            self._state.registry.lease(peer, job)
        self._state.jobs.change(
            job,
            preparing=preparation,
            prepared=record.prepared + 1,
            epochs=(record.epochs[-1], preparation.epoch),
        )

    def switch(self, job: JobId, epoch: Epoch) -> None:
        """Make the prepared plan the running one, and free the machines that it does without.

        Raises JobError when that plan is not prepared, or not any more.
        """
        record = self._state.jobs.get(job)
        preparing = None if record is None else record.preparing
        if record is None or preparing is None or preparing.epoch != epoch:
            raise JobError(f"no plan {epoch} is prepared for job {job[:40]}; go on with the running one")
        self._state.jobs.change(job, compnodes=preparing.compnodes, plan=preparing.plan, preparing=None)
        log.info("job %s (%s) goes on by a new plan", job, record.name)
        for peer in record.compnodes.keys() - preparing.compnodes.keys():
            self._state.tell(peer, *_releases(record, "its job goes on without it"))
            self._free(peer, job)

    def forget(self, job: JobId, reason: str, *, tell_owner: bool) -> None:
        """Drop the plan that is prepared for a job, if there is one; the job goes on."""
        record = self._state.jobs.get(job)
        if record is None or record.preparing is None:
            return
        preparing = record.preparing
        kept = self._without_preparation(record)
        log.info("job %s (%s) keeps its plan: %s", job, record.name, reason)
        if tell_owner:
            self._state.tell(record.owner, PlanLost(job, preparing.epoch, reason))
        for peer in (record.owner, *record.leased):
            self._state.tell(peer, ReleaseShare(job, preparing.epoch, reason))
        for peer in record.leased.keys() - kept.compnodes.keys():
            self._free(peer, job)

    def _without_preparation(self, record: JobRecord) -> JobRecord:
        if record.preparing is None:
            return record
        held = tuple(each for each in record.epochs if each != record.preparing.epoch)
        return self._state.jobs.change(record.job, preparing=None, epochs=held or (FIRST_EPOCH,))

    # --- the end ----------------------------------------------------------------------------------------------

    def finish(self, job: JobId, state: JobState, reason: str, *, tell_owner: bool = True) -> None:
        """End a job: note it, free its compnodes, tell everybody who takes part."""
        before = self._state.jobs.change(job, state=state, reason=reason)
        record = self._without_preparation(before)
        log.info("job %s (%s) is %s%s", job, record.name, state, f": {reason}" if reason else "")
        self._progress_s.pop(job, None)
        if tell_owner:
            self._state.tell(record.owner, JobLost(job, reason))
        if before.preparing is not None:
            self._state.tell(record.owner, ReleaseShare(job, before.preparing.epoch, reason or f"the job is {state}"))
        for peer in before.leased:
            self._state.tell(peer, *_releases(before, reason or f"the job is {state}"))
            self._free(peer, job)
        if not self._state.jobs.of_owner(record.owner):
            self.returned(record.owner)

    def _free(self, peer: PeerId, job: JobId) -> None:
        if self._state.registry.release(peer, job):
            self.returned(peer)
            record = self._state.registry.get(peer)
            if record is not None and record.state in PRESENT:
                self._prober.consider(peer)


def _releases(record: JobRecord, reason: str) -> list[ReleaseShare]:
    """Return the messages that make a machine drop every share that it may hold of a job."""
    return [ReleaseShare(record.job, epoch, reason) for epoch in record.epochs]
