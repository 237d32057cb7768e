"""Whom a newcomer to a large pool is probed with: a few near, a few far, and some that can take what it sends.

Pure. The first partners are chosen before anything is known of the newcomer, the others one by one from what the
probes so far found. What each kind is for: machines of the same network are found by the address from which the broker
sees them, or by walking from the nearest one found so far to its nearest (as Meridian does, Wong, Slivkins, Sirer,
SIGCOMM 2005); a wide partner shows the newcomer's own access line rather than the partner's; the others place it on the
map.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

FIRST = 7
"""Partners that are chosen in one go."""
AT_MOST = 8
"""Most partners of a newcomer, not counting the broker."""

_SAME_NETWORK = 2
_WIDE = 1
_WIDE_SHARE = 0.25
"""A partner with high bandwidth is drawn at random from this share of the best machines, so that no single machine is
probed by everybody."""

_Peer = TypeVar("_Peer", bound=str)


def network_of(host: str) -> str:
    """Return the network of an address, "" of none: the first 24 bits of IPv4, the first 56 of IPv6.

    It says where to look, never what is there: an internet provider's customers share one too.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return ""
    return str(ipaddress.ip_network((address, 24 if address.version == 4 else 56), strict=False))


def first_partners(
    network: str,
    candidates: Mapping[_Peer, str],
    widths: Mapping[_Peer, float],
    draw: random.Random,
    *,
    most: int = FIRST,
) -> list[_Peer]:
    """Return up to `most` partners for a newcomer.

    Args:
        network: the newcomer's (`network_of`).
        candidates: those there are, with their networks.
        widths: bytes per second that a candidate can surely receive and send, where known.
        draw: source of chance.
        most: how many to choose.
    """
    rest = list(candidates)
    draw.shuffle(rest)
    chosen = [peer for peer in rest if network and candidates[peer] == network][:_SAME_NETWORK]
    widest = sorted((peer for peer in rest if peer in widths), key=lambda peer: -widths[peer])
    widest = [peer for peer in widest[: max(1, int(len(widest) * _WIDE_SHARE))] if peer not in chosen]
    if widest:
        chosen += draw.sample(widest, min(_WIDE, len(widest)))
    chosen += [peer for peer in rest if peer not in chosen]
    return chosen[:most]


def next_partner(
    found_s: Mapping[_Peer, float],
    neighbours: Callable[[_Peer], Mapping[_Peer, float]],
    allowed: Collection[_Peer],
) -> _Peer | None:
    """Return whom to probe next to find somebody near: the nearest known neighbour of the nearest partner so far.

    Args:
        found_s: round trips of the newcomer to its partners so far.
        neighbours: round trips of a partner to those that it was probed with.
        allowed: whom the newcomer may be probed with and was not yet.
    """
    for partner in sorted(found_s, key=lambda peer: found_s[peer]):
        near = {peer: rtt_s for peer, rtt_s in neighbours(partner).items() if peer in allowed}
        if near:
            return min(near, key=lambda peer: near[peer])
    return None
