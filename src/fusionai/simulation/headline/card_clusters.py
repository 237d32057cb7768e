"""The machines that are compared: cards that are all alike, each on a link of its own."""

from __future__ import annotations

from dataclasses import dataclass

from fusionai.scheduling.profile import DeviceProfile
from fusionai.simulation.hardware.catalogue import Hardware, lookup
from fusionai.simulation.hardware.efficiency import profile_of

LATENCY_S = {10.0: 20e-3, 100.0: 20e-3, 1000.0: 10e-3, 10_000.0: 1e-3}
"""One-way, by Mbit/s: assumed, the better the line the nearer its ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal machines and links. What a machine sends to all others together goes through its link."""

    name: str
    hardware: Hardware
    count: int
    bytes_per_s: float
    latency_s: float
    """One-way."""
    rate: str
    """The link in words."""

    @property
    def device(self) -> DeviceProfile:
        """Return the profile of each machine, shares of the peak as assumed for all GPUs alike."""
        return profile_of(self.hardware)


def consumer(mbps: float, count: int = 50) -> Cluster:
    """Return RTX 3080 on links of so many Mbit/s, the same up and down."""
    known = min(LATENCY_S, key=lambda each: abs(each - mbps))
    return Cluster(
        name=f"{count} RTX 3080",
        hardware=lookup("RTX 3080"),
        count=count,
        bytes_per_s=mbps * 1e6 / 8,
        latency_s=LATENCY_S[known],
        rate=f"{mbps:g} Mbps" if mbps < 1000 else f"{mbps / 1000:g} Gbps",
    )


def datacentre() -> tuple[Cluster, Cluster]:
    """Return four H100 in one box: on PCIe 5 x16, and SXM on NVLink. Bandwidths of datasheets, latencies assumed."""
    return (
        Cluster(
            name="4 H100 PCIe",
            hardware=lookup("H100 PCIe"),
            count=4,
            bytes_per_s=64e9,
            latency_s=10e-6,
            rate="PCIe 5, 64 GB/s",
        ),
        Cluster(
            name="4 H100 SXM",
            hardware=lookup("H100 SXM"),
            count=4,
            bytes_per_s=450e9,
            latency_s=5e-6,
            rate="NVLink, 450 GB/s",
        ),
    )
