"""What the broker is told of a compnode's disk: its speeds once, its free bytes with every heartbeat."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from fusionai.compnode.disk import free_disk_bytes
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import Heartbeat, RegisterMember
from fusionai.scheduling.profile import DiskProfile


class DiskReport(MemberPart):
    """The part of a member that tells of the disk under its state folder."""

    def __init__(self, profile: DiskProfile, folder: Path) -> None:
        """`profile` is the disk as measured (`fusionai.compnode.disk.measure_disk`), `folder` where it is."""
        self.profile = profile
        self._folder = folder

    def register(self, message: RegisterMember) -> RegisterMember:
        """Add the speeds."""
        return replace(message, disk=self.profile)

    def heartbeat(self, message: Heartbeat) -> Heartbeat:
        """Add the free bytes."""
        return replace(message, disk_free_bytes=free_disk_bytes(self._folder))
