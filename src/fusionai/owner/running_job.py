"""A job while it runs, on its owner's side: the driver of its present plan, and the change to another plan.

The training loop asks the running job for its driver before every step, and between two steps lets it go over to
another plan. Nothing here changes what is computed: every weight and optimizer state goes with the job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Literal

from msgspec.structs import replace

from fusionai.errors import FusionError, JobError, NetworkError
from fusionai.owner.machines import machines_of
from fusionai.owner.membership import OwnerMember
from fusionai.owner.plan_check import accepted, accepted_next, check_job_id, check_share
from fusionai.owner.plan_seeking import PlanSeeker
from fusionai.owner.plan_terms import PlanTerms
from fusionai.owner.replan_event import ReplanEvent
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobEpoch, JobId
from fusionai.pool.messages import ForgetPlan, JobEnded, JobLaunched, PlanPrepared, SwitchPlan
from fusionai.scheduling.job_events import GivenUp
from fusionai.scheduling.plan import Plan
from fusionai.training.assignment_parcels import Assignment
from fusionai.training.driver import Driver, RoundResult
from fusionai.training.handing_over import hand_over
from fusionai.training.machine import Machine
from fusionai.training.reports import printable

log = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 10.0


class RunningJob:
    """One launched job. Make it when the broker has answered the submission, and in the end `await close(...)`."""

    def __init__(
        self,
        terms: PlanTerms,
        member: OwnerMember,
        launched: JobLaunched,
        make_driver: Callable[[Epoch, Sequence[Machine]], Driver],
    ) -> None:
        """`make_driver` makes the driver of each plan of this job.

        Raises JobError when the plan, or this machine's share of it, is not what the owner asked for
        (`owner.plan_check`). Nothing has been sent to any other machine then.
        """
        me = member.identity.peer_id
        check_job_id(launched.job)
        self.job: JobId = launched.job
        self.plan: Plan = accepted(terms, launched.plan, launched.names, me)
        """The plan that the job runs by."""
        self.names: dict[str, str] = {me: member.name, **launched.names}
        """Names of all machines that had a part so far, by peer."""
        self.lab = launched.lab
        """Whether any of them emulates its speed or its links."""
        self.taken = 0
        """New plans that were taken."""
        self._terms = terms
        self._member = member
        self._make_driver = make_driver
        lost: list[str] = []
        member.on_job_lost(launched.job, lost.append)
        if lost:
            raise JobError(lost[0])
        self.driver = self._driver_of(FIRST_EPOCH, self.plan, self.names, running=frozenset())
        """The driver of `plan`."""
        self.seeker = PlanSeeker(terms, member, launched.job, self.plan, self._name)
        member.on_job_lost(launched.job, self._given_up)
        member.on_pool_changed(launched.job, self.seeker.hear)

    @property
    def epoch(self) -> Epoch:
        """Epoch of the plan that the job runs by."""
        return self.driver.epoch

    def observe(self, step: int, result: RoundResult) -> None:
        """Note what the machines took for a training step."""
        self.seeker.observe(step, result)

    async def between_steps(self, done: int) -> ReplanEvent | None:
        """Take a plan that stands by now, or look for one if there is a reason to; `done` steps are committed.

        Returns what became of a new plan, None while there is none. Raises JobError when the running plan is lost
        meanwhile, and when the new plan is not what the owner asked for.
        """
        if self.seeker.asking is None:
            self.seeker.look(done)
            return None
        try:
            prepared = self.seeker.answer(done)
        except FusionError as error:
            log.warning("no new plan for the job: %s", error)
            self.seeker.failed(error)
            return self._event(done, self.seeker.noticed, str(error))
        if prepared is None:
            return None
        prepared = replace(prepared, reason=printable(prepared.reason))
        if prepared.epoch is None or prepared.plan is None:
            log.info("the job keeps its plan (%s): %s", self.seeker.noticed, prepared.reason)
            self.seeker.none_better(prepared.reason)
            return None
        plan = accepted_next(self._terms, prepared, self._member.identity.peer_id, after=self.epoch)
        if self.seeker.relieving is None and not self.seeker.pays_still(prepared, done):
            log.info("the job keeps its plan: too few steps are left for %s", prepared.reason)
            await self._forget(prepared.epoch, "too few steps are left")
            return None
        return await self._take(prepared, prepared.epoch, plan, done)

    async def close(self, state: Literal["finished", "failed", "cancelled"], reason: str) -> None:
        """End the job on every machine that can still be reached, and tell the broker how it ended."""
        self._member.on_pool_changed(self.job, None)
        self._member.on_job_lost(self.job, None)
        await self.seeker.close()
        await self.driver.close(reason or state)
        # Of a plan without stages here there is no host that the driver could end.
        await self._member.release(JobEpoch(self.job, self.driver.epoch), reason or state)
        await tell_end(self._member, self.job, state, reason)

    # --- inside -----------------------------------------------------------------------------------------------

    def _driver_of(self, epoch: Epoch, plan: Plan, names: Mapping[str, str], *, running: Set[str]) -> Driver:
        """Return the driver of an accepted plan. `running` are the peers of the plan that it follows.

        Raises JobError when this machine's share of the plan is not what the plan says.
        """
        of, hosting = JobEpoch(self.job, epoch), self._member.hosting
        share = hosting.work(of)
        if share is not None and not isinstance(share, Assignment):
            raise JobError("the broker gave the owner's own machine work of another kind than training; leave its pool")
        check_share(self._terms, plan, share, self._member.identity.peer_id, running)
        if share is not None and share.share.subdags and hosting.host(of) is None:
            raise JobError("the broker says that the job is launched, but the owner's own stages are not made yet")
        driver = self._make_driver(epoch, machines_of(self._terms.graph, plan, names))
        # In the same turn of the loop: another share cannot take the place of the one that was checked.
        self._member.wire.seal(of)
        return driver

    async def _take(self, prepared: PlanPrepared, epoch: Epoch, plan: Plan, done: int) -> ReplanEvent:
        """Go over to a plan that is prepared, between two steps."""
        running = self.driver
        noticed = f"{self.seeker.noticed}; {prepared.reason}"
        of = JobEpoch(self.job, epoch)
        if self._member.hosting.work(of) is None:
            error = JobError("the broker has released this machine's share of the new plan already")
            return await self._not_taken(epoch, error, done, noticed)
        new = self._driver_of(epoch, plan, {**self.names, **prepared.names}, running=self.plan.peers)
        self._member.on_plan_lost(of, lambda reason: new.happened(GivenUp(reason)))
        try:
            moved = await hand_over(running, new, self._terms.options.optimizer.states, optimizer_step=done)
            # The broker first: what it does not know to be running, it has released.
            await self._member.request(SwitchPlan(self.job, epoch), None, timeout_s=_ANSWER_TIMEOUT_S)
        except FusionError as error:
            await new.close(f"its plan is not taken: {error}")
            return await self._not_taken(epoch, error, done, noticed)
        except BaseException:
            await new.close("the owner stopped")
            raise
        finally:
            self._member.on_plan_lost(of, None)
        self.driver = new
        self.plan = plan
        self.names.update(prepared.names)
        self.lab = self.lab or prepared.lab
        self.taken += 1
        self.seeker.taken(plan)
        await running.close("the job goes on by a new plan")
        # Of a plan without stages here there is no host that the driver could end.
        await self._member.release(JobEpoch(self.job, running.epoch), "the job goes on by a new plan")
        return self._event(
            done,
            noticed,
            None,
            gain_s=prepared.gain_s,
            bytes_moved=moved.bytes_moved,
            pause_s=moved.seconds,
        )

    async def _not_taken(self, epoch: Epoch, error: FusionError, done: int, noticed: str) -> ReplanEvent:
        """Go on by the running plan. Raises JobError when that is lost too."""
        await self._forget(epoch, str(error))
        await self.driver.watch.check()
        log.warning("the new plan could not be taken, the job goes on by the old one: %s", error)
        self.seeker.failed(error)
        return self._event(done, noticed, str(error))

    async def _forget(self, epoch: Epoch, reason: str) -> None:
        await self._member.release(JobEpoch(self.job, epoch), "its plan is not taken")
        try:
            await self._member.request(ForgetPlan(self.job, epoch, reason[:500]), None, timeout_s=_ANSWER_TIMEOUT_S)
        except FusionError as error:
            log.warning("the broker could not be told that its plan is not taken: %s", error)

    def _given_up(self, reason: str) -> None:
        """The broker has given the job up: end it, whichever plan it runs by."""
        self.driver.happened(GivenUp(reason))

    def _name(self, peer: str) -> str:
        return self.names.get(peer, peer[:12])

    def _event(
        self,
        done: int,
        reason: str,
        error: str | None,
        *,
        gain_s: float = 0.0,
        bytes_moved: int = 0,
        pause_s: float = 0.0,
    ) -> ReplanEvent:
        return ReplanEvent(
            done,
            self.seeker.noticed_step,
            reason,
            error,
            self.plan,
            self.driver.machines,
            dict(self.names),
            gain_s,
            bytes_moved,
            pause_s,
        )


async def tell_end(
    member: OwnerMember, job: JobId, state: Literal["finished", "failed", "cancelled"], reason: str
) -> None:
    """Tell the broker that a job is over; a broker that is away finds out by itself."""
    try:
        await member.request(JobEnded(job, state, reason), None, timeout_s=_END_TIMEOUT_S)
    except NetworkError as error:
        log.warning("the broker could not be told that the job ended: %s", error)
