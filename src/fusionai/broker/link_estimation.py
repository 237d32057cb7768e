"""All links of a pool from a few probes of each machine.

A transfer between homes is limited by an access line, seldom by the core of the net. So the bandwidth from i to j is
reckoned as min(up i, down j), and a handful of probes of i, with partners that can take what it sends, tells up i.
Round trips follow from network coordinates. Machines of one local network are the exception to both: they are found
as groups of very short round trips, and have their own rates among themselves.

Everything is kept by machine, never by pair: ten thousand machines take a few megabytes. How wrong estimates are:
docs/profiles.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import networkx as nx
import numpy as np

from fusionai.broker.network_coordinates import Coordinates, fit_coordinates
from fusionai.scheduling.links import Floats, Indices
from fusionai.scheduling.profile import UNMEASURED, AccessProfile, LinkProfile

NEAR_RTT_S = 2e-3
"""Round trips up to this make a site: a wired network, or a data centre. Wireless ones often take longer."""

_SAME_WAY = 0.1
"""Machines of one site have round trips to the broker that differ by no more than `NEAR_RTT_S` and this share."""

_NOISE = 1.25
"""Bandwidths that differ by less than this factor may be the same line measured twice."""

_ROUNDS = 8
"""Passes over up and down rates, each from the other; they hardly move after four."""


@dataclass(frozen=True, eq=False)
class LinkProbes:
    """Measured pairs of machines, each once; all arrays have one entry a pair."""

    sources: Indices
    targets: Indices
    rtts_s: Floats
    there_bytes_per_s: Floats
    """From source to target."""
    back_bytes_per_s: Floats

    @classmethod
    def of(cls, pairs: Sequence[tuple[int, int, LinkProfile, LinkProfile]]) -> LinkProbes:
        """Take pairs of machines with the link there and the link back."""
        table = np.asarray(
            [
                (one, other, (there.rtt_s + back.rtt_s) / 2, there.bandwidth_bytes_per_s, back.bandwidth_bytes_per_s)
                for one, other, there, back in pairs
            ],
            dtype=np.float64,
        ).reshape(-1, 5)
        ends = table[:, :2].astype(np.int64)
        return cls(ends[:, 0], ends[:, 1], table[:, 2], table[:, 3], table[:, 4])

    def chosen(self, keep: np.ndarray) -> LinkProbes:
        """Return some of the pairs."""
        return LinkProbes(*(getattr(self, each.name)[keep] for each in fields(self)))

    def directed(self) -> tuple[Indices, Indices, Floats]:
        """Return senders, receivers and bytes per second, two entries a pair."""
        return (
            np.concatenate([self.sources, self.targets]),
            np.concatenate([self.targets, self.sources]),
            np.concatenate([self.there_bytes_per_s, self.back_bytes_per_s]),
        )


@dataclass(frozen=True, eq=False)
class EstimatedLinks:
    """Estimates by machine, and measures where there are any, as a `LinkModel`. N machines, numbered as in probes."""

    coordinates: Coordinates
    up_N: Floats
    down_N: Floats
    site_N: Indices
    """Number of the local network; -1 for none."""
    near_up_N: Floats
    near_down_N: Floats
    near_rtt_N: Floats
    measured_keys: Indices
    """source * N + target of each measured direction, rising."""
    measured_bandwidths: Floats
    measured_rtts: Floats

    def bandwidths_bytes_per_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the bandwidth from each source to its target."""
        source, target = np.broadcast_arrays(np.asarray(sources), np.asarray(targets))
        far = np.minimum(self.up_N[source], self.down_N[target])
        near = np.minimum(self.near_up_N[source], self.near_down_N[target])
        found = np.where(self._same_site(source, target), near, far)
        return self._with_measured(found, source, target, self.measured_bandwidths)

    def rtts_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the round-trip times in seconds."""
        source, target = np.broadcast_arrays(np.asarray(sources), np.asarray(targets))
        near = (self.near_rtt_N[source] + self.near_rtt_N[target]) / 2
        found = np.where(self._same_site(source, target), near, self.coordinates.rtts_s(source, target))
        return self._with_measured(found, source, target, self.measured_rtts)

    def is_measured(self, sources: Indices, targets: Indices) -> np.ndarray:
        """Return where a probe tells, and not an estimate."""
        source, target = np.broadcast_arrays(np.asarray(sources), np.asarray(targets))
        return self._place(source, target)[1]

    def access(self, machine: int) -> AccessProfile:
        """Return what is estimated of one machine."""
        return AccessProfile(
            up_bytes_per_s=float(self.up_N[machine]),
            down_bytes_per_s=float(self.down_N[machine]),
            place_s=tuple(self.coordinates.points_ND[machine].tolist()),
            height_s=float(self.coordinates.heights_N[machine]),
            site=int(self.site_N[machine]),
            near_up_bytes_per_s=float(self.near_up_N[machine]),
            near_down_bytes_per_s=float(self.near_down_N[machine]),
            near_rtt_s=float(self.near_rtt_N[machine]),
        )

    def _same_site(self, source: Indices, target: Indices) -> np.ndarray:
        return np.asarray((self.site_N[source] == self.site_N[target]) & (self.site_N[source] >= 0))

    def _place(self, source: Indices, target: Indices) -> tuple[Indices, np.ndarray]:
        keys = source * len(self.up_N) + target
        place = np.minimum(np.searchsorted(self.measured_keys, keys), max(len(self.measured_keys) - 1, 0))
        if not len(self.measured_keys):
            return place, np.zeros(keys.shape, dtype=bool)
        return place, self.measured_keys[place] == keys

    def _with_measured(self, found: Floats, source: Indices, target: Indices, measured: Floats) -> Floats:
        place, known = self._place(source, target)
        return np.where(known, measured[place], found) if len(measured) else found


def estimate_links(probes: LinkProbes, count: int, *, anchor: int | None = None) -> EstimatedLinks:
    """Return links among machines 0 to `count` - 1.

    `anchor` is a machine whose own probes are trusted (the broker): two that claim to be near each other, but are not
    equally far from it, make no site. A machine without probes gets `UNMEASURED`'s bandwidth.
    """
    near = _near(probes, anchor)
    site_N = _sites(probes, near, count)
    # What two of a site exchange says nothing about their access lines, however slow that pair is.
    far = ~((site_N[probes.sources] == site_N[probes.targets]) & (site_N[probes.sources] >= 0))
    local = probes.chosen(~far)
    near_up_N, near_down_N = _largest(local, count)
    near_rtt_N = _medians(
        np.concatenate([local.sources, local.targets]), np.concatenate([local.rtts_s] * 2), np.zeros(count)
    )
    up_N, down_N = _access_rates(probes.chosen(far), count)
    default = UNMEASURED.bandwidth_bytes_per_s
    up_N = np.where(up_N > 0, up_N, np.where(near_up_N > 0, np.minimum(near_up_N, default), default))
    down_N = np.where(down_N > 0, down_N, np.where(near_down_N > 0, np.minimum(near_down_N, default), default))
    coordinates = _coordinates(probes.chosen(far), site_N)
    senders, receivers, bandwidths = probes.directed()
    keys = senders * count + receivers
    order = np.argsort(keys, kind="stable")
    return EstimatedLinks(
        coordinates=coordinates,
        up_N=up_N,
        down_N=down_N,
        site_N=site_N,
        near_up_N=near_up_N,
        near_down_N=near_down_N,
        near_rtt_N=near_rtt_N,
        measured_keys=keys[order],
        measured_bandwidths=bandwidths[order],
        measured_rtts=np.concatenate([probes.rtts_s] * 2)[order],
    )


def _near(probes: LinkProbes, anchor: int | None) -> np.ndarray:
    """Return which pairs are of one local network."""
    near = probes.rtts_s <= NEAR_RTT_S
    if anchor is None:
        return near
    count = int(max(probes.sources.max(initial=-1), probes.targets.max(initial=-1), anchor)) + 1
    away = np.full(count, np.nan)
    away[probes.targets[probes.sources == anchor]] = probes.rtts_s[probes.sources == anchor]
    away[probes.sources[probes.targets == anchor]] = probes.rtts_s[probes.targets == anchor]
    away[anchor] = 0.0
    one, other = away[probes.sources], away[probes.targets]
    apart = np.abs(one - other) > NEAR_RTT_S + _SAME_WAY * np.minimum(one, other)  # False where one is unknown
    return np.asarray(near & ~apart)


def _sites(probes: LinkProbes, near: np.ndarray, count: int) -> Indices:
    """Return each machine's site: those that near pairs connect, over others if need be."""
    site_N = np.full(count, -1, dtype=np.int64)
    graph = nx.Graph()
    graph.add_edges_from(zip(probes.sources[near].tolist(), probes.targets[near].tolist(), strict=True))
    for number, members in enumerate(sorted(nx.connected_components(graph), key=min)):
        site_N[list(members)] = number
    return site_N


def _coordinates(far: LinkProbes, site_N: Indices) -> Coordinates:
    """Return coordinates from probes between sites; the machines of a site are at one place, and share their probes."""
    alone = np.arange(len(site_N)) + len(site_N)
    _, place_N = np.unique(np.where(site_N >= 0, site_N, alone), return_inverse=True)
    found = fit_coordinates(place_N[far.sources], place_N[far.targets], far.rtts_s, int(place_N.max(initial=-1)) + 1)
    return Coordinates(found.points_ND[place_N], found.heights_N[place_N])


def _largest(probes: LinkProbes, count: int) -> tuple[Floats, Floats]:
    """Return the most that each machine was seen to send and to receive; 0 without a probe."""
    senders, receivers, bandwidths = probes.directed()
    up_N, down_N = np.zeros(count), np.zeros(count)
    np.maximum.at(up_N, senders, bandwidths)
    np.maximum.at(down_N, receivers, bandwidths)
    return up_N, down_N


def _access_rates(probes: LinkProbes, count: int) -> tuple[Floats, Floats]:
    """Fit bandwidth(i, j) = min(up i, down j); 0 for a machine without a probe.

    Where j takes clearly more than was seen from i, the measure is one of up i, and up i is the median of those. A
    machine whose partners were all slower than itself was only bounded from below: it is taken to send what the
    median machine does of those known to send at least that much.
    """
    senders, receivers, bandwidths = probes.directed()
    up_N, down_N = _largest(probes, count)
    seen_up_N, seen_down_N = up_N, down_N
    for _ in range(_ROUNDS):
        before = up_N, down_N
        up_N = _one_side(senders, bandwidths, before[1][receivers], seen_up_N)
        down_N = _one_side(receivers, bandwidths, before[0][senders], seen_down_N)
    return up_N, down_N


def _one_side(machines: Indices, bandwidths: Floats, other_side: Floats, seen_N: Floats) -> Floats:
    """Return one side's rates, the other's given by entry."""
    own = other_side > _NOISE * bandwidths
    rates_N = _medians(machines[own], bandwidths[own], np.full(len(seen_N), np.nan))
    known = np.sort(rates_N[np.isfinite(rates_N)])
    # Of the known ones from `seen` up, the one in the middle.
    first = np.searchsorted(known, seen_N)
    middle = (first + len(known)) // 2
    typical = np.where(first < len(known), known[np.minimum(middle, len(known) - 1)] if len(known) else 0.0, seen_N)
    return np.where(np.isfinite(rates_N), rates_N, np.where(seen_N > 0, np.maximum(seen_N, typical), 0.0))


def _medians(machines: Indices, values: Floats, default_N: Floats) -> Floats:
    """Return the lower median of each machine's values, or its default."""
    order = np.lexsort((values, machines))
    machines, values = machines[order], values[order]
    counts = np.bincount(machines, minlength=len(default_N))
    starts = np.cumsum(counts) - counts
    found = default_N.copy()
    some = counts > 0
    found[some] = values[(starts + (counts - 1) // 2)[some]]
    return found
