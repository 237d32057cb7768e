"""What owners of running jobs hear of the pool: machines that came, and machines that want to go.

A plan is made for the pool as it was. Whether another one is worth its moves is for the owner to ask
(`broker.replanner`): it alone knows how many steps are left and how fast they are.
"""

from __future__ import annotations

import asyncio
import logging

from fusionai.broker.pool_state import PoolState
from fusionai.broker.prober import Prober
from fusionai.broker.records import OVER, JobRecord, MemberRecord
from fusionai.errors import ProtocolError
from fusionai.network.identity import PeerId
from fusionai.pool.messages import DeclineReplan, NoReplacement, PoolChanged

log = logging.getLogger(__name__)

GATHER_S = 1.0
"""Machines that come within this time are reported to owners together."""

_PROBES_TIMEOUT_S = 20.0
"""How long the links of new machines may be measured before owners hear of the machines."""

_MOST_NAMED = 5


class PoolChanges:
    """Tells owners of changes in the pool, and passes their answers on to the machines that wait to leave."""

    def __init__(self, state: PoolState, prober: Prober) -> None:
        self._state = state
        self._prober = prober
        self._come: set[PeerId] = set()
        self._telling = False

    # --- machines that come -------------------------------------------------------------------------------------

    def come(self, record: MemberRecord) -> None:
        """Note a compnode that has come, or come back, and that no job uses."""
        if record.role != "compnode" or record.state != "idle" or not self._running():
            return
        self._come.add(record.peer)
        if not self._telling:
            self._telling = self._state.tasks.start(self._tell_of_newcomers(), "newcomers") is not None

    def _running(self) -> list[JobRecord]:
        return [each for each in self._state.jobs.active() if each.state == "running"]

    async def _tell_of_newcomers(self) -> None:
        try:
            while self._come:
                await asyncio.sleep(GATHER_S)
                come, self._come = self._come, set()
                await self._prober.settle({self._state.endpoint.peer_id, *come}, timeout_s=_PROBES_TIMEOUT_S)
                idle = {each.peer for each in self._state.registry.idle()}
                names = sorted(self._state.registry.name(peer) for peer in come & idle)
                if names:
                    named, more = tuple(names[:_MOST_NAMED]), max(0, len(names) - _MOST_NAMED)
                    for record in self._running():
                        self._state.tell(record.owner, PoolChanged(record.job, named, leaving=False, more=more))
        finally:
            self._telling = False

    # --- machines that want to go -------------------------------------------------------------------------------

    def relieve(self, member: MemberRecord, reason: str) -> None:
        """A compnode wants to go once others hold what it holds. Raises ProtocolError for other members."""
        if member.role != "compnode":
            raise ProtocolError(f"only compnodes hold what others could take; {member.name} joined as {member.role}")
        registry = self._state.registry
        registry.wants_to_leave(member.peer)
        job = registry.job_of(member.peer)
        record = None if job is None else self._state.jobs.get(job)
        if record is None or record.state in OVER:
            return  # What it may still hold is being released.
        log.info("compnode %s wants to leave job %s (%s): %s", member.name, record.job, record.name, reason)
        if record.state == "running":
            self._state.tell(record.owner, PoolChanged(record.job, (member.name,), leaving=True))
        else:
            self._state.tell(member.peer, NoReplacement(f"job {record.name} is being launched"))

    def decline(self, record: JobRecord, message: DeclineReplan) -> None:
        """Pass on that an owner cannot do without the machines of its job that want to go."""
        registry = self._state.registry
        for peer in record.leased:
            if registry.is_leaving(peer):
                self._state.tell(
                    peer, NoReplacement(f"job {record.name} cannot go on without it: {message.reason[:500]}")
                )
