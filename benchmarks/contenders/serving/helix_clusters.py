"""The three clusters on which Helix was evaluated, rebuilt from its descriptions.

Source: Mei et al., "Helix: Serving Large Language Models over Heterogeneous GPUs and Network via Max-Flow", ASPLOS 2025
(arXiv 2406.01566), and the description of its published artifact (github.com/Thesys-lab/Helix-ASPLOS25, commit
148b733, 2024-11-24, `artifact_evaluation/ae_readme.md` and the cluster files next to it).

Published: how many machines of which GPUs, in which regions; 10 Gbit/s within a cluster; 100 Mbit/s and 50 ms between
regions, and between the coordinator and all machines of the distributed one; 1 ms within.
Reconstructed: the artifact draws each link of the distributed cluster around these means (a tenth within a region, a
fifth between); here all have the mean. Its other two clusters run at 8 Gbit/s by their files, 10 by the paper: 10 here.
Assumed: the A100 is the SXM card of 40 GB that Google's machines have. What several GPUs of one machine reach together
is `SEVERAL`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.profile import DeviceProfile, Member
from fusionai.simulation.hardware.catalogue import lookup
from fusionai.simulation.hardware.efficiency import profile_of

CATALOGUE = {"A100": "NVIDIA A100 SXM 40GB", "V100": "NVIDIA V100 SXM2 16GB", "L4": "NVIDIA L4", "T4": "NVIDIA T4"}

SEVERAL = {1: (1.0, 1.0), 2: (1.57, 1.9), 4: (2.1, 3.5)}
"""By GPUs in one machine: factors of computing and of memory bandwidth over one GPU. From Helix's published times of
one LLaMA-2-70B layer: 1000 tokens of prompt take 38 and 24 ms on one and two L4, 59, 38 and 28 ms on one, two and four
T4; a small decode batch takes 6.9 and 3.6, and 7.1, 3.8 and 2.0 ms."""

_INSIDE = (1.25e9, 1e-3)
_BETWEEN = (12.5e6, 50e-3)
"""Bytes per second, and one-way seconds."""


@dataclass(frozen=True, slots=True)
class RegionLinks:
    """Equal links within a region, and between any two. Implements `fusionai.scheduling.links.LinkModel`."""

    region: Indices
    """Of each machine, the gateway last; a region of its own is far from everybody."""
    inside: tuple[float, float]
    between: tuple[float, float]
    """Bytes per second, and one-way seconds."""

    def bandwidths_bytes_per_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the bandwidth from each source to its target."""
        return np.where(self.region[sources] == self.region[targets], self.inside[0], self.between[0])

    def rtts_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the round-trip times in seconds."""
        return 2 * np.where(self.region[sources] == self.region[targets], self.inside[1], self.between[1])


@dataclass(frozen=True, kw_only=True)
class PublishedCluster:
    """Machines by region, as (GPU, how many in the machine) each."""

    name: str
    regions: tuple[tuple[tuple[str, int], ...], ...]
    coordinator_apart: bool
    """Whether the gateway is in a region of its own."""

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Return the machines, all of which can be dialled."""
        kinds = [kind for region in self.regions for kind in region]
        return tuple(
            Member(f"m{index}", f"{gpu}{f'x{count}' if count > 1 else ''} {index}", device_of(gpu, count), (), True)
            for index, (gpu, count) in enumerate(kinds)
        )

    @cached_property
    def gateway(self) -> Member:
        """Return the coordinator's machine, which holds nothing of the model."""
        return Member("gateway", "gateway", msgspec.structs.replace(device_of("T4", 1), memory_bytes=0), (), True)

    @cached_property
    def links(self) -> RegionLinks:
        """Return the links between the machines and the gateway."""
        region = [index for index, machines in enumerate(self.regions) for _ in machines]
        return RegionLinks(np.asarray([*region, len(self.regions) if self.coordinator_apart else 0]), _INSIDE, _BETWEEN)


def device_of(gpu: str, count: int) -> DeviceProfile:
    """Return the profile of so many GPUs working as one: catalogue figures, assumed shares of the peak, and `SEVERAL`.

    Half precision is fp16, as in Helix's runs.
    """
    one = profile_of(lookup(CATALOGUE[gpu]), half_as="fp16")
    computing, memory = SEVERAL[count]
    return msgspec.structs.replace(
        one,
        name=one.name if count == 1 else f"{count} {one.name}",
        memory_bytes=count * one.memory_bytes,
        flops_per_s={name: computing * rate for name, rate in one.flops_per_s.items()},
        memory_bytes_per_s=memory * one.memory_bytes_per_s,
    )


SINGLE = PublishedCluster(
    name="single",
    regions=((*(("A100", 1),) * 4, *(("L4", 1),) * 8, *(("T4", 1),) * 12),),
    coordinator_apart=False,
)

GEO_DISTRIBUTED = PublishedCluster(
    name="geo-distributed",
    regions=(
        (("A100", 1),) * 4,
        (*(("L4", 1),) * 2, *(("T4", 1),) * 8),
        (*(("L4", 1),) * 6, *(("T4", 1),) * 4),
    ),
    coordinator_apart=True,
)

HIGH_HETEROGENEITY = PublishedCluster(
    name="high-heterogeneity",
    regions=(
        (
            *(("A100", 1),) * 4,
            *(("V100", 1),) * 6,
            *(("L4", 1),) * 8,
            *(("L4", 2),) * 4,
            *(("T4", 1),) * 10,
            *(("T4", 2),) * 6,
            *(("T4", 4),) * 4,
        ),
    ),
    coordinator_apart=False,
)

CLUSTERS = (SINGLE, GEO_DISTRIBUTED, HIGH_HETEROGENEITY)
