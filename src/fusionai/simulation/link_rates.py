"""The links that a simulation runs over: each direction of a pair, and the uplinks and downlinks that pairs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fusionai.scheduling.profile import UNMEASURED, LinkProfile
from fusionai.simulation.hardware.what_if_pool import WhatIfPool


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What the links between machines carry, by peer.

    A machine without an uplink or downlink here is limited by its links only.
    """

    link: Callable[[str, str], LinkProfile]
    """From one peer to another, alone on it; asked once for each pair in use. "" is the driver of an open job."""
    up_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """What all links from a machine carry together."""
    down_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """What all links to a machine carry together."""


def links_of_what_if(pool: WhatIfPool, *, shared: bool = True) -> LinkRates:
    """Return the links of a pool file. `shared`: the tensors of a machine share its uplink and its downlink."""
    index = {machine.peer: place for place, machine in enumerate(pool.machines)}

    def link(source: str, target: str) -> LinkProfile:
        if source not in index or target not in index:
            return UNMEASURED
        return pool.link(index[source], index[target])

    if not shared:
        return LinkRates(link)
    return LinkRates(
        link,
        {peer: float(pool.up_bytes_per_s[place]) for peer, place in index.items()},
        {peer: float(pool.down_bytes_per_s[place]) for peer, place in index.items()},
    )
