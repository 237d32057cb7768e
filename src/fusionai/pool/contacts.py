"""Other machines of a job, and links with them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from fusionai.errors import NetworkError
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import PeerId
from fusionai.pool.background_tasks import all_of

LINK_TIMEOUT_S = 30.0
"""How long a machine may take to be linked: dialling, and its own loading, on a busy machine."""


class Contact(msgspec.Struct, frozen=True):
    """Another machine of the job, and how to reach it."""

    peer: str
    name: str
    addresses: tuple[str, ...]
    dial: bool
    """True: this side dials; False: wait for the other side to dial."""


async def link_all(endpoint: Endpoint, contacts: Iterable[Contact], *, called: str = "") -> None:
    """Link to all contacts, side by side; where there is a link already, it does.

    Args:
        endpoint: this machine's.
        contacts: whom to link to.
        called: what stands before a contact's name in the text of an error, such as "compnode ".

    Raises:
        PeerTimeout, PeerLost, AuthenticationError: one cannot be linked to; the text names it.
    """
    await all_of(_link(endpoint, each, called) for each in contacts)


async def _link(endpoint: Endpoint, contact: Contact, called: str) -> None:
    peer = PeerId(contact.peer)
    try:
        if contact.dial and endpoint.link(peer) is None:
            await endpoint.connect(peer, contact.addresses, timeout_s=LINK_TIMEOUT_S)
        else:
            await endpoint.wait_for_link(peer, LINK_TIMEOUT_S)
    except NetworkError as error:
        raise type(error)(f"no link to {called}{contact.name}: {error}") from error
