"""Launching a job: a plan for it, and its shares handed out to the machines of the plan."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from fusionai.broker.able_machines import able, obstacles, unable_lines
from fusionai.broker.assigning import assignments
from fusionai.broker.handing_out import hand_out
from fusionai.broker.lifecycle import Lifecycle
from fusionai.broker.planning import plan_on_measured_links, training_problem
from fusionai.broker.pool_state import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import JobRecord, MemberRecord
from fusionai.errors import GraphError, JobError, PlacementError
from fusionai.graph.abilities import check_can_run
from fusionai.graph.cuts import cut
from fusionai.graph.encoding import content_hash, decode
from fusionai.graph.model import OpDag
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import FIRST_EPOCH, JobEpoch, JobId
from fusionai.pool.messages import JobLaunched, ReleaseShare, SubmitJob
from fusionai.pool.parcels import ParcelInbox
from fusionai.scheduling import planner
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import PlanLimits
from fusionai.scheduling.profile import Member, Pool

log = logging.getLogger(__name__)

GRAPH_TIMEOUT_S = 120.0
"""How long after the request an OP-DAG may still be on its way."""
PROBES_TIMEOUT_S = 10.0
"""How long a submission waits for link probes under way: a plan on unmeasured links may be a bad one."""
MOST_GRAPHS = 8
"""Most OP-DAGs, of all owners together, that wait for the request that names them."""
MOST_SUBMISSIONS = 8
"""Most submissions that are worked on at the same time. Each keeps its whole OP-DAG in memory."""


class Launcher:
    """Plans and launches jobs, one plan at a time."""

    def __init__(self, state: PoolState, prober: Prober, lifecycle: Lifecycle) -> None:
        self.graphs = ParcelInbox(most=MOST_GRAPHS)
        self._state = state
        self._prober = prober
        self._lifecycle = lifecycle
        self.planning = asyncio.Lock()
        """Held while machines are chosen, until they are leased."""
        self._submitting: set[PeerId] = set()
        self._in_work = 0

    async def submit(self, owner: MemberRecord, message: SubmitJob) -> JobLaunched:
        """Plan and launch a job; when this returns, its machines hold their shares and are linked.

        Raises:
            GraphError: the OP-DAG breaks a rule, or is not the one announced.
            PlacementError: no plan fits, or nobody is there.
            FusionError: what a machine answered, with its name. Nobody holds anything of the job then.
        """
        if self._state.jobs.of_owner(owner.peer) or owner.peer in self._submitting:
            raise JobError(f"{owner.name} has a job on this pool already; wait for its end, or run a second owner")
        self._submitting.add(owner.peer)
        try:
            data = await self.graphs.take(owner.peer, message.graph_hash, timeout_s=GRAPH_TIMEOUT_S)
            if self._in_work >= MOST_SUBMISSIONS:
                raise JobError(f"the broker works on {self._in_work} submissions already; submit again in a minute")
            self._in_work += 1
            try:
                return await self._launch(owner, message, data)
            finally:
                self._in_work -= 1
        finally:
            self._submitting.discard(owner.peer)

    async def _launch(self, owner: MemberRecord, message: SubmitJob, data: bytes) -> JobLaunched:
        graph = await asyncio.to_thread(decoded, data, message.graph_hash, message.back)
        del data
        job = JobId(secrets.token_hex(6))
        async with self.planning:
            plan, members = await self._plan(owner, message, graph)
            compnodes = {peer: record.name for peer, record in members.items() if peer != owner.peer}
            self._state.jobs.put(
                JobRecord(
                    job=job,
                    name=message.job_name,
                    owner=owner.peer,
                    owner_name=owner.name,
                    state="launching",
                    compnodes=compnodes,
                    config=message.config,
                    plan=plan,
                    submitted_s=self._state.now_s(),
                )
            )
            for peer in compnodes:
                self._state.registry.lease(peer, job)
        try:
            await self._hand_out(job, message, graph, plan, members, owner.peer)
            await self._run(job)
        except BaseException as error:
            self._give_up(job, owner, error)
            raise
        return JobLaunched(
            job=job,
            plan=plan,
            names={peer: record.name for peer, record in members.items()},
            lab=any(record.lab for record in members.values()),
        )

    def _give_up(self, job: JobId, owner: MemberRecord, error: BaseException) -> None:
        record = self._state.jobs.get(job)
        if record is None or record.state not in ("launching", "running"):
            return
        cancelled = isinstance(error, asyncio.CancelledError)
        reason = "the owner went while the job was launched" if cancelled else str(error)
        self._lifecycle.finish(job, "failed", reason, tell_owner=False)
        self._state.tell(owner.peer, ReleaseShare(job, FIRST_EPOCH, reason))

    async def _plan(
        self, owner: MemberRecord, message: SubmitJob, graph: OpDag
    ) -> tuple[Plan, Mapping[PeerId, MemberRecord]]:
        idle = self._state.registry.idle()
        if not idle:
            working = len(self._state.registry.present("compnode"))
            raise PlacementError(
                f"no compnode is free: all {working} of the pool work for other jobs; wait, or run `fusionai join "
                "TOKEN` on another machine"
                if working
                else "the pool has no compnodes: run `fusionai join TOKEN` on each machine that is to take part"
            )
        peers = [owner.peer, *(each.peer for each in idle)]
        await self._prober.settle(peers, timeout_s=PROBES_TIMEOUT_S)
        idle = [each for each in self._state.registry.idle() if each.peer in peers]
        records = {each.peer: each for each in (owner, *idle)}
        limits = PlanLimits(
            compnodes=message.compnodes,
            cuts=message.cuts,
            in_order=bool(message.machines) and message.cuts is not None,
            most_pipelines=1,
        )
        problem = training_problem(graph, message, message, limits)
        driver = candidate(owner)

        def make(*, pool: Pool) -> Plan:
            return planner.plan(problem.on_pool(pool, driver))

        wanted = _named_ones(idle, message.machines)
        unable = await asyncio.to_thread(obstacles, graph, message.front, message.back, wanted)
        if unable and problem.limits.in_order:
            name, obstacle = next(iter(unable.items()))
            raise PlacementError(f"placement.machines gives a share to {name}, but {obstacle}; name another machine")
        members = tuple(candidate(each) for each in able(wanted, unable))
        plan = await plan_on_measured_links(self._state, self._prober, members, owner.peer, make)
        plan = replace(plan, explanation=(*plan.explanation, *unable_lines(unable)))
        chosen = {PeerId(stage.peer) for stage in plan.stages} | {owner.peer}
        lost = [records[peer].name for peer in chosen if self._state.endpoint.link(peer) is None]
        if lost:
            raise PlacementError(f"{', '.join(sorted(lost))} went while the job was planned; submit it again")
        return plan, {peer: records[peer] for peer in sorted(chosen)}

    async def _hand_out(
        self,
        job: JobId,
        message: SubmitJob,
        graph: OpDag,
        plan: Plan,
        members: Mapping[PeerId, MemberRecord],
        owner: PeerId,
    ) -> None:
        subdags = await asyncio.to_thread(cut, graph, plan.cuts)
        shares = assignments(
            JobEpoch(job, FIRST_EPOCH),
            plan,
            subdags,
            members=members,
            owner=owner,
            driver=owner,
            links=self._state.links,
            options=message.options,
        )
        for peer, share in shares.items():
            # The owner's own machine among them: it was not chosen, so nobody has asked yet.
            device = members[peer].device
            if device is not None and device.abilities is not None:
                check_can_run(members[peer].name, device.abilities, share.share.subdags, "training")
        await hand_out(self._state, self._prober, shares, members)

    async def _run(self, job: JobId) -> None:
        record = self._state.jobs.get(job)
        if record is None or record.state != "launching":
            raise JobError(record.reason if record is not None else f"the job {job} is gone")
        self._state.jobs.change(job, state="running")
        await self._state.journal.flush()


def _named_ones(idle: Sequence[MemberRecord], names: Sequence[str]) -> list[MemberRecord]:
    """Return the compnodes of these names, in their order; all of them if there are no names."""
    if not names:
        return list(idle)
    known = {each.name: each for each in idle}
    if missing := [name for name in names if name not in known]:
        raise PlacementError(
            f"placement.machines names {', '.join(missing)}, but no such compnode is free; free are "
            f"{', '.join(sorted(known))}; `fusionai status` shows them all"
        )
    return [known[name] for name in names]


def decoded(data: bytes, graph_hash: str, back: int) -> OpDag:
    """Return the OP-DAG that an owner sent. Raises GraphError when it is not the one announced. Slow."""
    graph = decode(data)
    found = content_hash(graph)
    if found != graph_hash:
        raise GraphError(
            f"the OP-DAG that came has the content hash {found[:16]}, but {graph_hash[:16]} was announced; "
            "submit the graph that was hashed"
        )
    if back > len(graph.nodes):
        raise GraphError(f"back is {back}, but the OP-DAG has {len(graph.nodes)} operators")
    return graph


def candidate(record: MemberRecord) -> Member:
    """Return a member as the scheduler sees it."""
    assert record.device is not None
    return Member(
        peer=record.peer,
        name=record.name,
        device=record.device,
        addresses=record.addresses,
        dialable=bool(record.addresses),
    )
