"""The jobs that this machine has a part in: assigned by the broker, commanded by their owners."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from fusionai.errors import JobError, NetworkError, PlacementError, ProtocolError
from fusionai.execution.plane import Plane
from fusionai.network.endpoint import Link
from fusionai.network.identity import PeerId
from fusionai.pool.background_tasks import BackgroundTasks, all_of
from fusionai.pool.codec import ASSIGNMENT, decode, kind_of
from fusionai.pool.identifiers import JobEpoch
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import AssignShare, Heartbeat, HeldShare, LinkNeighbours, RegisterMember, ReleaseShare
from fusionai.pool.parcels import ParcelInbox
from fusionai.scheduling.profile import DeviceProfile
from fusionai.training.assignment_parcels import Assignment, unpack
from fusionai.training.roster import Contact
from fusionai.training.slowdown import Slowdown
from fusionai.training.stage_host import LINK_TIMEOUT_S, StageHost
from fusionai.training.wire import PREFIX, JobWire

log = logging.getLogger(__name__)

OWNER_TIMEOUT_S = 240.0
"""An assignment whose owner has no link with this machine by then is dropped: its launch broke off, and so did the
connection with the broker that would have said so. Above all of a launch's own deadlines together."""

PARCEL_TIMEOUT_S = 120.0
"""How long an assignment may be on its way when the request that names it is here."""

_MOST_PARCELS = 4

_MOST_EPOCHS = 2
"""Of one job: the running plan's, and one of a plan that is prepared to follow it."""


@dataclass
class _Part:
    """This machine's part in one plan of a job."""

    assignment: Assignment
    host: StageHost | None = None
    """None while its program is made, and where the machine holds no stage: an owner whose job runs elsewhere."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)


class Hosting(MemberPart):
    """The part of a member that holds assignments and their stages."""

    broker_kinds = frozenset({kind_of(AssignShare), kind_of(LinkNeighbours), kind_of(ReleaseShare), ASSIGNMENT})
    peer_prefixes = (PREFIX,)

    def __init__(
        self,
        wire: JobWire,
        plane: Plane | None,
        profile: DeviceProfile,
        *,
        most_jobs: int,
        slowdown: Slowdown,
        changed: Callable[[], None],
    ) -> None:
        """`changed` is called when a job came or went.

        Args:
            wire: carries the messages of jobs.
            plane: runs this machine's stages; without one every assignment with a stage is refused.
            profile: of the plane's device, as measured; its memory is what all jobs together may hold.
            most_jobs: how many jobs may have a part here at once.
            slowdown: emulated speed: every pass is stretched by it.
        """
        self._wire = wire
        self._plane = plane
        self._profile = profile
        self._memory_bytes = profile.memory_bytes
        self._most_jobs = most_jobs
        self._slowdown = slowdown
        self._changed = changed
        self._parts: dict[JobEpoch, _Part] = {}
        self._tasks = BackgroundTasks()
        self._parcels = ParcelInbox(most=_MOST_PARCELS)
        self._busy = BusyMeter()
        self._past_busy_s = 0.0
        self._past_bytes: dict[str, int] = defaultdict(int)

    # --- MemberPart -------------------------------------------------------------------------------------------

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Obey the broker, or pass a request of a job on."""
        if kind.startswith(PREFIX):
            return await self._wire.on_request(link, kind, payload)
        if kind == kind_of(LinkNeighbours):
            linking = decode(LinkNeighbours, payload)
            await self.connect(JobEpoch(linking.job, linking.epoch))
        elif kind == kind_of(AssignShare):
            assign = decode(AssignShare, payload)
            plan = JobEpoch(assign.job, assign.epoch)
            packed = await self._parcels.take(link.peer, str(plan), timeout_s=PARCEL_TIMEOUT_S)
            assignment = await asyncio.to_thread(unpack, packed)
            if assignment.plan != plan:
                raise ProtocolError(f"the assignment of job {assignment.plan} came for job {plan}")
            await self.assign(assignment)
        else:
            raise ProtocolError(f"{kind!r} is no request")
        return b""

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Release a job, or pass a notice of one on."""
        if kind.startswith(PREFIX):
            await self._wire.on_notice(link, kind, payload)
        elif kind == kind_of(ReleaseShare):
            release = decode(ReleaseShare, payload)
            # Ending a pass takes its time; the broker's next words must not wait for it.
            self._tasks.start(self.release(JobEpoch(release.job, release.epoch), release.reason), "release")

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take an assignment, or pass a tensor on."""
        if kind == ASSIGNMENT:
            await self._parcels.put(link.peer, header.decode("ascii", "replace"), bytes(body))
        else:
            await self._wire.on_bulk(link, kind, header, body)

    async def on_peer_closed(self, peer: PeerId, error: NetworkError) -> None:
        """Tell the jobs."""
        await self._wire.on_close(peer, error)

    def on_broker_closed(self, broker: PeerId, error: NetworkError) -> None:
        """An assignment that came alone is never asked for now."""
        self._parcels.drop(broker)

    def admits(self, peer: PeerId) -> bool:
        """Return whether an assignment names a peer."""
        return any(part.assignment.roster.knows(peer) for part in self._parts.values())

    def register(self, message: RegisterMember) -> RegisterMember:
        """Add the device."""
        return replace(message, device=self._profile, lab=message.lab or self._slowdown.emulated)

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
        """Drop all jobs."""
        await self._tasks.close()
        for plan in list(self._parts):
            await self.release(plan, reason)

    # --- by the broker's order --------------------------------------------------------------------------------

    async def assign(self, assignment: Assignment) -> None:
        """Take a part in a job; returns when its program is made.

        Raises:
            JobError: this machine has a job already, or shares of two plans of this one.
            PlacementError: it would need more memory than is offered, beside the running plan's share.
            GraphError: the plane cannot run it.
        """
        plan, share = assignment.plan, assignment.share
        job = plan.job
        relatives = [each for each in self._parts if each.job == job]
        others = {each.job for each in self._parts} - {job}
        if plan in self._parts or len(relatives) >= _MOST_EPOCHS or len(others) >= self._most_jobs:
            raise JobError(f"this machine works for job {next(iter(self._parts)).job} already")
        held = sum(self._parts[each].assignment.share.memory_bytes for each in relatives)
        if held + share.memory_bytes > self._memory_bytes:
            beside = f" beside {held:,} of the running plan" if held else ""
            raise PlacementError(
                f"the share needs {share.memory_bytes:,} bytes{beside}, but this machine offers {self._memory_bytes:,}"
            )
        part = self._parts[plan] = _Part(assignment)
        try:
            if share.subdags:
                part.host = await self._host(assignment)
        except BaseException:
            self._parts.pop(plan, None)
            raise
        if self._parts.get(plan) is not part:
            # Released while the program was made.
            if part.host is not None:
                await part.host.close("the job ended before it began")
            raise JobError(f"job {job} ended while this machine made its program")
        part.ready.set()
        if not assignment.roster.is_driver(self._wire.me):
            self._tasks.start(self._expect_driver(part), "driver's link")
        self._changed()

    async def _host(self, assignment: Assignment) -> StageHost:
        if self._plane is None:
            raise JobError("this machine has no execution plane; join with one")

        async def ended(reason: str) -> None:
            self._drop(assignment.plan)

        return await StageHost.create(
            assignment.share,
            assignment.roster,
            self._plane,
            self._wire,
            limit_bytes=self._memory_bytes,
            slowdown=self._slowdown,
            on_end=ended,
        )

    async def connect(self, plan: JobEpoch) -> None:
        """Link to the neighbours of a share.

        Raises:
            PeerTimeout, PeerLost, AuthenticationError: one cannot be linked to; the text names it.
            JobError: this machine has no part in the job.
        """
        part = self._parts.get(plan)
        if part is None:
            raise JobError(f"this machine has no part in job {plan.job} any more")
        await all_of(self._link(each) for each in part.assignment.roster.contacts)

    async def _link(self, neighbour: Contact) -> None:
        endpoint, peer = self._wire.endpoint, PeerId(neighbour.peer)
        try:
            if neighbour.dial and endpoint.link(peer) is None:
                await endpoint.connect(peer, neighbour.addresses, timeout_s=LINK_TIMEOUT_S)
            else:
                await endpoint.wait_for_link(peer, LINK_TIMEOUT_S)
        except NetworkError as error:
            raise type(error)(f"no link to {neighbour.name}: {error}") from error

    async def release(self, plan: JobEpoch, reason: str) -> None:
        """Drop a share, if it is here."""
        part = self._parts.get(plan)
        if part is None:
            return
        if part.host is not None:
            await part.host.close(reason)
        self._drop(plan)

    def _drop(self, plan: JobEpoch) -> None:
        part = self._parts.pop(plan, None)
        if part is None:
            return
        if part.host is not None:
            self._past_busy_s += part.host.busy_s
            for peer, count in part.host.bytes_sent.items():
                self._past_bytes[peer] += count
        self._tasks.start(self._unlink(part.assignment), "unlink")
        self._changed()

    async def _unlink(self, assignment: Assignment) -> None:
        """Close links that no job needs any more; the one side that dialled does so."""
        # The job's last words may still be on their way to this machine or to its neighbours.
        await asyncio.sleep(1.0)
        for neighbour in assignment.roster.contacts:
            peer = PeerId(neighbour.peer)
            link = self._wire.endpoint.link(peer)
            if link is not None and neighbour.dial and not self.admits(peer):
                await link.close("the job is over")

    async def _expect_driver(self, part: _Part) -> None:
        driver = PeerId(part.assignment.roster.driver)
        try:
            await self._wire.endpoint.wait_for_link(driver, OWNER_TIMEOUT_S)
        except NetworkError as error:
            await self.release(part.assignment.plan, f"its owner did not come: {error}")

    # --- asking ---------------------------------------------------------------------------------------------

    def host(self, plan: JobEpoch) -> StageHost | None:
        """Return this machine's stages of a plan."""
        part = self._parts.get(plan)
        return None if part is None else part.host

    @property
    def holds(self) -> tuple[HeldShare, ...]:
        """Every share from its assignment on, made or not."""
        return tuple(
            HeldShare(plan.job, plan.epoch, part.host.description[:900] if part.host is not None else "no stage")
            for plan, part in self._parts.items()
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
        """Tensor bytes since joining, by receiving peer."""
        total = defaultdict(int, self._past_bytes)
        for host in self._hosts():
            for peer, count in host.bytes_sent.items():
                total[peer] += count
        return dict(total)

    def _hosts(self) -> list[StageHost]:
        return [part.host for part in self._parts.values() if part.host is not None]


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
