"""Links between machines, asked for by arrays of indices: ten thousand machines have a hundred million pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fusionai.scheduling.profile import UNMEASURED, Pool

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]


class LinkModel(Protocol):
    """What a transfer gets between two machines, alone on the way.

    Machines are numbered: the members in their order, then the owner if there is one. Index arrays are broadcast
    against each other. What is said of a machine and itself has no meaning.
    """

    def bandwidths_bytes_per_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the bandwidth from each source to its target."""
        ...

    def rtts_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the round-trip times in seconds."""
        ...


class AssumedLinks:
    """Every link is as `profile.UNMEASURED` says: nothing is known yet."""

    def bandwidths_bytes_per_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the bandwidth that is assumed."""
        return np.full(np.broadcast(sources, targets).shape, UNMEASURED.bandwidth_bytes_per_s)

    def rtts_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the round-trip time that is assumed."""
        return np.full(np.broadcast(sources, targets).shape, UNMEASURED.rtt_s)


class PoolLinks:
    """The links of a `Pool`, as a `LinkModel`: two tables over all pairs of machines."""

    def __init__(self, pool: Pool, peers: Sequence[str]) -> None:
        """Number the machines as `peers` does: members, then the owner. Other pairs are as `Pool.link` says."""
        place = {peer: index for index, peer in enumerate(peers)}
        self._bandwidth_NN = np.full((len(peers), len(peers)), UNMEASURED.bandwidth_bytes_per_s)
        self._rtt_NN = np.full((len(peers), len(peers)), UNMEASURED.rtt_s)
        if pool.access:
            known = [peer for peer in peers if peer in pool.access]
            for source, target in permutations(known, 2):
                estimate = pool.access[source].link_to(pool.access[target])
                self._bandwidth_NN[place[source], place[target]] = estimate.bandwidth_bytes_per_s
                self._rtt_NN[place[source], place[target]] = estimate.rtt_s
        for pair, link in pool.links.items():
            source, _, target = pair.partition(">")
            if source in place and target in place:
                self._bandwidth_NN[place[source], place[target]] = link.bandwidth_bytes_per_s
                self._rtt_NN[place[source], place[target]] = link.rtt_s

    def bandwidths_bytes_per_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the bandwidth from each source to its target."""
        return self._bandwidth_NN[sources, targets]

    def rtts_s(self, sources: Indices, targets: Indices) -> Floats:
        """Return the round-trip times in seconds."""
        return self._rtt_NN[sources, targets]
