"""A compnode as a member of its pool: it holds shares of jobs, probes links, and leaves in order."""

from __future__ import annotations

from dataclasses import replace

from fusionai.compnode.disk_report import DiskReport
from fusionai.compnode.relief import ASK_TIMEOUT_S, Relief
from fusionai.execution.plane import Plane
from fusionai.network.identity import Identity
from fusionai.network.limits import Limits
from fusionai.network.token import JoinToken
from fusionai.pool.member import MemberConfig, PoolMember
from fusionai.pool.messages import HeldShare, WishToLeave
from fusionai.pool.parcels import MOST_BYTES as PARCEL_BYTES
from fusionai.pool.probe_service import ProbeService
from fusionai.scheduling.profile import DeviceProfile
from fusionai.training.hosting import Hosting
from fusionai.training.slowdown import FULL_SPEED, Slowdown
from fusionai.training.wire import JobWire


class CompnodeMember(PoolMember):
    """A member that gives its device to the pool."""

    def __init__(
        self,
        identity: Identity,
        token: str | JoinToken,
        config: MemberConfig,
        *,
        profile: DeviceProfile,
        plane: Plane | None,
        slowdown: Slowdown = FULL_SPEED,
        disk: DiskReport | None = None,
    ) -> None:
        """Prepare, as `PoolMember` does.

        Args:
            profile: measured device (`fusionai.pool.device_measurement.measure`).
            plane: runs this machine's stages; a machine without one takes none.
            slowdown: emulated speed: every pass is stretched by it.
            disk: tells of the disk; None when it is not offered.
        """
        if config.limits is None:
            # No tensor of a job is larger than the memory offered; an assignment may be as large as a parcel.
            most = max(PARCEL_BYTES, min(profile.memory_bytes, Limits().bulk_body_bytes))
            config = replace(config, limits=Limits(bulk_body_bytes=most))
        super().__init__(identity, token, "compnode", config)
        self.wire = JobWire(self.endpoint)
        """Carries the messages of jobs."""
        # A compnode gives itself to one job at a time.
        self.hosting = Hosting(
            self.wire, plane, profile, most_jobs=1, slowdown=slowdown, changed=self._on_hosting_changed
        )
        self.probes = ProbeService(self.endpoint, needed=self.hosting.admits)
        self._relief = Relief(lambda: self.holds)
        self.add(self.hosting, self.probes, self._relief, *([disk] if disk is not None else []))

    @property
    def holds(self) -> tuple[HeldShare, ...]:
        """What this machine holds."""
        return self.hosting.holds

    async def relieve(self, reason: str, within_s: float) -> str:
        """Have others take what this machine holds, which may be waited for so long; get no further work.

        Returns why something is held still; "" once nothing is, and leaving costs nobody anything.
        """

        async def ask(message: WishToLeave) -> None:
            await self.request(message, None, timeout_s=ASK_TIMEOUT_S)

        return await self._relief.wait(ask, reason, within_s)

    def _on_hosting_changed(self) -> None:
        self.beat_now()
        self._relief.changed()
