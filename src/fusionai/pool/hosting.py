"""The shares of jobs that this machine holds: assigned by the broker, commanded by the jobs' drivers.

What a share does is its kind of work's affair (`fusionai.pool.work`). Here is what all kinds have in common: taking
and releasing shares, their memory, their links, and what the broker is told of them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from fusionai.errors import JobError, NetworkError, PlacementError, ProtocolError
from fusionai.network.endpoint import Link
from fusionai.network.identity import PeerId
from fusionai.pool.background_tasks import BackgroundTasks
from fusionai.pool.codec import ASSIGNMENT, decode, kind_of
from fusionai.pool.contacts import link_all
from fusionai.pool.identifiers import JobEpoch, JobId
from fusionai.pool.job_wire import JobWire
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import AssignShare, Heartbeat, HeldShare, LinkNeighbours, RegisterMember, ReleaseShare
from fusionai.pool.parcels import ParcelInbox
from fusionai.pool.work import AssignedWork, WorkHost, WorkKind
from fusionai.scheduling.profile import DeviceProfile

log = logging.getLogger(__name__)

DRIVER_TIMEOUT_S = 240.0
"""An assignment whose driver has no link with this machine by then is dropped: its launch broke off, and so did the
connection with the broker that would have said so. Above all of a launch's own deadlines together."""

PARCEL_TIMEOUT_S = 120.0
"""How long an assignment may be on its way when the request that names it is here."""

_MOST_PARCELS = 4

_MOST_EPOCHS = 2
"""Most epochs of one job held at once: the running plan's, and one of a plan that is prepared to follow it."""

_MOST_SHARES = 16
"""Shares held at once, whatever memory they take: a bound on what a broker can make this machine keep in its books."""

_MOST_RECEIVERS = 256
"""Peers to which earlier shares sent tensors and that are still counted; those of the earliest shares are forgotten
first. A heartbeat names at most 1,024."""


@dataclass
class _Held:
    """One share that this machine holds."""

    work: AssignedWork
    host: WorkHost | None = None
    """None while it is made, and where the machine holds nothing of the job: an owner whose job runs elsewhere."""

    @property
    def memory_bytes(self) -> int:
        return max(0, self.work.memory_bytes)


class Hosting(MemberPart):
    """The part of a member that holds shares of jobs, as many as its memory allows."""

    broker_kinds = frozenset({kind_of(AssignShare), kind_of(LinkNeighbours), kind_of(ReleaseShare), ASSIGNMENT})

    def __init__(
        self,
        wire: JobWire,
        profile: DeviceProfile,
        kinds: Sequence[WorkKind[Any]],
        *,
        changed: Callable[[], None],
    ) -> None:
        """Hold nothing yet.

        Args:
            wire: carries the messages of jobs.
            profile: of this machine's device, as measured; its memory is what all shares together may take.
            kinds: kinds of work that this machine does.
            changed: called when a share came or went.
        """
        self._wire = wire
        self._profile = profile
        self._kinds = {kind.name: kind for kind in kinds}
        self._changed = changed
        self._held: dict[JobEpoch, _Held] = {}
        self._tasks = BackgroundTasks()
        self._parcels = ParcelInbox(most=_MOST_PARCELS)
        self._busy = BusyMeter()
        self._past_busy_s = 0.0
        self._past_bytes: dict[str, int] = {}

    # --- MemberPart -------------------------------------------------------------------------------------------

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Take a share, or link to a share's neighbours."""
        if kind == kind_of(LinkNeighbours):
            linking = decode(LinkNeighbours, payload)
            await self.connect(JobEpoch(linking.job, linking.epoch))
        elif kind == kind_of(AssignShare):
            assign = decode(AssignShare, payload)
            plan = JobEpoch(assign.job, assign.epoch)
            packed = await self._parcels.take(link.peer, str(plan), timeout_s=PARCEL_TIMEOUT_S)
            await self.assign(plan, assign.kind, packed)
        else:
            raise ProtocolError(f"{kind!r} is no request")
        return b""

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Release a share."""
        release = decode(ReleaseShare, payload)
        # Ending a pass takes its time; the broker's next words must not wait for it.
        self._tasks.start(self.release(JobEpoch(release.job, release.epoch), release.reason), "release")

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Keep an assignment until the request comes that names it."""
        await self._parcels.put(link.peer, header.decode("ascii", "replace"), bytes(body))

    def on_broker_closed(self, broker: PeerId, error: NetworkError) -> None:
        """An assignment that came alone is never asked for now."""
        self._parcels.drop(broker)

    def admits(self, peer: PeerId) -> bool:
        """Return whether a share's roster names a peer."""
        return any(peer == each.peer for held in self._held.values() for each in held.work.contacts)

    def register(self, message: RegisterMember) -> RegisterMember:
        """Add the device."""
        return replace(message, device=self._profile)

    def heartbeat(self, message: Heartbeat) -> Heartbeat:
        """Add what is held, and what it does."""
        return replace(
            message,
            busy=self._busy.read(self.busy_s),
            memory_bytes=self.memory_bytes,
            holds=self.holds,
            bytes_sent=self.bytes_sent,
        )

    async def close(self, reason: str) -> None:
        """Drop all shares."""
        await self._tasks.close()
        for plan in list(self._held):
            await self.release(plan, reason)

    # --- by the broker's order --------------------------------------------------------------------------------

    async def assign(self, plan: JobEpoch, kind: str, packed: bytes) -> None:
        """Take a share that came packed; returns when its host is made.

        Raises:
            JobError: this machine does no such work, has this share already, or shares of two plans of the job.
            PlacementError: it would need more memory than is offered, beside what is held.
            ProtocolError: what came is malformed, or of another plan.
            GraphError: the plane cannot run it.
        """
        if (work_kind := self._kinds.get(kind)) is None:
            raise JobError(f"this machine does no work of the kind {kind!r}; it does {', '.join(self._kinds)}")
        work = await asyncio.to_thread(work_kind.unpack, packed)
        if work.plan != plan:
            raise ProtocolError(f"the assignment of job {work.plan} came for job {plan}")
        held = _Held(work)
        self._check_room(plan, held)
        self._held[plan] = held
        self._share_memory()  # before the new program takes its part

        async def ended(reason: str) -> None:
            self._drop(plan)

        try:
            held.host = await work_kind.host(work, self._wire, limit_bytes=self._limit(plan.job), on_end=ended)
        except BaseException:
            if self._held.get(plan) is held:
                del self._held[plan]
            self._share_memory()
            raise
        if self._held.get(plan) is not held:
            # Released while its host was made.
            if held.host is not None:
                await held.host.close("the job ended before it began")
            raise JobError(f"job {plan.job} ended while this machine made its program")
        if work.driver != self._wire.me:
            self._tasks.start(self._expect_driver(held), "driver's link")
        self._share_memory()
        self._changed()

    def _check_room(self, plan: JobEpoch, new: _Held) -> None:
        relatives = [held for each, held in self._held.items() if each.job == plan.job]
        if plan in self._held or len(relatives) >= _MOST_EPOCHS:
            raise JobError(f"this machine works for job {plan.job} already")
        if len(self._held) >= _MOST_SHARES:
            raise JobError(f"this machine holds {_MOST_SHARES} shares of jobs already, which is the most it takes")
        taken = self._taken()
        if taken + new.memory_bytes > self._profile.memory_bytes:
            what = "of the running plan" if len(relatives) == len(self._held) else "that it holds"
            beside = f" beside {taken:,} {what}" if taken else ""
            raise PlacementError(
                f"the share needs {new.memory_bytes:,} bytes{beside}, but this machine offers "
                f"{self._profile.memory_bytes:,}"
            )

    def _taken(self, job: JobId | None = None) -> int:
        """Return the bytes that all shares take by their plans, or those of one job."""
        return sum(held.memory_bytes for plan, held in self._held.items() if job in (None, plan.job))

    def _limit(self, job: JobId) -> int:
        """Return what each share of a job may really take.

        That is what its job's plans reckon with and an equal part of what nobody's does: together never more than the
        machine offers, and all of it where there is one job.
        """
        free = self._profile.memory_bytes - self._taken()
        takers = {plan.job for plan, held in self._held.items() if held.memory_bytes} | {job}
        return self._taken(job) + free // len(takers)

    def _share_memory(self) -> None:
        for plan, held in self._held.items():
            if held.host is not None:
                held.host.limit_memory(self._limit(plan.job))

    async def connect(self, plan: JobEpoch) -> None:
        """Link to the neighbours of a share.

        Raises:
            PeerTimeout, PeerLost, AuthenticationError: one cannot be linked to; the text names it.
            JobError: this machine has no part in the job.
        """
        held = self._held.get(plan)
        if held is None:
            raise JobError(f"this machine has no part in job {plan.job} any more")
        await link_all(self._wire.endpoint, held.work.contacts)

    async def release(self, plan: JobEpoch, reason: str) -> None:
        """Drop a share, if it is here."""
        held = self._held.get(plan)
        if held is None:
            return
        if held.host is not None:
            await held.host.close(reason)
        self._drop(plan)

    def _drop(self, plan: JobEpoch) -> None:
        held = self._held.pop(plan, None)
        if held is None:
            return
        if held.host is not None:
            self._past_busy_s += held.host.busy_s
            for peer, count in held.host.bytes_sent.items():
                self._past_bytes[peer] = self._past_bytes.pop(peer, 0) + count  # the latest last
            for peer in list(self._past_bytes)[:-_MOST_RECEIVERS]:
                del self._past_bytes[peer]
        self._tasks.start(self._unlink(held.work), "unlink")
        self._share_memory()
        self._changed()

    async def _unlink(self, work: AssignedWork) -> None:
        """Close links that no job needs any more; the one side that dialled does so."""
        # The job's last words may still be on their way to this machine or to its neighbours.
        await asyncio.sleep(1.0)
        for contact in work.contacts:
            peer = PeerId(contact.peer)
            link = self._wire.endpoint.link(peer)
            if link is not None and contact.dial and not self.admits(peer):
                await link.close("the job is over")

    async def _expect_driver(self, held: _Held) -> None:
        try:
            await self._wire.endpoint.wait_for_link(PeerId(held.work.driver), DRIVER_TIMEOUT_S)
        except NetworkError as error:
            await self.release(held.work.plan, f"its owner did not come: {error}")

    # --- asking ---------------------------------------------------------------------------------------------

    def work(self, plan: JobEpoch) -> AssignedWork | None:
        """Return a share and its roster as the broker assigned them, None where none is held."""
        held = self._held.get(plan)
        return None if held is None else held.work

    def host(self, plan: JobEpoch) -> WorkHost | None:
        """Return the host of a share, if this machine has one."""
        held = self._held.get(plan)
        return None if held is None else held.host

    @property
    def holds(self) -> tuple[HeldShare, ...]:
        """Every share from its assignment on, made or not."""
        return tuple(
            HeldShare(plan.job, plan.epoch, held.host.description[:900] if held.host is not None else "no stage")
            for plan, held in self._held.items()
        )

    @property
    def busy_s(self) -> float:
        """Compute seconds since this machine joined."""
        return self._past_busy_s + sum(host.busy_s for host in self._hosts())

    @property
    def memory_bytes(self) -> int:
        """Memory that programs hold."""
        return sum(host.memory_bytes for host in self._hosts())

    @property
    def bytes_sent(self) -> dict[str, int]:
        """Tensor bytes since joining, by receiving peer; of earlier shares those of the latest peers."""
        total = defaultdict(int, self._past_bytes)
        for host in self._hosts():
            for peer, count in host.bytes_sent.items():
                total[peer] += count
        return dict(total)

    def _hosts(self) -> list[WorkHost]:
        return [held.host for held in self._held.values() if held.host is not None]


class BusyMeter:
    """The share of time spent computing since it was last asked."""

    def __init__(self) -> None:
        self._at_s = time.monotonic()
        self._busy_s = 0.0

    def read(self, busy_s: float) -> float:
        """Return the share, given all compute seconds so far."""
        now_s = time.monotonic()
        share = (busy_s - self._busy_s) / max(now_s - self._at_s, 1e-3)
        self._at_s, self._busy_s = now_s, busy_s
        return min(max(share, 0.0), 1.0)
