"""A running job is planned anew when machines drift, come, or want to go: beside the running plan, and then taken.

Nothing here changes what is computed: a plan is taken between two steps, and every weight and optimizer state with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusionai.errors import FusionError, PlacementError
from fusionai.execution.plane import ProgramOptions
from fusionai.graph.encoding import encode
from fusionai.graph.model import OpDag
from fusionai.owner.machines import machines_of
from fusionai.owner.membership import OwnerMember
from fusionai.pool.identifiers import Epoch, JobEpoch
from fusionai.pool.messages import (
    DeclineReplan,
    ForgetPlan,
    JobLaunched,
    PlanPrepared,
    PoolChanged,
    ReplanJob,
    SwitchPlan,
)
from fusionai.scheduling.corrections import Corrections, Drift, MeasuredPasses
from fusionai.scheduling.plan import Plan
from fusionai.training.driver import Driver, Machine, RoundResult
from fusionai.training.handing_over import hand_over

log = logging.getLogger(__name__)

PAUSE_STEPS = 10
"""Steps after a new plan was taken, refused or failed before the next is sought: its pace must be seen first.

Twice as many after each: on a machine that others use too, what is noticed comes and goes, and plans must not follow.
"""

_MOST_PAUSE_STEPS = 640

LEAST_LEFT_S = 10.0
"""A job that is over sooner, at its present pace, keeps its plan: to make and prepare another takes seconds itself."""

REPLAN_TIMEOUT_S = 300.0
"""Planning, and every machine's making of its new program."""

_MOST_ATTEMPTS = 3
"""To relieve a machine, where plans are found and something fails after that: the machine waits, and may be asked for
once more while others get ready. Where there is no plan, further attempts would find none either."""

_ANSWER_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ReplanEvent:
    """A new plan was taken, or could not be."""

    step: int
    """Steps done before."""
    noticed_step: int
    """Steps done when the reason was noticed, and a new plan asked for."""
    reason: str
    """What was noticed, and why the new plan is better."""
    error: str | None
    """Why the job goes on by the old plan after all; None: the new one runs."""
    plan: Plan
    """The one that runs now."""
    machines: Sequence[Machine]
    names: Mapping[str, str]
    gain_s: float
    """Predicted, over the steps left."""
    bytes_moved: int
    """Weights and optimizer states that went between machines."""
    pause_s: float
    """Time between two steps that the hand-over took."""

    def record(self) -> dict[str, Any]:
        """Return the event for metrics.jsonl."""
        return {
            "step": self.step,
            "replan": {
                "taken": self.error is None,
                "noticed_step": self.noticed_step,
                "reason": self.reason,
                "error": self.error,
                "predicted_gain_s": self.gain_s,
                "bytes_moved": self.bytes_moved,
                "pause_s": self.pause_s,
                "compnodes": [each.name for each in self.machines],
            },
        }


@dataclass(frozen=True, kw_only=True)
class ReplanTerms:
    """What stays the same in every plan of a job."""

    graph: OpDag
    front: int
    back: int
    options: ProgramOptions
    compnodes: int
    """How many to use; 0: as many as serve best."""
    machines: tuple[str, ...] = ()
    """Names of the only ones to use; empty: any."""
    steps: int
    microbatches: int
    allowed: bool
    """Whether the job may be planned anew at all."""


class Replanning:
    """The plans of one job on its owner's side; `driver` is always that of the running one."""

    def __init__(
        self,
        terms: ReplanTerms,
        member: OwnerMember,
        launched: JobLaunched,
        driver: Driver,
        make_driver: Callable[[Epoch, Sequence[Machine]], Driver],
    ) -> None:
        self.driver = driver
        self.names: dict[str, str] = dict(launched.names)
        """Of all machines that had a part so far."""
        self.lab = launched.lab
        self.taken = 0
        """New plans that were taken."""
        self._terms = terms
        self._member = member
        self._job = launched.job
        self._plan = launched.plan
        self._make_driver = make_driver
        self._corrections = Corrections(launched.plan)
        self._known: dict[str, float] = {}
        """Factors that the running plan reckons with already, by peer."""
        self._sent: dict[str, float] = {}
        self._asking: asyncio.Task[PlanPrepared] | None = None
        self._sought = 0
        """Plans that were looked for."""
        self._noticed = ""
        self._noticed_step = 0
        self._next_step = 0
        self._relieving = ""
        """Who is to be relieved by the plan that is sought; empty: nobody, it is to pay."""
        self._attempts = 0
        """Failed ones to relieve who waits now."""
        self._again = False
        """Whether the last attempt failed, so that the next is made without a further drift."""
        self._step_s = 0.0
        self._come = ""
        """Who joined since the last plan was sought."""
        self._leaving = ""
        """Who waits to be relieved."""

    def reconsider(self, message: PoolChanged) -> None:
        """Hear that the pool has changed; `between_steps` looks for a plan then."""
        if not message.leaving:
            self._come = message.reason[:500]
        elif self._terms.allowed:
            self._leaving = message.reason[:500]
        else:
            self._decline("its plan may not be changed (placement.replan, placement.cuts)")

    def _decline(self, reason: str) -> None:
        """Tell the machines that wait to be relieved that nobody can take their parts."""
        self._leaving, self._attempts = "", 0
        log.warning("a machine that wants to leave cannot be relieved: %s", reason)
        self._member.tell(DeclineReplan(self._job, reason[:500]))

    def _failed(self, error: FusionError) -> None:
        """See to another attempt, or decline where it would fail as well."""
        if not self._relieving:
            self._again = True
            return
        self._attempts += 1
        if isinstance(error, PlacementError) or self._attempts >= _MOST_ATTEMPTS:
            self._decline(str(error))
        else:
            self._leaving = self._leaving or self._relieving

    def fail(self, reason: str) -> None:
        """End the job, whichever plan it runs by."""
        self.driver.fail(reason)

    def observe(self, step: int, result: RoundResult) -> None:
        """Note what the machines took for a training step."""
        times = [
            MeasuredPasses(peer, stage, seconds, report.backward_s.get(stage, 0.0), self._terms.microbatches)
            for peer, report in result.reports.items()
            for stage, seconds in report.forward_s.items()
        ]
        self._corrections.observe(step, times)
        self._step_s = result.seconds

    async def between_steps(self, done: int) -> ReplanEvent | None:
        """Take a plan that stands by now, or look for one if there is a reason to; `done` steps are committed.

        A machine that waits to be relieved is reason enough. One that has drifted or joined is, once the last plan's
        pace has been seen and while the job takes `LEAST_LEFT_S` longer.

        Returns what became of a new plan, None while there is none. Raises JobError when the running plan is lost
        meanwhile.
        """
        if self._asking is not None:
            if not self._asking.done():
                return None
            asking, self._asking = self._asking, None
            self._next_step = done + min(PAUSE_STEPS << self._sought, max(PAUSE_STEPS, _MOST_PAUSE_STEPS))
            self._sought = min(self._sought + 1, 32)
            try:
                prepared = asking.result()
            except FusionError as error:
                log.warning("no new plan for the job: %s", error)
                self._failed(error)
                return self._event(done, self._noticed, str(error))
            if prepared.epoch is None or prepared.plan is None:
                log.info("the job keeps its plan (%s): %s", self._noticed, prepared.reason)
                if self._relieving:
                    self._decline(prepared.reason)
                return None
            if not self._relieving and not self._pays_still(prepared, done):
                log.info("the job keeps its plan: too few steps are left for %s", prepared.reason)
                await self._forget(prepared.epoch, "too few steps are left")
                return None
            return await self._take(prepared, prepared.epoch, prepared.plan, done)
        left = self._terms.steps - done
        # A job that is over soon relieves everybody by itself.
        worth = self._terms.allowed and left * self._step_s > LEAST_LEFT_S
        seen = done >= self._next_step
        drifted = self._corrections.drifted()
        if worth and (self._leaving or (seen and (drifted or self._come or self._again))):
            self._noticed_step = done
            # What the broker is told now is known; what changes while it works is a drift of its own.
            self._corrections.settle()
            news = [each for each in (self._leaving, self._come, self._words(drifted)) if each]
            self._noticed = "; ".join(news) or self._noticed
            self._relieving = self._leaving
            self._leaving, self._come, self._again = "", "", False
            log.info("looking for a new plan: %s", self._noticed)
            self._asking = asyncio.ensure_future(self._ask(left))
        return None

    def _words(self, drifted: Sequence[Drift]) -> str:
        return ", ".join(
            f"{self.names.get(each.peer, each.peer[:12])} takes {each.factor:.2f} times as long as planned since "
            f"step {each.since_step + 1}"
            for each in drifted
        )

    async def close(self) -> None:
        """Stop looking for a plan. The plans themselves are ended by their drivers and the broker."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait({self._asking})
            self._asking = None

    async def _ask(self, steps_left: int) -> PlanPrepared:
        # The running plan's predictions hold what was known of a machine when it was made.
        now = {peer: self._known.get(peer, 1.0) * factor for peer, factor in self._corrections.factors().items()}
        self._sent = {**self._known, **now}
        await self._member.send_graph(self._plan.graph_hash, await asyncio.to_thread(encode, self._terms.graph))
        return await self._member.request(
            ReplanJob(
                job=self._job,
                factors=self._sent,
                steps_left=steps_left,
                front=self._terms.front,
                back=self._terms.back,
                options=self._terms.options,
                compnodes=self._terms.compnodes,
                machines=self._terms.machines,
            ),
            PlanPrepared,
            timeout_s=REPLAN_TIMEOUT_S,
        )

    async def _take(self, prepared: PlanPrepared, epoch: Epoch, plan: Plan, done: int) -> ReplanEvent:
        running = self.driver
        new = self._make_driver(epoch, machines_of(self._terms.graph, plan, {**self.names, **prepared.names}))
        self._member.on_plan_lost(JobEpoch(self._job, epoch), new.fail)
        try:
            moved = await hand_over(running, new, self._terms.options.optimizer.states, optimizer_step=done)
            # The broker first: what it does not know to be running, it has released.
            await self._member.request(SwitchPlan(self._job, epoch), None, timeout_s=_ANSWER_TIMEOUT_S)
        except FusionError as error:
            await new.close(f"its plan is not taken: {error}")
            await self._forget(epoch, str(error))
            await running.check()
            log.warning("the new plan could not be taken, the job goes on by the old one: %s", error)
            self._failed(error)
            return self._event(done, f"{self._noticed}; {prepared.reason}", str(error))
        except BaseException:
            await new.close("the owner stopped")
            raise
        self.driver = new
        self.names.update(prepared.names)
        self.lab = self.lab or prepared.lab
        self.taken += 1
        self._attempts = 0
        self._plan = plan
        self._known = self._sent
        self._corrections = Corrections(plan)
        await running.close("the job goes on by a new plan")
        # Of a plan without stages here there is no host that the driver could end.
        await self._member.release(JobEpoch(self._job, running.epoch), "the job goes on by a new plan")
        return self._event(
            done,
            f"{self._noticed}; {prepared.reason}",
            None,
            gain_s=prepared.gain_s,
            bytes_moved=moved.bytes_moved,
            pause_s=moved.seconds,
        )

    def _pays_still(self, prepared: PlanPrepared, done: int) -> bool:
        """Whether a plan gains more than its move takes, over the steps that are left now."""
        share = (self._terms.steps - done) / (self._terms.steps - self._noticed_step)
        return (prepared.gain_s + prepared.move_s) * share > prepared.move_s

    async def _forget(self, epoch: Epoch, reason: str) -> None:
        await self._member.release(JobEpoch(self._job, epoch), "its plan is not taken")
        try:
            await self._member.request(ForgetPlan(self._job, epoch, reason[:500]), None, timeout_s=_ANSWER_TIMEOUT_S)
        except FusionError as error:
            log.warning("the broker could not be told that its plan is not taken: %s", error)

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
            self._noticed_step,
            reason,
            error,
            self._plan,
            self.driver.machines,
            dict(self.names),
            gain_s,
            bytes_moved,
            pause_s,
        )
