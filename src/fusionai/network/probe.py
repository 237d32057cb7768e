"""Measures a link: round-trip time, and bandwidth each way.

Bandwidth is measured by bursts. Each burst is four times as large as the one before, until a larger one would take too
long. The receiver times a burst from the first message to the last, so neither the round trip nor the sender's system
buffers distort the result. A slow link is not flooded: it takes long for small bursts, so it never gets large ones.
"""

from __future__ import annotations

import statistics
from typing import Protocol

import msgspec

from fusionai.errors import ConfigError, ProtocolError
from fusionai.network.clock import now_s
from fusionai.network.link import Link
from fusionai.network.probing import EXPECT, MEASURED, SEND, BurstMeasure, BurstSize

_FIRST_BURST_BYTES = 64 << 10
_GROWTH = 4
_PINGS = 5
_MOST_REPEATS = 5
_PATIENCE_S = 20.0
_measure = msgspec.msgpack.Decoder(BurstMeasure)


class LinkProbe(msgspec.Struct, frozen=True):
    """The measured round trip and bandwidths of a link."""

    rtt_s: float
    """Median round-trip time of small control messages."""
    up_bytes_per_s: float
    """Payload from this side to the peer."""
    down_bytes_per_s: float
    """Payload from the peer to this side."""

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """The slower direction."""
        return min(self.up_bytes_per_s, self.down_bytes_per_s)


async def probe_link(link: Link, *, seconds: float = 1.0, max_bytes: int = 32 << 20) -> LinkProbe:
    """Measure a link, which may be in use. Other traffic on it lowers the result.

    Args:
        link: the link to measure.
        seconds: about how long the probe may take, at most 10. A very slow link takes up to twice as long.
        max_bytes: most bytes to send in one burst, each way.

    Raises:
        ConfigError: an argument is out of range.
        PeerTimeout, PeerLost: the peer did not take part to the end.
    """
    if not 0 < seconds <= 10:
        raise ConfigError(f"seconds must be above 0 and at most 10, got {seconds}")
    if max_bytes < _FIRST_BURST_BYTES:
        raise ConfigError(f"max_bytes must be at least {_FIRST_BURST_BYTES}, got {max_bytes}")
    rtts_s: list[float] = []
    until_s = now_s() + seconds / 5
    while len(rtts_s) < _PINGS and (not rtts_s or now_s() < until_s):
        rtts_s.append(await link.ping(timeout_s=_PATIENCE_S))
    rtt_s = statistics.median(rtts_s)
    up = await _rate(link, seconds * 0.4, rtt_s, max_bytes, _burst_up)
    down = await _rate(link, seconds * 0.4, rtt_s, max_bytes, _burst_down)
    return LinkProbe(rtt_s=rtt_s, up_bytes_per_s=up, down_bytes_per_s=down)


async def _rate(link: Link, seconds: float, rtt_s: float, max_bytes: int, burst: _Burst) -> float:
    """Return bytes per second: the median of a few bursts of the largest size that fits the time.

    A size counts as too large only after two slow bursts of it: during a single one, one of the processes may not have
    run for a moment.
    """
    began_s = now_s()
    size = _FIRST_BURST_BYTES
    measures: list[BurstMeasure] = []
    while True:
        measures.append(await burst(link, size))
        shortest_s = min(measure.seconds for measure in measures)
        left_s = seconds - (now_s() - began_s)
        # Three round trips: for the request, for the burst, and for TCP while it opens its window.
        if _GROWTH * shortest_s + 3 * rtt_s <= left_s and size * _GROWTH <= max_bytes:
            size *= _GROWTH
            measures.clear()
        elif len(measures) == _MOST_REPEATS or shortest_s + 3 * rtt_s > left_s:
            return statistics.median(measure.bytes / max(measure.seconds, 1e-6) for measure in measures)


class _Burst(Protocol):
    """Type of the two functions below."""

    async def __call__(self, link: Link, size: int) -> BurstMeasure: ...


async def _burst_up(link: Link, size: int) -> BurstMeasure:
    await link.request(EXPECT, _size(size), timeout_s=_PATIENCE_S)
    await link.prober.send(size)
    answer = await link.request(MEASURED, b"", timeout_s=_PATIENCE_S)
    try:
        return _measure.decode(answer)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"malformed answer to a probe: {error}") from error


async def _burst_down(link: Link, size: int) -> BurstMeasure:
    link.prober.expect(size)
    await link.request(SEND, _size(size), timeout_s=_PATIENCE_S)
    return await link.prober.measured()


def _size(size: int) -> bytes:
    return msgspec.msgpack.encode(BurstSize(size))
