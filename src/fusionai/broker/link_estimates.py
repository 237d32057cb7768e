"""Estimated links between pairs that nobody has probed, from the links that were measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from fusionai.broker.link_book import LinkBook
from fusionai.broker.link_estimation import LinkProbes, estimate_links
from fusionai.broker.records import LinkRecord
from fusionai.network.identity import PeerId
from fusionai.scheduling.profile import AccessProfile

_REST = 4.0
"""Least pause between two estimates that only `status` asks for, in multiples of the time that the last one took."""


class LinkEstimates:
    """Estimates of every member with a measured link, worked out anew when the book has changed."""

    def __init__(self, links: LinkBook, broker: PeerId) -> None:
        self._links = links
        self._broker = broker
        self._version = -1
        self._rest_until_s = 0.0
        self._working = asyncio.Lock()
        self.known: Mapping[PeerId, AccessProfile] = {}
        """The estimates of the last `refresh`."""

    async def refresh(self, *, now: bool) -> Mapping[PeerId, AccessProfile]:
        """Return estimates of all measures, or unless `now` is set, perhaps of those a moment ago.

        The work, seconds for ten thousand members, is done in a thread.
        """
        async with self._working:
            if self._version == self._links.version or (not now and time.monotonic() < self._rest_until_s):
                return self.known
            version, began_s = self._links.version, time.monotonic()
            records = self._links.records()
            self.known = await asyncio.to_thread(self._estimate, records)
            self._version = version
            ended_s = time.monotonic()
            self._rest_until_s = ended_s + _REST * (ended_s - began_s)
            return self.known

    def _estimate(self, records: list[LinkRecord]) -> dict[PeerId, AccessProfile]:
        place: dict[PeerId, int] = {self._broker: 0}
        pairs = []
        for record in records:
            if record.there is not None and record.back is not None:
                ends = [place.setdefault(peer, len(place)) for peer in (record.source, record.target)]
                pairs.append((ends[0], ends[1], record.there, record.back))
        if not pairs:
            return {}
        found = estimate_links(LinkProbes.of(pairs), len(place), anchor=0)
        return {peer: found.access(index) for peer, index in place.items()}
