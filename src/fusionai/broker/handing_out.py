"""Hands the shares of a plan out to its machines, and has the machines link to each other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from fusionai.broker.pool_state import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import MemberRecord
from fusionai.errors import FusionError, JobError, NetworkError, PeerTimeout
from fusionai.network.identity import PeerId
from fusionai.pool.background_tasks import all_of
from fusionai.pool.codec import ASSIGNMENT
from fusionai.pool.identifiers import JobEpoch
from fusionai.pool.messages import AssignShare, LinkNeighbours
from fusionai.training.assignment_parcels import Assignment, pack

ASSIGN_TIMEOUT_S = 120.0
"""How long a machine may take to receive its sub-DAGs and make its program."""
CONNECT_TIMEOUT_S = 60.0


async def hand_out(
    state: PoolState, prober: Prober, assignments: Mapping[PeerId, Assignment], members: Mapping[PeerId, MemberRecord]
) -> None:
    """Give every machine its share; when this returns, all have made their programs and are linked.

    Raises FusionError: what a machine answered, with its name. The others may hold their shares then.
    """
    async with prober.undisturbed(members):
        await all_of(_assign(state, members[peer], each) for peer, each in assignments.items())
        # Only now does every machine know whom to admit.
        await all_of(_connect(state, members[peer], each.plan) for peer, each in assignments.items())


async def _assign(state: PoolState, member: MemberRecord, assigned: Assignment) -> None:
    packed = await asyncio.to_thread(pack, assigned)
    try:
        async with asyncio.timeout(ASSIGN_TIMEOUT_S):
            link = state.link(member.peer)
            await link.send_bulk(ASSIGNMENT, str(assigned.plan).encode(), packed)
            await state.order(
                member.peer, AssignShare(assigned.plan.job, assigned.plan.epoch), timeout_s=ASSIGN_TIMEOUT_S
            )
    except TimeoutError:
        raise PeerTimeout(f"{_who(member)} did not take its share of the job within {ASSIGN_TIMEOUT_S:.0f} s") from None
    except FusionError as error:
        raise _named(error, f"{_who(member)} cannot take its share of the job") from error


async def _connect(state: PoolState, member: MemberRecord, plan: JobEpoch) -> None:
    try:
        await state.order(member.peer, LinkNeighbours(plan.job, plan.epoch), timeout_s=CONNECT_TIMEOUT_S)
    except FusionError as error:
        raise _named(error, f"{_who(member)} cannot link to its neighbours") from error


def _who(member: MemberRecord) -> str:
    return f"{member.role} {member.name}"


def _named(error: FusionError, what: str) -> FusionError:
    """Return the error with a machine's name in front; a broken connection gets no class of its own."""
    if isinstance(error, NetworkError) and not isinstance(error, PeerTimeout):
        return JobError(f"{what}: {error}")
    return type(error)(f"{what}: {error}")
