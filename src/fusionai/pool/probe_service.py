"""What a member does when the broker measures links: it admits a peer that will probe it, or probes a peer."""

from __future__ import annotations

import time
from collections.abc import Callable

from fusionai.errors import ProtocolError
from fusionai.network.endpoint import Endpoint, Link
from fusionai.network.identity import PeerId
from fusionai.network.probe import probe_link
from fusionai.pool.codec import decode, encode, kind_of
from fusionai.pool.member_part import MemberPart
from fusionai.pool.messages import ExpectProbe, LinkProbed, ProbeLink
from fusionai.scheduling.profile import LinkProfile

EXPECT_S = 60.0
"""How long a peer that will probe is admitted."""
PROBE_CONNECT_S = 8.0
PROBE_S = 0.4
_MOST_EXPECTED = 64


class ProbeService(MemberPart):
    """The part of a member that probes links, and lets itself be probed, as the broker says."""

    broker_kinds = frozenset({kind_of(ExpectProbe), kind_of(ProbeLink)})

    def __init__(self, endpoint: Endpoint, needed: Callable[[PeerId], bool]) -> None:
        """`needed` tells whether a job needs the link with a peer, which a probe then leaves open."""
        self._endpoint = endpoint
        self._needed = needed
        self._expected: dict[PeerId, float] = {}

    async def on_request(self, link: Link, kind: str, payload: bytes) -> bytes:
        """Admit a peer for a while, or probe one."""
        if kind == kind_of(ProbeLink):
            return encode(await self.probe(decode(ProbeLink, payload)))
        if kind != kind_of(ExpectProbe):
            raise ProtocolError(f"{kind!r} is no request")
        self.expect(decode(ExpectProbe, payload))
        return b""

    def admits(self, peer: PeerId) -> bool:
        """Return whether the broker has announced a probe by a peer."""
        return self._expected.get(peer, 0.0) > time.monotonic()

    def expect(self, message: ExpectProbe) -> None:
        """Admit a peer for a while. Raises ProtocolError when too many are announced."""
        now_s = time.monotonic()
        self._expected = {peer: until_s for peer, until_s in self._expected.items() if until_s > now_s}
        if len(self._expected) >= _MOST_EXPECTED:
            raise ProtocolError(f"more than {_MOST_EXPECTED} probes are announced to this member")
        self._expected[PeerId(message.peer)] = now_s + EXPECT_S

    async def probe(self, message: ProbeLink) -> LinkProbed:
        """Measure the link with a peer, both ways; raises NetworkError where there is none."""
        peer = PeerId(message.peer)
        before = self._endpoint.link(peer)
        link = before or await self._endpoint.connect(peer, message.addresses, timeout_s=PROBE_CONNECT_S)
        try:
            found = await probe_link(link, seconds=PROBE_S)
        finally:
            if before is None and not self._needed(peer):
                await link.close("the probe is over")
        return LinkProbed(
            there=LinkProfile(found.rtt_s, found.up_bytes_per_s),
            back=LinkProfile(found.rtt_s, found.down_bytes_per_s),
        )
