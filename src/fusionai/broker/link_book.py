"""The link matrix: what probes found between pairs of members."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from fusionai.broker.records import LinkRecord, MemberRecord
from fusionai.network.identity import PeerId
from fusionai.pool.messages import LinkStatus
from fusionai.scheduling.profile import AccessProfile, LinkProfile

Pair = tuple[PeerId, PeerId]

UNREACHABLE = LinkProfile(rtt_s=60.0, bandwidth_bytes_per_s=1.0)
"""The link that the planner assumes between two machines of which neither can dial the other. It is so slow that a plan
uses it only where there is no other choice."""


def pair(one: PeerId, other: PeerId) -> Pair:
    """Return two peers in the order in which their pair is stored."""
    return (one, other) if one < other else (other, one)


class LinkBook:
    """All measured pairs. Every new measurement is handed to `keep`, which stores it."""

    def __init__(self, keep: Callable[[LinkRecord], None]) -> None:
        self._keep = keep
        self._links: dict[Pair, LinkRecord] = {}
        self._of: dict[PeerId, set[Pair]] = {}
        self.version = 0
        """Counts the changes."""

    def restore(self, records: Iterable[LinkRecord], known: Container[PeerId]) -> None:
        """Take over the measurements from before a restart of the broker, as far as both ends are still known."""
        for record in sorted(records, key=lambda each: each.measured_s):
            if record.source in known and record.target in known:
                self._put(record)

    def measured(self, record: LinkRecord) -> None:
        """Note a measurement; it replaces the pair's earlier one."""
        self._put(record)
        self._keep(record)

    def forget(self, peer: PeerId) -> None:
        """Drop a member's links: it came back, perhaps from elsewhere, or is gone for good."""
        self.version += 1
        for key in self._of.pop(peer, set()):
            self._links.pop(key, None)
            other = key[0] if key[1] == peer else key[1]
            partners = self._of.get(other, set())
            partners.discard(key)
            if not partners:
                self._of.pop(other, None)

    def get(self, one: PeerId, other: PeerId) -> LinkRecord | None:
        """Return the measurement of a pair."""
        return self._links.get(pair(one, other))

    def records(self) -> list[LinkRecord]:
        """Return all measurements."""
        return list(self._links.values())

    def partners(self, peer: PeerId) -> dict[PeerId, LinkRecord]:
        """Return the measurements of one peer's links, by the other side."""
        keys = self._of.get(peer, set())
        return {key[0] if key[1] == peer else key[1]: self._links[key] for key in keys}

    def reachable(self, one: PeerId, other: PeerId) -> bool:
        """False when a probe found that neither side can dial the other."""
        record = self.get(one, other)
        return record is None or record.there is not None

    def matrix(self, peers: Iterable[PeerId]) -> dict[str, LinkProfile]:
        """Return the measured links among `peers` as `fusionai.scheduling.profile.Pool` wants them."""
        wanted = set(peers)
        found: dict[str, LinkProfile] = {}
        for peer in wanted:
            for key in self._of.get(peer, set()):
                record = self._links[key]
                if record.source in wanted and record.target in wanted:
                    found[f"{record.source}>{record.target}"] = record.there or UNREACHABLE
                    found[f"{record.target}>{record.source}"] = record.back or UNREACHABLE
        return found

    def dials(self, one: MemberRecord, other: MemberRecord) -> bool:
        """Return whether `one` is to dial `other`. With the two swapped, the answer is the opposite."""
        record = self.get(one.peer, other.peer)
        if record is not None and record.there is not None:
            return record.source == one.peer
        if bool(one.addresses) != bool(other.addresses):
            return bool(other.addresses)
        return one.peer < other.peer

    def status(
        self,
        present: Container[PeerId],
        name: Callable[[PeerId], str],
        bytes_sent: Callable[[PeerId, PeerId], int],
    ) -> tuple[LinkStatus, ...]:
        """Return both directions of every measured pair whose two sides are `present`, by names."""
        lines = []
        for record in self._links.values():
            if record.source not in present or record.target not in present:
                continue
            for source, target, profile in (
                (record.source, record.target, record.there),
                (record.target, record.source, record.back),
            ):
                lines.append(
                    LinkStatus(
                        source=name(source),
                        target=name(target),
                        profile=profile,
                        bytes_sent=bytes_sent(source, target),
                        reachable=profile is not None,
                    )
                )
        return tuple(sorted(lines, key=lambda each: (each.source, each.target)))

    def estimated_status(
        self,
        peers: Sequence[PeerId],
        access: Mapping[PeerId, AccessProfile],
        name: Callable[[PeerId], str],
        bytes_sent: Callable[[PeerId, PeerId], int],
    ) -> tuple[LinkStatus, ...]:
        """Return both directions of the pairs of `peers` that no probe has measured, as far as they are estimated."""
        known = [peer for peer in peers if peer in access]
        lines = [
            LinkStatus(name(source), name(target), access[source].link_to(access[target]), bytes_sent(source, target))
            for source in known
            for target in known
            if source != target and self.get(source, target) is None
        ]
        return tuple(sorted(lines, key=lambda each: (each.source, each.target)))

    def _put(self, record: LinkRecord) -> None:
        self.version += 1
        key = pair(record.source, record.target)
        self._links[key] = record
        for peer in key:
            self._of.setdefault(peer, set()).add(key)
