"""Lab mode: links with a chosen rate, delay, jitter and loss, for tests, benchmarks and what-if runs.

It is off unless an endpoint is given a `LabConfig`. Pairs are named by the names that nodes exchange when they connect.
Each side delays what it sends. The module `shaping` describes exactly what is emulated.
"""

from __future__ import annotations

import math

import msgspec

from fusionai.errors import ConfigError

_SEGMENT_BYTES = 1448
"""Payload of a TCP segment on Ethernet."""


class EmulatedLink(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One direction of a link."""

    rate_mbit: float | None = None
    """Megabits (10^6 bits) per second; None: no limit."""
    one_way_ms: float = 0.0
    jitter_ms: float = 0.0
    """Most additional delay of a piece, drawn uniformly from 0 to this value. Pieces keep their order, as in TCP."""
    loss_pct: float = 0.0
    """Packets lost, in percent."""

    def __post_init__(self) -> None:
        if self.rate_mbit is not None and not 0 < self.rate_mbit < math.inf:
            raise ConfigError(f"rate_mbit must be above 0, or absent for no limit; got {self.rate_mbit}")
        for field in ("one_way_ms", "jitter_ms"):
            if not 0 <= getattr(self, field) <= 60_000:
                raise ConfigError(f"{field} must be between 0 and 60000, got {getattr(self, field)}")
        if not 0 <= self.loss_pct < 100:
            raise ConfigError(f"loss_pct must be at least 0 and below 100, got {self.loss_pct}")

    @property
    def rtt_s(self) -> float:
        """Round trip in seconds without jitter, if the other direction is alike."""
        return 2 * self.one_way_ms / 1e3

    @property
    def rate_bytes_per_s(self) -> float:
        """The rate that TCP reaches on this link: the link's rate, or less because of loss.

        A loss halves a TCP sender's window, which on average limits it to about 1.22 segments per round trip, divided
        by the square root of the loss (Mathis et al., 1997). A round trip is taken to be at least 1 ms.
        """
        rate = math.inf if self.rate_mbit is None else self.rate_mbit * 1e6 / 8
        if self.loss_pct == 0:
            return rate
        return min(rate, 1.22 * _SEGMENT_BYTES / (max(self.rtt_s, 1e-3) * math.sqrt(self.loss_pct / 100)))

    def loss_of(self, count_bytes: int) -> float:
        """Return the probability that at least one packet of `count_bytes` is lost."""
        return 1 - (1 - self.loss_pct / 100) ** math.ceil(count_bytes / _SEGMENT_BYTES)


class LabConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The emulated links of a lab."""

    links: dict[str, EmulatedLink] = {}
    """Emulated links by pair of names: "a->b" for one direction, "a<->b" for both."""
    default: EmulatedLink | None = None
    """The link of all pairs that are not in `links`; None: they are not emulated."""
    seed: int = 0
    """Seed of the jitter and the losses."""

    def __post_init__(self) -> None:
        for key in self.links:
            names = key.split("<->") if "<->" in key else key.split("->")
            if len(names) != 2 or not all(name.strip() == name != "" for name in names):
                raise ConfigError(f'lab link {key!r} is not of the form "a->b" or "a<->b"')

    def link(self, sender: str, receiver: str) -> EmulatedLink | None:
        """Return what `sender` must emulate towards `receiver`: the most specific entry, or None."""
        for key in (f"{sender}->{receiver}", f"{sender}<->{receiver}", f"{receiver}<->{sender}"):
            if key in self.links:
                return self.links[key]
        return self.default


PROFILES: dict[str, EmulatedLink] = {
    "lan": EmulatedLink(rate_mbit=1000, one_way_ms=0.2),
    "good-wifi": EmulatedLink(rate_mbit=100, one_way_ms=8, jitter_ms=2),
    "fibre": EmulatedLink(rate_mbit=200, one_way_ms=10, jitter_ms=1),
    "cable-upload": EmulatedLink(rate_mbit=20, one_way_ms=15, jitter_ms=3),
    "weak-4g": EmulatedLink(rate_mbit=8, one_way_ms=45, jitter_ms=15, loss_pct=2),
    "other-continent": EmulatedLink(rate_mbit=100, one_way_ms=75, jitter_ms=2),
}
"""Named links that tests, benchmarks and documents share."""
