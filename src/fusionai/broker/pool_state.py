"""What all parts of the broker share: its records, and how it sends messages to members."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TypeVar

import msgspec

from fusionai.broker.jobs import JobBook
from fusionai.broker.journal import Journal
from fusionai.broker.link_book import LinkBook
from fusionai.broker.link_estimates import LinkEstimates
from fusionai.broker.registry import Registry
from fusionai.errors import NetworkError, PeerLost
from fusionai.network.endpoint import Endpoint
from fusionai.network.identity import PeerId
from fusionai.network.link import Link
from fusionai.pool.background_tasks import BackgroundTasks
from fusionai.pool.codec import decode, encode, kind_of

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer", bound=msgspec.Struct)

_TELL_TIMEOUT_S = 10.0


class PoolState:
    """The broker's records, and its messages to members."""

    def __init__(self, endpoint: Endpoint, journal: Journal) -> None:
        self.endpoint = endpoint
        self.journal = journal
        self.registry = Registry(journal.keep, self._drop_member)
        self.jobs = JobBook(journal.keep)
        self.links = LinkBook(journal.keep)
        self.estimates = LinkEstimates(self.links, endpoint.peer_id)
        self.tasks = BackgroundTasks()

    def _drop_member(self, peer: PeerId) -> None:
        """A member is forgotten: so are its links, here and in the store."""
        self.links.forget(peer)
        self.journal.drop(peer)

    @staticmethod
    def now_s() -> float:
        """Return the Unix time."""
        return time.time()

    def name(self, peer: PeerId) -> str:
        """Return the name of a member, or of the broker itself."""
        return "broker" if peer == self.endpoint.peer_id else self.registry.name(peer)

    def link(self, peer: PeerId) -> Link:
        """Return the link to a member. Raises PeerLost when there is none."""
        link = self.endpoint.link(peer)
        if link is None:
            raise PeerLost(f"{self.registry.name(peer)} has no connection with the broker")
        return link

    async def ask(self, peer: PeerId, message: msgspec.Struct, answer: type[_Answer], *, timeout_s: float) -> _Answer:
        """Send a request to a member, and return its answer."""
        payload = await self.link(peer).request(kind_of(message), encode(message), timeout_s=timeout_s)
        return decode(answer, payload)

    async def order(self, peer: PeerId, message: msgspec.Struct, *, timeout_s: float) -> None:
        """Send a request to a member, and wait until it has obeyed."""
        await self.link(peer).request(kind_of(message), encode(message), timeout_s=timeout_s)

    def tell(self, peer: PeerId, *messages: msgspec.Struct) -> asyncio.Task[None] | None:
        """Send notices in the background; a member that is gone misses them."""
        return self.tasks.start(self._tell(peer, messages), f"tell {kind_of(messages[0])}")

    async def _tell(self, peer: PeerId, messages: tuple[msgspec.Struct, ...]) -> None:
        try:
            async with asyncio.timeout(_TELL_TIMEOUT_S):
                for message in messages:
                    await self.link(peer).notify(kind_of(message), encode(message))
        except (NetworkError, TimeoutError) as error:
            log.info("%s could not be told %s: %s", self.registry.name(peer), kind_of(messages[0]), error)
