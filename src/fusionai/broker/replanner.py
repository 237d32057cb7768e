"""New plans for running jobs: made for the machines as they are now, and handed out while the old plan still runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from fusionai.broker.able_machines import obstacles
from fusionai.broker.assigning import assignments
from fusionai.broker.handing_out import hand_out
from fusionai.broker.launching import GRAPH_TIMEOUT_S, Launcher, candidate, decoded
from fusionai.broker.lifecycle import Lifecycle
from fusionai.broker.planning import training_problem, with_history
from fusionai.broker.pool_state import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import JobRecord, MemberRecord, Preparation
from fusionai.errors import JobError
from fusionai.graph.cuts import cut
from fusionai.graph.model import OpDag
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import Epoch, JobEpoch, JobId
from fusionai.pool.messages import PlanPrepared, ReleaseShare, ReplanJob
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import PlanLimits
from fusionai.scheduling.profile import AccessProfile, Member, Pool
from fusionai.scheduling.replanning import Replanned, replanned
from fusionai.training.corrections import corrected
from fusionai.training.weight_routes import keys_by_peer, routes

log = logging.getLogger(__name__)


class Replanner:
    """Prepares new plans of running jobs, one at a time for each."""

    def __init__(self, state: PoolState, prober: Prober, lifecycle: Lifecycle, launcher: Launcher) -> None:
        self._state = state
        self._prober = prober
        self._lifecycle = lifecycle
        self._launcher = launcher
        self._working: set[JobId] = set()

    async def prepare(self, owner: MemberRecord, message: ReplanJob) -> PlanPrepared:
        """Look for a better plan; when this returns one, its machines hold their shares and are linked.

        Raises:
            JobError: the job is not running, or a plan is prepared for it already.
            FusionError: what a machine answered. Nobody holds anything of the new plan then.
        """
        record = self._lifecycle.owned(owner.peer, message.job)
        if record.state != "running" or record.plan is None:
            raise JobError(f"the job is {record.state}: only a running one can go on by another plan")
        if record.preparing is not None or record.job in self._working:
            raise JobError("another plan is prepared for this job already")
        self._working.add(record.job)
        try:
            graph_hash = record.plan.graph_hash
            data = await self._launcher.graphs.take(owner.peer, graph_hash, timeout_s=GRAPH_TIMEOUT_S)
            graph = await asyncio.to_thread(decoded, data, graph_hash, message.back)
            del data
            return await self._prepare(owner, record, record.plan, message, graph)
        finally:
            self._working.discard(record.job)

    async def _prepare(
        self, owner: MemberRecord, record: JobRecord, running: Plan, message: ReplanJob, graph: OpDag
    ) -> PlanPrepared:
        job = record.job
        async with self._launcher.planning:
            members = self._members(record, message.machines)
            found = await self._plan(owner, members, running, message, graph)
            if found is None:
                return PlanPrepared("no other plan is worth its move")
            problem = self._problem(owner, members, running, found.plan)
            if problem is not None:
                return PlanPrepared(problem)
            peers = {PeerId(stage.peer) for stage in found.plan.stages} - {owner.peer}
            preparation = Preparation(
                epoch=Epoch(record.prepared + 1),
                plan=found.plan,
                compnodes={peer: members[peer].name for peer in sorted(peers)},
            )
            self._lifecycle.prepare(job, preparation)
        everybody = {owner.peer: owner, **members}
        try:
            await self._hand_out(job, everybody, owner.peer, running, preparation, graph, message)
            current = self._state.jobs.get(job)
            if current is None or current.preparing != preparation:
                raise JobError("the new plan was given up while its machines took their shares")
        except BaseException as error:
            reason = str(error) or "the owner went"
            self._lifecycle.forget(job, reason, tell_owner=False)
            for peer in {owner.peer, *record.compnodes, *preparation.compnodes}:
                # Even if it was forgotten before: what was under way to the machines then has arrived now.
                self._state.tell(peer, ReleaseShare(job, preparation.epoch, reason))
            raise
        return PlanPrepared(
            found.reason,
            preparation.epoch,
            found.plan,
            {str(peer): name for peer, name in ((owner.peer, owner.name), *preparation.compnodes.items())},
            any(everybody[peer].lab for peer in (owner.peer, *preparation.compnodes)),
            found.gain_s,
            found.move_s,
        )

    def _members(self, record: JobRecord, named: Sequence[str]) -> dict[PeerId, MemberRecord]:
        """Return the compnodes that a new plan may use or take weights from: the job's own, and idle ones."""
        registry = self._state.registry
        own = [registry.get(peer) for peer in record.compnodes if registry.is_present(peer)]
        idle = [each for each in registry.idle() if not named or each.name in named]
        return {each.peer: each for each in (*own, *idle) if each is not None}

    async def _plan(
        self,
        owner: MemberRecord,
        members: Mapping[PeerId, MemberRecord],
        running: Plan,
        message: ReplanJob,
        graph: OpDag,
    ) -> Replanned | None:
        peers = [*members, owner.peer]
        estimates = await self._state.estimates.refresh(now=True)
        access: dict[str, AccessProfile] = {peer: estimates[peer] for peer in peers if peer in estimates}
        known = {
            peer: _as_it_is(with_history(self._state, candidate(each)), message.factors)
            for peer, each in members.items()
        }
        pool = Pool(members=tuple(known.values()), links=self._state.links.matrix(peers), access=access)
        limits = PlanLimits(
            compnodes=message.compnodes,
            most_pipelines=1,
            leaving=frozenset(peer for peer in known if self._state.registry.is_leaving(peer)),
        )
        problem = training_problem(graph, running, message, limits)
        idle = [each for peer, each in members.items() if peer not in {stage.peer for stage in running.stages}]
        unable = await asyncio.to_thread(obstacles, graph, message.front, message.back, idle)
        pool = replace(pool, members=tuple(each for each in pool.members if each.name not in unable))
        driver = _as_it_is(candidate(owner), message.factors)

        def make() -> Replanned | None:
            return replanned(problem.on_pool(pool, driver), running, message.steps_left)

        return await asyncio.to_thread(make)

    def _problem(
        self,
        owner: MemberRecord,
        members: Mapping[PeerId, MemberRecord],
        running: Plan,
        plan: Plan,
    ) -> str | None:
        """Return why a plan cannot be taken, None if it can."""
        records = {owner.peer: owner, **members}
        before = {stage.peer for stage in running.stages} - {owner.peer}
        gone = before - records.keys()
        if gone:
            return f"{', '.join(self._state.registry.name(PeerId(each)) for each in sorted(gone))} has left"
        for peer in dict.fromkeys(stage.peer for stage in plan.stages):
            record = records.get(PeerId(peer))
            if record is None or self._state.endpoint.link(record.peer) is None:
                return "a machine of the better plan went while it was made"
            need = sum(stage.predicted.memory_bytes for each in (running, plan) for stage in each.stages_of(peer))
            offer = record.device.memory_bytes if record.device is not None else 0
            if need > offer:
                return (
                    f"{record.name} would need {need:,} bytes for its old and its new share beside each other, and "
                    f"offers {offer:,}"
                )
        return None

    async def _hand_out(
        self,
        job: JobId,
        members: Mapping[PeerId, MemberRecord],
        owner: PeerId,
        running: Plan,
        preparation: Preparation,
        graph: OpDag,
        message: ReplanJob,
    ) -> None:
        old, new = await asyncio.to_thread(lambda: (cut(graph, running.cuts), cut(graph, preparation.plan.cuts)))
        ways = routes(
            keys_by_peer(old, [stage.peer for stage in running.stages]),
            keys_by_peer(new, [stage.peer for stage in preparation.plan.stages]),
        )
        handing = {PeerId(peer): {PeerId(each) for each in others} for peer, others in ways.pairs().items()}
        shares = assignments(
            JobEpoch(job, preparation.epoch),
            preparation.plan,
            new,
            members=members,
            owner=owner,
            driver=owner,
            links=self._state.links,
            options=message.options,
            handing=handing,
        )
        await hand_out(self._state, self._prober, shares, {peer: members[peer] for peer in shares})


def _as_it_is(member: Member, factors: Mapping[str, float]) -> Member:
    """Return a member with the speed that it was last seen to have."""
    factor = factors.get(member.peer)
    return member if factor is None else replace(member, device=corrected(member.device, factor))
