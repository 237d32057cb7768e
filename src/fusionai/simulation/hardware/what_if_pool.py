"""A pool that need not exist: machines, and links that follow from their uplinks, downlinks and regions.

Links are computed when asked for: ten thousand machines have a hundred million pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fusionai.errors import ConfigError
from fusionai.scheduling.profile import Lines, LinkProfile, Member, Pool
from fusionai.simulation.hardware.catalogue import Hardware

MOST_WRITTEN_OUT = 1000
"""Machines of which `WhatIfPool.pool` writes every link out: a million links are some hundred megabytes."""


@dataclass(frozen=True, slots=True, eq=False)
class WhatIfPool:
    """Machines and the links between them. Arrays are by machine: the members, then the owner if there is one."""

    members: tuple[Member, ...]
    """What may serve a job; the owner's machine is not among them."""
    owner: Member | None
    hardware: tuple[Hardware | None, ...]
    """By machine: the catalogue's entry, of whose peak the rates are a share; None where the file gave the rates."""
    up_bytes_per_s: NDArray[np.float64]
    down_bytes_per_s: NDArray[np.float64]
    regions: tuple[str, ...]
    region: NDArray[np.int64]
    """By machine: an index into `regions`."""
    rtt_s: NDArray[np.float64]
    """By two regions; symmetric."""
    cap_bytes_per_s: NDArray[np.float64]
    """By two regions: what one transfer between them gets at most; infinite where nothing is said."""

    @property
    def machines(self) -> tuple[Member, ...]:
        """Return the members, then the owner if there is one: the order of the arrays."""
        return self.members if self.owner is None else (*self.members, self.owner)

    @property
    def owner_index(self) -> int | None:
        """Return the owner's place in the arrays."""
        return None if self.owner is None else len(self.members)

    def link(self, source_index: int, target_index: int) -> LinkProfile:
        """Return the link from one machine to another, alone on it.

        Its bandwidth is the least of the source's uplink, the target's downlink and the cap between their regions.
        """
        regions = self.region[source_index], self.region[target_index]
        up, down = self.up_bytes_per_s[source_index], self.down_bytes_per_s[target_index]
        return LinkProfile(
            rtt_s=float(self.rtt_s[regions]), bandwidth_bytes_per_s=float(min(up, down, self.cap_bytes_per_s[regions]))
        )

    def bandwidths_bytes_per_s(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the bandwidths from sources to targets, as `link`: the pool is a planner's `LinkModel`."""
        ends = np.minimum(self.up_bytes_per_s[sources], self.down_bytes_per_s[targets])
        return np.minimum(ends, self.cap_bytes_per_s[self.region[sources], self.region[targets]])

    def rtts_s(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the round-trip times between sources and targets."""
        return self.rtt_s[self.region[sources], self.region[targets]]

    def pool(self) -> Pool:
        """Return the pool as planners take it, every link written out, the owner's among them.

        Raises:
            ConfigError: it has more than `MOST_WRITTEN_OUT` machines.
        """
        machines = self.machines
        if len(machines) > MOST_WRITTEN_OUT:
            raise ConfigError(
                f"the pool has {len(machines):,} machines, and links are written out for at most {MOST_WRITTEN_OUT:,}; "
                "plan for a part of it"
            )
        links = {
            f"{source.peer}>{target.peer}": self.link(source_index, target_index)
            for source_index, source in enumerate(machines)
            for target_index, target in enumerate(machines)
            if source_index != target_index
        }
        lines = {
            machine.peer: Lines(float(up), float(down))
            for machine, up, down in zip(machines, self.up_bytes_per_s, self.down_bytes_per_s, strict=True)
        }
        return Pool(self.members, links, lines=lines)
