"""Whether a running job should look for another plan: what has been noticed, and what the broker answers.

The reasons are events (`scheduling.job_events`) that stand until they are acted on; whether one is reason enough is
for `scheduling.recovery` to say. Taking a plan is the running job's affair (`owner.running_job`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from fusionai.errors import FusionError, PlacementError
from fusionai.graph.encoding import encode
from fusionai.owner.membership import OwnerMember
from fusionai.owner.plan_terms import PlanTerms
from fusionai.pool.identifiers import JobId
from fusionai.pool.messages import DeclineReplan, PlanPrepared, PoolChanged, ReplanJob
from fusionai.scheduling import recovery
from fusionai.scheduling.job_events import Came, JobEvent, PlanFailed, Slow, WishesToGo, refusal, sentence
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.recovery import AskForPlan, JobView, RefuseRelief, decide
from fusionai.training.corrections import Corrections, MeasuredPasses
from fusionai.training.driver import RoundResult
from fusionai.training.reports import printable

log = logging.getLogger(__name__)

REPLAN_TIMEOUT_S = 300.0
"""Planning, and every machine's making of its new program."""

_MOST_NAMES = 8
"""Most names of machines that came, whatever the broker sends."""


class PlanSeeker:
    """Notices reasons for another plan, and asks the broker for one when they are reason enough."""

    def __init__(
        self, terms: PlanTerms, member: OwnerMember, job: JobId, plan: Plan, name: Callable[[str], str]
    ) -> None:
        """`name` gives a machine's name by its peer."""
        self.asking: asyncio.Task[PlanPrepared] | None = None
        """The request under way, or answered and not yet read."""
        self.noticed = ""
        """Why the last plan was sought, for people."""
        self.noticed_step = 0
        """Steps done when it was sought."""
        self.came: Came | None = None
        """Who joined since the last plan was sought."""
        self.wish: WishesToGo | None = None
        """Who waits to be relieved."""
        self.relieving: WishesToGo | None = None
        """Who is to be relieved by the plan that is sought. None: the plan must pay for its move."""
        self._terms = terms
        self._member = member
        self._job = job
        self._plan = plan
        self._name = name
        self._corrections = Corrections(plan)
        self._known: dict[str, float] = {}
        """Factors that the running plan reckons with already, by peer."""
        self._sent: dict[str, float] = {}
        self._failed: PlanFailed | None = None
        """Why the last plan could not be taken, so that the next is sought without a further reason."""
        self._attempts = 0
        """Failed ones to relieve who waits now."""
        self._sought = 0
        """Plans that were looked for."""
        self._next_step = 0
        self._done = 0
        self._step_s = 0.0

    # --- what is noticed ----------------------------------------------------------------------------------------

    def hear(self, message: PoolChanged) -> None:
        """Hear that the pool has changed; `look` weighs it between two steps."""
        names = tuple(printable(each[:100]) for each in message.names[:_MOST_NAMES])
        if not message.leaving:
            self.came = Came(names, message.more)
            return
        wish = WishesToGo(", ".join(names))
        refused = [each for each in decide(self._view(), wish) if isinstance(each, RefuseRelief)]
        if refused:
            self.decline(refused[0].because)
        else:
            self.wish = wish

    def observe(self, step: int, result: RoundResult) -> None:
        """Note what the machines took for a training step."""
        times = [
            MeasuredPasses(peer, stage, seconds, report.backward_s.get(stage, 0.0), result.microbatches)
            for peer, report in result.reports.items()
            for stage, seconds in report.forward_s.items()
        ]
        self._corrections.observe(step, times)
        self._step_s = result.seconds

    # --- seeking ------------------------------------------------------------------------------------------------

    def look(self, done: int) -> None:
        """Ask for a plan if there is reason enough; `done` steps are committed."""
        self._done = done
        slow = [Slow(each.peer, each.factor, each.since_step) for each in self._corrections.drifted()]
        standing: list[JobEvent] = [each for each in (self.wish, self.came, *slow, self._failed) if each is not None]
        view = self._view()
        if not any(isinstance(action, AskForPlan) for event in standing for action in decide(view, event)):
            return
        self.noticed_step = done
        # What the broker is told now is known; what changes while it works is a drift of its own.
        self._corrections.settle()
        self.noticed = self._words(slow) or self.noticed
        self.relieving = self.wish
        self.wish, self.came, self._failed = None, None, None
        log.info("looking for a new plan: %s", self.noticed)
        self.asking = asyncio.ensure_future(self._ask(self._terms.steps - done))

    def _words(self, slow: Sequence[Slow]) -> str:
        """Return the reasons that stand, for people: who wishes to go, who came, who drifted."""
        heard = [self._sentence(each) for each in (self.wish, self.came) if each is not None]
        return "; ".join([*heard, *([", ".join(map(self._sentence, slow))] if slow else [])])

    def _sentence(self, event: JobEvent) -> str:
        return sentence(event, name=self._name, who=self._name)

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

    def answer(self, done: int) -> PlanPrepared | None:
        """Return the broker's answer once it is there. Raises FusionError: what the broker said instead."""
        if self.asking is None or not self.asking.done():
            return None
        asking, self.asking = self.asking, None
        self._done = done
        self._next_step = done + recovery.PATIENCE.pause_after(self._sought)
        self._sought += 1
        return asking.result()

    async def close(self) -> None:
        """Stop looking for a plan."""
        if self.asking is not None:
            self.asking.cancel()
            await asyncio.wait({self.asking})
            self.asking = None

    # --- what becomes of the plan -------------------------------------------------------------------------------

    def taken(self, plan: Plan) -> None:
        """The job goes on by the plan that was sought."""
        self._attempts = 0
        self._plan = plan
        self._known = self._sent
        self._corrections = Corrections(plan)

    def failed(self, error: FusionError) -> None:
        """No plan came, or it could not be taken: see to another attempt, or decline where it would fail as well."""
        event = PlanFailed(str(error))
        if self.relieving is None:
            self._failed = event
            return
        self._attempts += 1
        for action in decide(self._view(relieving=True, hopeless=isinstance(error, PlacementError)), event):
            if isinstance(action, RefuseRelief):
                self.decline(action.because)
            elif isinstance(action, AskForPlan):
                self.wish = self.wish or self.relieving

    def none_better(self, reason: str) -> None:
        """The broker knows no other plan that is worth its move; whoever wants to go is told."""
        if self.relieving is not None:
            self.decline(PlanFailed(reason))

    def pays_still(self, prepared: PlanPrepared, done: int) -> bool:
        """Whether a plan gains more than its move takes, over the steps that are left now."""
        share = (self._terms.steps - done) / (self._terms.steps - self.noticed_step)
        return (prepared.gain_s + prepared.move_s) * share > prepared.move_s

    def decline(self, because: WishesToGo | PlanFailed) -> None:
        """Tell the machines that wait to be relieved that nobody can take their parts."""
        reason = refusal(because)
        self.wish, self._attempts = None, 0
        log.warning("a machine that wants to leave cannot be relieved: %s", reason)
        self._member.tell(DeclineReplan(self._job, reason[:500]))

    def _view(self, *, relieving: bool = False, hopeless: bool = False) -> JobView:
        return JobView(
            seen_by="driver",
            patience=recovery.PATIENCE,
            may_replan=self._terms.allowed,
            left_s=(self._terms.steps - self._done) * self._step_s,
            paused=self._done < self._next_step,
            relieving=relieving,
            attempts=self._attempts,
            hopeless=hopeless,
        )
