"""A compnode as a member of its pool: it holds shares of jobs, probes links, and leaves in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusionai.compnode.disk_report import DiskReport
from fusionai.compnode.relief import ASK_TIMEOUT_S, Relief
from fusionai.network.identity import Identity
from fusionai.network.limits import Limits
from fusionai.network.token import JoinToken
from fusionai.pool.hosting import Hosting
from fusionai.pool.job_wire import JobWire
from fusionai.pool.member import MemberConfig, PoolMember
from fusionai.pool.messages import HeldShare, WishToLeave
from fusionai.pool.parcels import MOST_BYTES as PARCEL_BYTES
from fusionai.pool.probe_service import ProbeService
from fusionai.pool.work import WorkKind
from fusionai.scheduling.profile import DeviceProfile


class CompnodeMember(PoolMember):
    """A member that gives its device to the pool."""

    def __init__(
        self,
        identity: Identity,
        token: str | JoinToken,
        config: MemberConfig,
        *,
        profile: DeviceProfile,
        work: Sequence[WorkKind[Any]],
        disk: DiskReport | None = None,
    ) -> None:
        """Prepare, as `PoolMember` does.

        Args:
            profile: measured device (`fusionai.pool.device_measurement.measure`).
            work: kinds of work that this machine does.
            disk: tells of the disk; None when it is not offered.
        """
        if config.limits is None:
            # No tensor of a job is larger than the memory offered; an assignment may be as large as a parcel.
            most = max(PARCEL_BYTES, min(profile.memory_bytes, Limits().bulk_body_bytes))
            config = replace(config, limits=Limits(bulk_body_bytes=most))
        super().__init__(identity, token, "compnode", config)
        self.wire = JobWire(self.endpoint, [each.messages for each in work])
        """Carries the messages of jobs."""
        self.hosting = Hosting(self.wire, profile, work, changed=self._on_hosting_changed)
        self.probes = ProbeService(self.endpoint, needed=self.hosting.admits)
        self._relief = Relief(lambda: self.holds)
        self.add(self.wire, self.hosting, self.probes, self._relief, *([disk] if disk is not None else []))

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
