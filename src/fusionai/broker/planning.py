"""Planning on measured links: where a plan uses links that are only estimated, they are measured, and it is made again.

In a small pool every pair is measured anyway. In a large one most are estimated from a few probes of each machine, and
a plan picks the links that look best: so also those whose estimate is too good.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

from msgspec.structs import replace

from fusionai.broker.link_book import Pair, pair
from fusionai.broker.pool_state import PoolState
from fusionai.broker.presence import availability
from fusionai.broker.prober import Prober
from fusionai.graph.model import OpDag
from fusionai.network.identity import PeerId
from fusionai.pool.messages import ReplanJob, SubmitJob
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.problem import PlanLimits, TrainingProblem
from fusionai.scheduling.profile import AccessProfile, LinkProfile, Member, Pool

log = logging.getLogger(__name__)

MOST_PLANS_AGAIN = 2
MEASURING_TIMEOUT_S = 15.0
"""How long the measuring of a plan's links may take. A link that is not measured by then stays an estimate."""

_MUCH = 1.5
"""Another plan is made if a measured link differs from its estimate by more than this factor."""
_MUCH_RTT_S = 0.01


class MakePlan(Protocol):
    """Makes a plan for a pool; blocks."""

    def __call__(self, *, pool: Pool) -> Plan: ...


def training_problem(
    graph: OpDag, job: SubmitJob | Plan, request: SubmitJob | ReplanJob, limits: PlanLimits
) -> TrainingProblem:
    """Return the problem that a request asks to solve, without the pool that it is to be solved on.

    `job` has what stays the same for the job's life: sizes, microbatches and privacy. It is the submission, or the plan
    that the job runs by.
    """
    return TrainingProblem(
        graph=graph,
        graph_hash=job.graph_hash,
        sizes=job.sizes,
        microbatches=job.microbatches,
        optimizer_states=len(request.options.optimizer.states),
        precision=request.options.precision,
        privacy=job.privacy,
        front=request.front,
        back=request.back,
        split_backward=not request.options.compile,
        limits=limits,
    )


async def plan_on_measured_links(
    state: PoolState, prober: Prober, members: Sequence[Member], owner: str, make: MakePlan
) -> Plan:
    """Return a plan for idle `members`, made with all that is known of their links.

    Links between stages that follow each other and are only estimated are then measured, and if one turns out far
    from its estimate, the plan is made again with the measure: at most `MOST_PLANS_AGAIN` times. Errors are `make`'s.
    """
    peers = [*(PeerId(each.peer) for each in members), PeerId(owner)]
    members = tuple(with_history(state, each) for each in members)
    for again in range(MOST_PLANS_AGAIN + 1):
        estimates = await state.estimates.refresh(now=True)
        access: dict[str, AccessProfile] = {peer: estimates[peer] for peer in peers if peer in estimates}
        pool = Pool(members=members, links=state.links.matrix(peers), access=access)
        plan = await asyncio.to_thread(make, pool=pool)
        unmeasured = [each for each in _used(plan) if state.links.get(*each) is None]
        if not unmeasured:
            return plan
        await prober.measure(unmeasured, timeout_s=MEASURING_TIMEOUT_S)
        measured = state.links.matrix(peers)
        wrong = [name for name in _directions(unmeasured) if _far(pool, name, measured)]
        if not wrong or again == MOST_PLANS_AGAIN:
            return plan
        log.info("planning again: %d of the plan's links are not as estimated", len(wrong))
    raise AssertionError("the loop returns")


def with_history(state: PoolState, member: Member) -> Member:
    """Return a member with its disk and its availability as the broker knows them."""
    peer = PeerId(member.peer)
    record = state.registry.get(peer)
    if record is None:
        return member
    return replace(member, disk=state.registry.disk(peer), availability=availability(record.presence, state.now_s()))


def _used(plan: Plan) -> list[Pair]:
    """Return the pairs of machines whose stages follow each other, each once."""
    peers = [PeerId(stage.peer) for stage in plan.stages]
    return list(dict.fromkeys(pair(one, other) for one, other in pairwise(peers) if one != other))


def _directions(pairs: Sequence[Pair]) -> list[str]:
    return [f"{source}>{target}" for one, other in pairs for source, target in ((one, other), (other, one))]


def _far(pool: Pool, name: str, measured: Mapping[str, LinkProfile]) -> bool:
    """Return whether a link was measured and is much better or worse than the estimate in the pool."""
    found = measured.get(name)
    if found is None:
        return False
    source, _, target = name.partition(">")
    reckoned = pool.link(source, target)
    ratio = found.bandwidth_bytes_per_s / reckoned.bandwidth_bytes_per_s
    late_s = abs(found.rtt_s - reckoned.rtt_s)
    return not 1 / _MUCH <= ratio <= _MUCH or late_s > max(_MUCH_RTT_S, (_MUCH - 1) * reckoned.rtt_s)
