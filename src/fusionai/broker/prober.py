"""Measures links: between the broker and members, and between pairs of members, in the background.

At most one probe at a time touches a member, so that probes do not slow each other, and none touches one that
works for a job. In a pool of up to `ALL_PAIRS` compnodes every pair is measured; in a larger one each newcomer is
measured with a few others (`probe_choice`), so that the probes of a joining member do not grow with the pool. The other
pairs are estimated, and measured when a plan is to use them (`planning`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from weakref import WeakValueDictionary

from msgspec.structs import replace

from fusionai.broker.link_book import Pair, pair
from fusionai.broker.pool_state import PoolState
from fusionai.broker.probe_choice import AT_MOST, FIRST, first_partners, network_of, next_partner
from fusionai.broker.records import PRESENT, LinkRecord, MemberRecord
from fusionai.broker.validation import check_link
from fusionai.errors import FusionError, NetworkError
from fusionai.network.identity import PeerId
from fusionai.network.probe import probe_link
from fusionai.pool.background_tasks import BackgroundTasks
from fusionai.pool.messages import ExpectProbe, LinkProbed, ProbeLink
from fusionai.scheduling.profile import LinkProfile

log = logging.getLogger(__name__)

ALL_PAIRS = 16
AGAIN = 4
"""Partners of each compnode in a larger pool when links are measured anew."""
MOST_AGAIN = 200
"""Pairs that are measured anew at once in a larger pool."""
CONCURRENT = 4
"""Most probes that run at the same time in the whole pool. A probe may fill the links of two homes for a second."""

_EXPECT_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 60.0
"""How long a probe may take. It dials, and sends 64 KiB each way, which takes long on a very slow link."""


class Prober:
    """Keeps the link book up to date."""

    def __init__(self, state: PoolState, *, seconds: float) -> None:
        self._state = state
        self._seconds = seconds
        self._tasks = BackgroundTasks()
        self._slots = asyncio.Semaphore(CONCURRENT)
        self._locks: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        """Each is here as long as somebody holds it or waits for it."""
        self._wanted: dict[Pair, asyncio.Event] = {}
        self._introducing: set[PeerId] = set()
        self._random = random.Random(0)

    def consider(self, peer: PeerId) -> None:
        """Measure the links of a member that has come, come back or become idle, where they are not measured yet."""
        record = self._state.registry.get(peer)
        if record is None or record.role == "observer" or record.state not in PRESENT:
            return
        self._want(pair(self._state.endpoint.peer_id, peer), again=False)
        others = [each for each in self._state.registry.idle() if each.peer != peer]
        if len(others) < ALL_PAIRS:
            for other in others:
                self._want(pair(peer, other.peer), again=False)
        elif peer not in self._introducing:
            self._introducing.add(peer)
            if self._tasks.start(self._introduce(record), "introduce") is None:
                self._introducing.discard(peer)

    def measure_again(self) -> None:
        """Measure the links of idle compnodes anew, even those known."""
        idle = [each.peer for each in self._state.registry.idle()]
        pairs = [pair(self._state.endpoint.peer_id, peer) for peer in idle]
        for index, peer in enumerate(idle):
            others = idle[index + 1 :]
            if len(idle) > ALL_PAIRS:
                others = self._random.sample(others, min(AGAIN, len(others)))
            pairs += [pair(peer, other) for other in others]
        if len(idle) > ALL_PAIRS:
            pairs = self._random.sample(pairs, min(MOST_AGAIN, len(pairs)))
        for each in pairs:
            self._want(each, again=True)

    async def measure(self, pairs: Sequence[Pair], *, timeout_s: float) -> None:
        """Measure pairs that are not measured yet, as far as that is possible within `timeout_s`."""
        for key in pairs:
            self._want(key, again=False)
        await self._wait([done for key in pairs if (done := self._wanted.get(key))], timeout_s)

    async def settle(self, peers: Iterable[PeerId], *, timeout_s: float) -> None:
        """Wait until the probes under way among `peers` are done, but no longer than `timeout_s`."""
        wanted = set(peers)
        await self._wait([done for key, done in self._wanted.items() if wanted.issuperset(key)], timeout_s)

    @asynccontextmanager
    async def undisturbed(self, peers: Iterable[PeerId]) -> AsyncIterator[None]:
        """Keep probes away from `peers`, after those under way have ended."""
        async with AsyncExitStack() as stack:
            for peer in sorted(set(peers)):
                await stack.enter_async_context(self._lock(peer))
            yield

    async def close(self) -> None:
        """Stop all probes."""
        await self._tasks.close()

    # --- inside ---------------------------------------------------------------------------------------------

    async def _wait(self, probes: Iterable[asyncio.Event], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(each.wait() for each in probes))
        except TimeoutError:
            log.info("planning before all links are measured")

    async def _introduce(self, record: MemberRecord) -> None:
        """Measure a newcomer to a large pool with a few others: at most `AT_MOST`, those known before included."""
        try:
            book, peer, me = self._state.links, record.peer, self._state.endpoint.peer_id
            left = AT_MOST - len(book.partners(peer).keys() - {me})
            others = {each.peer: self._network(each.peer) for each in self._state.registry.idle()}
            allowed = {
                other: network for other, network in others.items() if other != peer and not book.get(peer, other)
            }
            access = self._state.estimates.known
            widths = {
                other: min(access[other].up_bytes_per_s, access[other].down_bytes_per_s)
                for other in allowed
                if other in access
            }
            first = first_partners(self._network(peer), allowed, widths, self._random, most=max(0, min(FIRST, left)))
            await self._probe_with(peer, first)
            left -= len(first)
            for other in first:
                del allowed[other]
            while left > 0:
                near = next_partner(self._rtts_s(peer), self._rtts_s, allowed)
                if near is None:
                    near = next(iter(allowed), None)
                if near is None:
                    break
                await self._probe_with(peer, [near])
                del allowed[near]
                left -= 1
            await self._state.estimates.refresh(now=False)
        finally:
            self._introducing.discard(record.peer)

    def _network(self, peer: PeerId) -> str:
        link = self._state.endpoint.link(peer)
        return "" if link is None else network_of(link.remote_host)

    async def _probe_with(self, peer: PeerId, others: Iterable[PeerId]) -> None:
        keys = [pair(peer, other) for other in others]
        for key in keys:
            self._want(key, again=False)
        for key in keys:
            if (done := self._wanted.get(key)) is not None:
                await done.wait()

    def _rtts_s(self, peer: PeerId) -> dict[PeerId, float]:
        """Return a member's measured round trips to other members."""
        me = self._state.endpoint.peer_id
        records = self._state.links.partners(peer).items()
        return {other: record.there.rtt_s for other, record in records if record.there is not None and other != me}

    def _want(self, key: Pair, *, again: bool) -> None:
        if key in self._wanted or (not again and self._state.links.get(*key) is not None):
            return
        done = self._wanted[key] = asyncio.Event()
        if self._tasks.start(self._measure(key, done), "probe") is None:
            del self._wanted[key]
            done.set()

    def _lock(self, peer: PeerId) -> asyncio.Lock:
        return self._locks.setdefault(peer, asyncio.Lock())

    async def _measure(self, key: Pair, done: asyncio.Event) -> None:
        me = self._state.endpoint.peer_id
        try:
            async with AsyncExitStack() as stack:
                # Always in the order of ids, so two probes never wait for each other. The broker is in no one's way.
                for peer in key:
                    if peer != me:
                        await stack.enter_async_context(self._lock(peer))
                await stack.enter_async_context(self._slots)
                if me in key:
                    record = await self._measure_own(key[0] if key[1] == me else key[1])
                else:
                    record = await self._measure_pair(*key)
            if record is not None and all(peer == me or self._state.registry.get(peer) for peer in key):
                self._state.links.measured(record)
        except FusionError as error:
            log.info("measuring the link of %s failed: %s", " and ".join(map(self._state.name, key)), error)
        finally:
            del self._wanted[key]
            done.set()

    async def _measure_own(self, peer: PeerId) -> LinkRecord | None:
        if not self._free(peer):
            return None
        found = await probe_link(self._state.link(peer), seconds=self._seconds)
        there, back = LinkProfile(found.rtt_s, found.up_bytes_per_s), LinkProfile(found.rtt_s, found.down_bytes_per_s)
        check_link(there)  # half of it is what the member says
        check_link(back)
        return LinkRecord(
            source=self._state.endpoint.peer_id,
            target=peer,
            there=there,
            back=back,
            measured_s=self._state.now_s(),
        )

    async def _measure_pair(self, one: PeerId, other: PeerId) -> LinkRecord | None:
        members = [self._free(one), self._free(other)]
        errors = []
        for source, target in (members, members[::-1]):
            if source is None or target is None:
                return None
            if not target.addresses:
                errors.append(f"{target.name} does not listen")
                continue
            try:
                await self._state.order(target.peer, ExpectProbe(source.peer), timeout_s=_EXPECT_TIMEOUT_S)
                probe = ProbeLink(target.peer, target.addresses)
                found = await self._state.ask(source.peer, probe, LinkProbed, timeout_s=_PROBE_TIMEOUT_S)
                check_link(found.there)
                check_link(found.back)
                return LinkRecord(
                    source=source.peer,
                    target=target.peer,
                    there=replace(found.there, estimated=False),
                    back=replace(found.back, estimated=False),
                    measured_s=self._state.now_s(),
                )
            except NetworkError as error:
                errors.append(str(error))
        if not (self._free(one) and self._free(other)):
            return None
        log.warning(
            "%s and %s cannot reach each other: %s", self._state.name(one), self._state.name(other), "; ".join(errors)
        )
        return LinkRecord(source=one, target=other, there=None, back=None, measured_s=self._state.now_s())

    def _free(self, peer: PeerId) -> MemberRecord | None:
        """Return a member's record if it is there and no job has it."""
        record = self._state.registry.get(peer)
        if record is None or record.state != "idle" or self._state.endpoint.link(peer) is None:
            return None
        return record
