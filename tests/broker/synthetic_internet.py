"""A made-up internet: homes, local networks and data centres in cities, with a truth for every pair.

Round trips: the way between cities, each machine's access line, and a detour by pair. Bandwidths: the slower of the
sender's up and the receiver's down line, less on a congested path; within a site, its own network. Measures are the
truth with noise. Figures are invented, in the range of what providers sell and ping tables show.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fusionai.broker.link_estimation import LinkProbes

MEGABIT = 125_000.0

HOMES = ((20, 200), (10, 50), (40, 400), (500, 500), (50, 100), (1000, 1000))
"""Megabits per second, up and down."""


class Internet:
    """`count` machines; `broker`, if asked for, is one more at the end, in a data centre of its own."""

    def __init__(self, count: int, seed: int, *, noise: float = 0.1, detour: float = 0.15, broker: bool = True) -> None:
        draw = np.random.default_rng(seed)
        self.count = count + broker
        self._seed, self._noise, self._detour = seed, noise, detour
        cities = np.concatenate(
            [
                draw.normal(center, 6e-3, (6, 2))
                for center in ((0, 0), (75e-3, 10e-3), (150e-3, -20e-3), (190e-3, 60e-3))
            ]
        )
        site: list[int] = []
        kind: list[str] = []
        while len(site) < count:
            what = draw.choice(["home", "lan", "datacentre"], p=[0.75, 0.2, 0.05])
            size = {"home": 1, "lan": int(draw.integers(2, 7)), "datacentre": int(draw.integers(4, 17))}[what]
            site += [site[-1] + 1 if site else 0] * size
            kind += [what] * size
        site, kind = site[:count], kind[:count]
        if broker:
            site.append(site[-1] + 1)
            kind.append("datacentre")
        self.site = np.asarray(site)
        sites = int(self.site[-1]) + 1
        what = [kind[int(np.argmax(self.site == each))] for each in range(sites)]
        rates = np.asarray([HOMES[draw.integers(len(HOMES))] for _ in range(sites)], dtype=float) * MEGABIT
        line = draw.uniform(2e-3, 15e-3, sites)
        local = draw.choice([100.0, 1000.0, 2500.0], sites) * MEGABIT
        for each in range(sites):
            if what[each] == "datacentre":
                rates[each], line[each], local[each] = draw.choice([2000, 10_000]) * MEGABIT, 5e-4, 10_000 * MEGABIT
        # A city's point and a random offset: suburbs.
        place = cities[draw.integers(len(cities), size=sites)] + draw.normal(0, 1.5e-3, (sites, 2))
        self.place, self.line = place[self.site], line[self.site]
        self.up, self.down, self.local = rates[self.site, 0], rates[self.site, 1], local[self.site]

    def _by_pair(self, sources: NDArray[np.int64], targets: NDArray[np.int64], what: int) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each pair, the same both ways and at every call."""
        low, high = np.minimum(sources, targets).astype(np.uint64), np.maximum(sources, targets).astype(np.uint64)
        mixed = (low * np.uint64(self.count) + high) * np.uint64(4) + np.uint64(what)
        mixed = np.atleast_1d(mixed + np.uint64((self._seed + 1) * 0x9E3779B97F4A7C15 % 2**64))
        # Hashing wraps around on purpose.
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return ((mixed >> np.uint64(11)).astype(np.float64) / 2.0**53).reshape(np.shape(low))

    def rtts_s(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the true round trips: a `LinkModel`."""
        source, target = np.broadcast_arrays(sources, targets)
        way = np.sqrt(((self.place[source] - self.place[target]) ** 2).sum(-1))
        detour = 1 + 2 * self._detour * self._by_pair(source, target, 0)
        far = way * detour + self.line[source] + self.line[target]
        return np.where(self.site[source] == self.site[target], 3e-4 + 4e-4 * self._by_pair(source, target, 1), far)

    def bandwidths_bytes_per_s(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the true bandwidths: a `LinkModel`."""
        source, target = np.broadcast_arrays(sources, targets)
        # One path in ten is congested, down to a third.
        chance = self._by_pair(source, target, 2)
        path = np.where(chance < 0.1, 1 / 3 + 6.7 * chance, 1.0)
        far = np.minimum(self.up[source], self.down[target]) * path
        return np.where(self.site[source] == self.site[target], self.local[source], far)

    def probe(self, pairs: NDArray[np.int64], seed: int = 0) -> LinkProbes:
        """Measure pairs (K, 2) with noise, each once."""
        draw = np.random.default_rng((self._seed, seed))
        pairs = np.unique(np.sort(pairs, axis=1), axis=0)
        source, target = pairs[:, 0], pairs[:, 1]

        def noisy(truth: NDArray[np.float64]) -> NDArray[np.float64]:
            return truth * np.exp(draw.normal(0, self._noise, len(pairs)))

        return LinkProbes(
            source,
            target,
            noisy(self.rtts_s(source, target)),
            noisy(self.bandwidths_bytes_per_s(source, target)),
            noisy(self.bandwidths_bytes_per_s(target, source)),
        )
