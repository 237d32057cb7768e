"""What the scheduler knows about machines and links: measured, never guessed by users."""

from __future__ import annotations

import msgspec


class DeviceProfile(msgspec.Struct, frozen=True):
    """One machine's device, as it was measured when it joined."""

    name: str
    """Device for people ("NVIDIA GeForce RTX 3080")."""
    device: str
    """Device for the plane ("cuda:0", "cpu")."""
    plane: str
    plane_version: str
    memory_bytes: int
    """What its provider offers."""
    threads: int
    flops_per_s: dict[str, float]
    """Achieved FLOP/s by op class ("matmul", "attention", "convolution")."""
    memory_bytes_per_s: float
    """Achieved bandwidth of memory-bound operators, bytes read plus written."""
    overhead_s: float
    """Seconds that one small operator takes."""
    update_bytes_per_s: float = 0.0
    """Achieved bandwidth of the optimizer's update, as `estimator.update_s` counts bytes; 0: that of operators."""


class LinkProfile(msgspec.Struct, frozen=True):
    """One direction of a link between two machines."""

    rtt_s: float
    bandwidth_bytes_per_s: float


UNMEASURED = LinkProfile(rtt_s=0.05, bandwidth_bytes_per_s=12.5e6)
"""Assumed for a pair that no probe has measured yet: 50 ms, 100 Mbit/s."""


class Member(msgspec.Struct, frozen=True):
    """A machine that may take part in a job."""

    peer: str
    name: str
    device: DeviceProfile
    addresses: tuple[str, ...] = ()
    dialable: bool = False


class Pool(msgspec.Struct, frozen=True):
    """The machines offered for a job, and the links between them."""

    members: tuple[Member, ...]
    links: dict[str, LinkProfile] = {}
    """By "source>target"."""

    def link(self, source: str, target: str) -> LinkProfile:
        """Return the link from one peer to another, or `UNMEASURED`."""
        return self.links.get(f"{source}>{target}", UNMEASURED)
