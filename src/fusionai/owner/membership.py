"""The owner's machine as a member of a pool, for as long as a job takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from fusionai.execution.plane import Plane
from fusionai.execution.planes import plane
from fusionai.network.identity import Identity
from fusionai.network.lab import LabConfig
from fusionai.network.token import JoinToken
from fusionai.owner.job_news import JobNews
from fusionai.pool.codec import GRAPH
from fusionai.pool.device_measurement import measure
from fusionai.pool.hosting import Hosting
from fusionai.pool.identifiers import JobEpoch, JobId
from fusionai.pool.job_wire import JobWire
from fusionai.pool.member import MemberConfig, PoolMember
from fusionai.pool.messages import PoolChanged
from fusionai.pool.probe_service import ProbeService
from fusionai.scheduling.profile import DeviceProfile
from fusionai.training.slowdown import FULL_SPEED, Slowdown
from fusionai.training.training_work import TrainingWork


@dataclass(frozen=True, kw_only=True)
class OwnerOptions:
    """How the owner's machine takes part."""

    token: str
    """Join token of the pool."""
    name: str = "owner"
    device: str | None = None
    """For the stages that stay here; None: the best there is."""
    threads: int = 1
    listen: str = "127.0.0.1:0"
    """Where compnodes may dial this machine."""
    advertise: tuple[str, ...] = ()
    lab: LabConfig | None = None
    slowdown: float = 1.0


class OwnerMember(PoolMember):
    """A member that submits jobs, holds its own stages of them, and hears what becomes of them.

    async with joined(options) as owner:
        await owner.send_graph(content_hash, encoded)
        launched = await owner.request(submit, JobLaunched, timeout_s=300)   # errors of the broker, by class and text
        driver = Driver(launched.job, owner.wire, ...)     # `wire` reaches all machines of the plan by now
        owner.on_job_lost(launched.job, give_up)           # called at most once, even if it is lost already
        owner.tell(JobProgress(...))                       # in the background; lost when the broker is away
        await owner.request(JobEnded(...), None, timeout_s=10)
    """

    def __init__(
        self,
        identity: Identity,
        token: str | JoinToken,
        config: MemberConfig,
        *,
        profile: DeviceProfile,
        plane: Plane,
        slowdown: Slowdown = FULL_SPEED,
    ) -> None:
        """Prepare, as `PoolMember` does.

        Args:
            profile: measured device (`fusionai.pool.device_measurement.measure`).
            plane: runs this machine's stages.
            slowdown: emulated speed: every pass is stretched by it.
        """
        super().__init__(identity, token, "owner", replace(config, emulates_speed=slowdown.emulated))
        self.plane = plane
        self.device = profile.device
        """The plane's device on which this machine's stages run."""
        training = TrainingWork(plane, slowdown, only_for=identity.peer_id)
        self.wire = JobWire(self.endpoint, [training.messages])
        """Carries the messages of jobs."""
        self.hosting = Hosting(self.wire, profile, [training], changed=self.beat_now)
        self._news = JobNews()
        self.add(self.wire, self.hosting, ProbeService(self.endpoint, needed=self.hosting.admits), self._news)

    async def send_graph(self, graph_hash: str, encoded: bytes) -> None:
        """Send the broker an encoded OP-DAG ahead of the `SubmitJob` that names its content hash."""
        await self.send_bulk(GRAPH, graph_hash.encode("ascii"), encoded)

    def on_job_lost(self, job: JobId, callback: Callable[[str], None] | None) -> None:
        """Have `callback(reason)` called once when the broker gives a job up; at once if it did already. None: no
        more."""
        self._news.on_lost(job, callback)

    def on_pool_changed(self, job: JobId, callback: Callable[[PoolChanged], None] | None) -> None:
        """Have a callback called whenever the broker says that the pool has changed for an own job; None: no more."""
        self._news.on_pool_changed(job, callback)

    def on_plan_lost(self, plan: JobEpoch, callback: Callable[[str], None] | None) -> None:
        """Have `callback(reason)` called once when the broker gives up a plan that is prepared for an own job; at once
        if it did already. None: no more."""
        self._news.on_lost(plan, callback)

    async def release(self, plan: JobEpoch, reason: str) -> None:
        """Drop this machine's own share of a plan."""
        await self.hosting.release(plan, reason)


@asynccontextmanager
async def joined(options: OwnerOptions) -> AsyncIterator[OwnerMember]:
    """Be a member of the pool; leaves it in the end.

    Raises TokenError, AuthenticationError, PeerLost or PeerTimeout when the pool does not admit this machine.
    """
    JoinToken.decode(options.token)  # a wrong token is told before anything slow
    torch_plane = await asyncio.to_thread(plane, "torch")
    cache = Path(platformdirs.user_data_dir("fusionai", appauthor=False)) / "owner"
    profile = await asyncio.to_thread(
        measure,
        torch_plane,
        device=options.device,
        threads=options.threads,
        slowdown=options.slowdown,
        cache_folder=cache,
    )
    member = OwnerMember(
        Identity.ephemeral(),
        options.token,
        MemberConfig(name=options.name, listen=options.listen, advertise=options.advertise, lab=options.lab),
        profile=profile,
        plane=torch_plane,
        slowdown=Slowdown(options.slowdown),
    )
    await member.start()
    try:
        yield member
    finally:
        await member.close()
