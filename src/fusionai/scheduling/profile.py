"""What the scheduler knows about machines and links: measured, or estimated from measures and marked so."""

from __future__ import annotations

import math

import msgspec

from fusionai.graph.abilities import PlaneAbilities


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
    abilities: PlaneAbilities | None = None
    """What the plane can run on the device; None: it did not say, and is taken to run everything."""


class DiskProfile(msgspec.Struct, frozen=True):
    """The disk under a machine's state folder."""

    free_bytes: int
    write_bytes_per_s: float | None
    """Sequential, until the disk says that it has them; None: not measured, the disk is nearly full."""
    read_bytes_per_s: float | None
    """Sequential, not from the system's cache; None: not measured, or the cache could not be passed by."""


class Availability(msgspec.Struct, frozen=True):
    """How a machine has kept its place in the pool so far, as its broker saw it."""

    member_s: float
    """Seconds since it first joined."""
    present_s: float
    """Seconds of those in which it was there."""
    losses: int
    """Times it vanished without a word."""
    leaves: int
    """Times it left by its provider's will."""
    mean_time_between_losses_s: float
    """Expected seconds until it vanishes, from `present_s`, `losses` and a prior for newcomers."""


class LinkProfile(msgspec.Struct, frozen=True):
    """One direction of a link between two machines."""

    rtt_s: float
    bandwidth_bytes_per_s: float
    estimated: bool = False
    """Whether no probe has measured this pair."""


UNMEASURED = LinkProfile(rtt_s=0.05, bandwidth_bytes_per_s=12.5e6, estimated=True)
"""Assumed where nothing at all was measured that would tell more: 50 ms, 100 Mbit/s."""


class AccessProfile(msgspec.Struct, frozen=True):
    """What one machine's access to the network gives, estimated from its probes (`broker.link_estimation`).

    Two profiles of the same estimate tell the link between their machines.
    """

    up_bytes_per_s: float
    """What it can send at all, beyond its own site."""
    down_bytes_per_s: float
    """What it can receive at all, beyond its own site."""
    place_s: tuple[float, ...]
    """Network coordinates."""
    height_s: float
    """Its own access line's part of every round trip."""
    site: int = -1
    """Machines of one number share a local network; -1: none is known near this one."""
    near_up_bytes_per_s: float = 0.0
    near_down_bytes_per_s: float = 0.0
    near_rtt_s: float = 0.0
    """The same among machines of its site."""

    def link_to(self, other: AccessProfile) -> LinkProfile:
        """Return the estimated link from this machine to another one."""
        if self.site == other.site >= 0:
            bandwidth = min(self.near_up_bytes_per_s, other.near_down_bytes_per_s)
            return LinkProfile((self.near_rtt_s + other.near_rtt_s) / 2, bandwidth, estimated=True)
        rtt_s = math.dist(self.place_s, other.place_s) + self.height_s + other.height_s
        return LinkProfile(rtt_s, min(self.up_bytes_per_s, other.down_bytes_per_s), estimated=True)


class Member(msgspec.Struct, frozen=True):
    """A machine that may take part in a job."""

    peer: str
    name: str
    device: DeviceProfile
    addresses: tuple[str, ...] = ()
    dialable: bool = False
    disk: DiskProfile | None = None
    availability: Availability | None = None


class Lines(msgspec.Struct, frozen=True):
    """What all links of a machine carry together, in bytes per second."""

    up_bytes_per_s: float
    down_bytes_per_s: float


class Pool(msgspec.Struct, frozen=True):
    """The machines offered for a job, and the links between them."""

    members: tuple[Member, ...]
    links: dict[str, LinkProfile] = {}
    """Measured ones, by "source>target"."""
    access: dict[str, AccessProfile] = {}
    """By peer, of one estimate: tells the links that were not measured. May hold the owner, and more peers."""
    lines: dict[str, Lines] = {}
    """By peer; a machine that is not here is limited by its links only. Measuring one link after the other does not
    tell whether they share a line, so a broker gives none."""

    def link(self, source: str, target: str) -> LinkProfile:
        """Return the link from one peer to another: measured, else estimated, else `UNMEASURED`."""
        measured = self.links.get(f"{source}>{target}")
        if measured is not None:
            return measured
        one, other = self.access.get(source), self.access.get(target)
        return UNMEASURED if one is None or other is None else one.link_to(other)
