"""Under which addresses others can reach what listens on this machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from fusionai.units.addresses import join_address, split_address

_WILDCARDS = ("0.0.0.0", "::", "")
_SOMEWHERE = "192.0.2.1:9"
"""An address of the range for documentation: nothing is sent to it."""


def advertised(listening: str, advertise: Sequence[str], *, towards: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the addresses to tell others of.

    Args:
        listening: "host:port" of the listening socket.
        advertise: what the user says; it is taken as it is.
        towards: addresses of somebody to be reached from here, which tell which of this machine's addresses matters
            where it listens on all.
    """
    for address in advertise:
        split_address(address)
    if advertise:
        return tuple(advertise)
    host, port = split_address(listening)
    if host not in _WILDCARDS:
        return (listening,)
    found = [_outward(target) for target in (*towards, _SOMEWHERE)]
    hosts = dict.fromkeys(each for each in found if each is not None)
    return tuple(join_address(each, port) for each in hosts) or (join_address("127.0.0.1", port),)


def _outward(target: str) -> str | None:
    """Return the local address from which packets to `target` would go; no packet is sent."""
    host, port = split_address(target)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except OSError:
        return None
