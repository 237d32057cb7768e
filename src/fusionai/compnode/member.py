"""A member of a pool: what compnodes, owners and observers have in common."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar, overload

import msgspec

from fusionai.compnode.disk import free_disk_bytes
from fusionai.compnode.hosting import BusyMeter, Hosting
from fusionai.compnode.job_news import JobNews
from fusionai.compnode.relief import ASK_TIMEOUT_S, Relief
from fusionai.errors import AuthenticationError, ConfigError, NetworkError, ProtocolError
from fusionai.execution.plane import Plane
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import Identity, PeerId
from fusionai.network.lab import LabConfig
from fusionai.network.limits import Limits
from fusionai.network.link import Link
from fusionai.network.token import JoinToken
from fusionai.pool.advertising import advertised
from fusionai.pool.background_tasks import BackgroundTasks
from fusionai.pool.codec import ASSIGNMENT, GRAPH, PREFIX, decode, encode, kind_of
from fusionai.pool.identifiers import JobEpoch, JobId
from fusionai.pool.messages import (
    AssignShare,
    ExpectProbe,
    Heartbeat,
    HeldShare,
    JobLost,
    LinkNeighbours,
    MemberRegistered,
    NoReplacement,
    PlanLost,
    PoolChanged,
    ProbeLink,
    RegisterMember,
    ReleaseShare,
    WishToLeave,
)
from fusionai.pool.names import check_name
from fusionai.pool.parcels import MOST_BYTES as PARCEL_BYTES
from fusionai.pool.parcels import ParcelInbox
from fusionai.pool.probe_service import Probes
from fusionai.pool.session import BrokerSession
from fusionai.scheduling.profile import DeviceProfile, DiskProfile
from fusionai.training.assignment_parcels import unpack
from fusionai.training.slowdown import Slowdown, Throttle
from fusionai.training.stage_host import StageHost
from fusionai.training.wire import PREFIX as JOB_PREFIX
from fusionai.training.wire import JobWire
from fusionai.units.addresses import split_address

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer", bound=msgspec.Struct)

PARCEL_TIMEOUT_S = 120.0
_TELL_TIMEOUT_S = 10.0


class Member:
    """This machine as a member of a pool.

    Make it inside the event loop, `await start()`, and in the end `await close()`. It stays registered: when the
    connection with the broker breaks it tries again for ever, and jobs go on meanwhile.

        member = Member(identity, token, role="owner", name="anna", profile=profile, plane=plane)
        await member.start()                                      # TokenError, AuthenticationError, PeerLost, ...
        await member.send_graph(content_hash, encoded)
        launched = await member.request(submit, JobLaunched, timeout_s=300)   # errors of the broker, by class and text
        member.on_job_lost(launched.job, driver.fail)             # called at most once, even if it is lost already
        plan = JobEpoch(launched.job, FIRST_EPOCH)
        driver = Driver(plan, member.wire, ...)                   # `wire` reaches all machines of the plan by now
        member.tell(JobProgress(...))                             # in the background; lost when the broker is away
        await member.request(JobEnded(...), None, timeout_s=10)
        await member.close()
    """

    def __init__(
        self,
        identity: Identity,
        token: str | JoinToken,
        *,
        role: Literal["compnode", "owner", "observer"],
        name: str,
        profile: DeviceProfile | None = None,
        disk: DiskProfile | None = None,
        disk_folder: Path | None = None,
        plane: Plane | None = None,
        listen: str | None = "127.0.0.1:0",
        advertise: Sequence[str] = (),
        lab: LabConfig | None = None,
        slowdown: float = 1.0,
        throttle: Throttle | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            identity: this machine's key.
            token: join token of the pool.
            role: an observer only asks for the status; the others need `profile` and `plane`.
            name: for people; the broker makes it unique.
            profile: measured device (`fusionai.pool.device_measurement.measure`).
            disk: measured disk (`fusionai.compnode.disk.measure_disk`); None when it is not offered.
            disk_folder: where it is, so that the broker is told what is free there from time to time.
            plane: runs this machine's sub-DAGs.
            listen: "host:port" at which other members may dial this one; None not to listen.
            advertise: addresses to tell others of, where they differ from `listen`.
            lab: emulated links.
            slowdown: emulated speed: every pass is stretched by this factor.
            throttle: emulated too: from some step of a job on it is slower still.
            limits: of the network.

        Raises:
            TokenError: the token is malformed, forged or expired.
            ConfigError: the name or an address is malformed.
        """
        check_name(name)
        if role != "observer" and profile is None:
            raise ConfigError(f"a {role} joins with its device's profile; measure it first")
        self.identity = identity
        self.token = token if isinstance(token, JoinToken) else JoinToken.decode(token)
        self.role = role
        self.name = name
        """The name asked for; after `start` the one given by the broker."""
        self.profile = profile
        self.disk = disk
        self._disk_folder = disk_folder
        self.address: str | None = None
        """Where it listens, after `start`."""
        if limits is None and role == "compnode" and profile is not None:
            # No tensor of a job is larger than the memory offered; an assignment may be as large as a parcel.
            most = max(PARCEL_BYTES, min(profile.memory_bytes, Limits().bulk_body_bytes))
            limits = Limits(bulk_body_bytes=most)
        self.endpoint = Endpoint(identity, self, authorise=self._authorise, limits=limits, lab=lab, name=name)
        self.wire = JobWire(self.endpoint)
        """Carries the messages of jobs."""
        self._asked_name = name
        emulated = Slowdown(slowdown, throttle)
        self._lab = lab is not None or emulated.emulated
        self._listen = listen
        self._advertise = tuple(advertise)
        self._addresses: tuple[str, ...] = ()
        self._tasks = BackgroundTasks()
        self._parcels = ParcelInbox(most=4)
        self._busy = BusyMeter()
        self._news = JobNews()
        self._session = BrokerSession(
            self.endpoint,
            self.token,
            register=self._register,
            heartbeat=None if role == "observer" else self._heartbeat,
            on_registered=self._on_registered,
        )
        self.plane = plane
        """What runs this machine's stages; None for an observer."""
        self._hosting = Hosting(
            self.wire,
            plane,
            memory_bytes=profile.memory_bytes if profile is not None else 0,
            # A compnode gives itself to one job at a time; an owner holds its own shares of its own jobs.
            most_jobs=1 if role == "compnode" else 8,
            slowdown=emulated,
            changed=self._changed,
        )
        self._probes = Probes(self.endpoint, needed=self._hosting.admits)
        self._relief = Relief(lambda: self._hosting.holds)

    @property
    def device(self) -> str:
        """The plane's device on which this machine's stages run."""
        return self.profile.device if self.profile is not None else "cpu"

    @property
    def lab(self) -> bool:
        """Whether this machine emulates its speed or its links."""
        return self._lab

    # --- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, connect with the broker, and register.

        Raises:
            TokenError, AuthenticationError: the broker does not admit this machine, or another node answers there.
            PeerLost, PeerTimeout: nobody answers there.
            ConfigError: the port is in use.
        """
        try:
            if self._listen is not None:
                host, port = split_address(self._listen)
                self.address = await self.endpoint.listen(host, port)
                self._addresses = advertised(self.address, self._advertise, towards=self.token.addresses)
            await self._session.open()
        except BaseException:
            await self.close()
            raise

    async def wait_ended(self) -> None:
        """Wait until the broker refuses this machine for good, and raise its error. Cancel it to stop waiting."""
        await asyncio.shield(self._session.ended)

    async def relieve(self, reason: str, within_s: float) -> str:
        """Have others take what this machine holds, which may be waited for so long; get no further work.

        Returns why something is held still; "" once nothing is, and leaving costs nobody anything.
        """

        async def ask(message: WishToLeave) -> None:
            await self.request(message, None, timeout_s=ASK_TIMEOUT_S)

        return await self._relief.wait(ask, reason, within_s)

    async def close(self, reason: str = "it stopped") -> None:
        """Leave the pool: drop all jobs, say good-bye, close everything. May be called again."""
        await self._session.close(reason)
        await self._tasks.close()
        await self._hosting.close(reason)
        await self.endpoint.close()

    # --- words with the broker ----------------------------------------------------------------------------------

    @overload
    async def request(self, message: msgspec.Struct, answer: type[_Answer], *, timeout_s: float) -> _Answer: ...

    @overload
    async def request(self, message: msgspec.Struct, answer: None, *, timeout_s: float) -> None: ...

    async def request(
        self, message: msgspec.Struct, answer: type[_Answer] | None, *, timeout_s: float
    ) -> _Answer | None:
        """Ask the broker, and return its answer of that type; with None, only wait for it.

        Raises:
            PeerLost: there is no connection with the broker now.
            PeerTimeout: no answer in time.
            FusionError: what the broker says.
        """
        payload = await self._session.link().request(kind_of(message), encode(message), timeout_s=timeout_s)
        return None if answer is None else decode(answer, payload)

    def tell(self, message: msgspec.Struct) -> None:
        """Send the broker a notice in the background; it is lost when there is no connection."""
        self._tasks.start(self._tell(message), f"tell {kind_of(message)}")

    async def _tell(self, message: msgspec.Struct) -> None:
        try:
            async with asyncio.timeout(_TELL_TIMEOUT_S):
                await self._session.link().notify(kind_of(message), encode(message))
        except (NetworkError, TimeoutError) as error:
            log.debug("the broker was not told %s: %s", kind_of(message), error)

    async def send_graph(self, graph_hash: str, encoded: bytes) -> None:
        """Send the broker an encoded OP-DAG ahead of the `SubmitJob` that names its content hash."""
        await self._session.link().send_bulk(GRAPH, graph_hash.encode("ascii"), encoded)

    def on_job_lost(self, job: JobId, callback: Callable[[str], None]) -> None:
        """Have `callback(reason)` called once when the broker gives a job up; at once if it did already."""
        self._news.on_lost(job, callback)

    def on_pool_changed(self, job: JobId, callback: Callable[[PoolChanged], None] | None) -> None:
        """Have a callback called whenever the broker says that the pool has changed for an own job; None: no more."""
        self._news.on_pool_changed(job, callback)

    def on_plan_lost(self, plan: JobEpoch, callback: Callable[[str], None]) -> None:
        """Have `callback(reason)` called once when the broker gives up a plan that is prepared for an own job; at once
        if it did already."""
        self._news.on_lost(plan, callback)

    def host(self, plan: JobEpoch) -> StageHost | None:
        """Return this machine's own stages of a plan, if it has any."""
        return self._hosting.host(plan)

    async def release(self, plan: JobEpoch, reason: str) -> None:
        """Drop this machine's own share of a plan."""
        await self._hosting.release(plan, reason)

    @property
    def holds(self) -> tuple[HeldShare, ...]:
        """What this machine holds."""
        return self._hosting.holds

    # --- admission --------------------------------------------------------------------------------------------

    async def _authorise(self, peer: PeerId, credential: bytes) -> None:
        """Admit machines of own jobs and announced probes. Nobody else, the broker included: it is dialled."""
        if self._hosting.admits(peer) or self._probes.expects(peer):
            return
        raise AuthenticationError(
            f"{self.name} takes links only from machines of a job that it works for, and {peer[:12]} is none"
        )

    # --- Handler ----------------------------------------------------------------------------------------------

    async def on_link(self, link: Link) -> None:
        """Nothing to do: links are asked for where they are needed."""

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Obey the broker, or pass a request of a job on."""
        if kind.startswith(JOB_PREFIX):
            self._check_job_peer(link)
            return await self.wire.on_request(link, kind, payload)
        self._check_broker(link, kind)
        if kind == kind_of(AssignShare):
            assign = decode(AssignShare, payload)
            plan = JobEpoch(assign.job, assign.epoch)
            packed = await self._parcels.take(link.peer, str(plan), timeout_s=PARCEL_TIMEOUT_S)
            assignment = await asyncio.to_thread(unpack, packed)
            if assignment.plan != plan:
                raise ProtocolError(f"the assignment of job {assignment.plan} came for job {plan}")
            await self._hosting.assign(assignment)
            return b""
        if kind == kind_of(LinkNeighbours):
            linking = decode(LinkNeighbours, payload)
            await self._hosting.connect(JobEpoch(linking.job, linking.epoch))
            return b""
        if kind == kind_of(ExpectProbe):
            self._probes.expect(decode(ExpectProbe, payload))
            return b""
        if kind == kind_of(ProbeLink):
            return encode(await self._probes.probe(decode(ProbeLink, payload)))
        raise ProtocolError(f"request {kind!r} is unknown to this member; update fusionai on one of both sides")

    async def on_notice(self, link: Link, kind: str, payload: bytes) -> None:
        """Hear the broker, or pass a notice of a job on."""
        if kind.startswith(JOB_PREFIX):
            self._check_job_peer(link)
            await self.wire.on_notice(link, kind, payload)
            return
        self._check_broker(link, kind)
        if kind == kind_of(ReleaseShare):
            release = decode(ReleaseShare, payload)
            # Ending a pass takes its time; the broker's next words must not wait for it.
            plan = JobEpoch(release.job, release.epoch)
            self._tasks.start(self._hosting.release(plan, release.reason), "release")
            self._news.lost(plan, release.reason, keep=self.role == "owner")
        elif kind == kind_of(JobLost):
            lost = decode(JobLost, payload)
            self._news.lost(lost.job, lost.reason, keep=self.role == "owner")
        elif kind == kind_of(PlanLost):
            plan_lost = decode(PlanLost, payload)
            plan = JobEpoch(plan_lost.job, plan_lost.epoch)
            self._news.lost(plan, plan_lost.reason, keep=self.role == "owner")
        elif kind == kind_of(PoolChanged):
            self._news.pool_changed(decode(PoolChanged, payload))
        elif kind == kind_of(NoReplacement):
            self._relief.refused(decode(NoReplacement, payload))
        else:
            log.info("the broker sent a notice %r that this version does not know", kind)

    async def on_bulk(self, link: Link, kind: str, header: bytes, body: bytearray) -> None:
        """Take an assignment, or pass a tensor on."""
        if kind == ASSIGNMENT:
            self._check_broker(link, kind)
            await self._parcels.put(link.peer, header.decode("ascii", "replace"), bytes(body))
        elif kind.startswith(JOB_PREFIX):
            self._check_job_peer(link)
            await self.wire.on_bulk(link, kind, header, body)
        else:
            raise ProtocolError(f"bulk {kind!r} is unknown to this member")

    async def on_close(self, link: Link, error: NetworkError) -> None:
        """Tell the session, and the jobs."""
        self._session.broken(link, error)
        if link.peer == self.token.broker:
            self._parcels.drop(link.peer)
            self._relief.cut_off(str(error))
        else:
            await self.wire.on_close(link.peer, error)

    def _check_broker(self, link: Link, kind: str) -> None:
        if link.peer != self.token.broker:
            raise ProtocolError(f"{kind!r} is for the broker to say, not for {link.peer[:12]}")

    def _check_job_peer(self, link: Link) -> None:
        if link.peer == self.token.broker:
            raise ProtocolError("the broker takes no part in jobs")

    # --- inside -----------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """A job came or went."""
        self._session.beat_now()
        self._relief.changed()

    def _register(self) -> RegisterMember:
        return RegisterMember(
            name=self._asked_name,
            role=self.role,
            device=self.profile,
            addresses=self._addresses,
            lab=self._lab,
            disk=self.disk,
        )

    def _on_registered(self, registered: MemberRegistered) -> None:
        self.name = self.endpoint.name = registered.name

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            busy=self._busy.read(self._hosting.busy_s),
            memory_bytes=self._hosting.memory_bytes,
            holds=self._hosting.holds,
            bytes_sent=self._hosting.bytes_sent,
            disk_free_bytes=None if self._disk_folder is None else free_disk_bytes(self._disk_folder),
        )


__all__ = ["PREFIX", "Member"]
