"""Who is in the pool: names, states, and which job has whom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from fusionai.broker.presence import Presence, arrived, availability, departed
from fusionai.broker.records import PRESENT, MemberRecord, MemberState
from fusionai.errors import AuthenticationError
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import JobId
from fusionai.pool.messages import Heartbeat, MemberStatus, RegisterMember
from fusionai.scheduling.profile import AccessProfile, DiskProfile

MOST_MEMBERS = 20_000
"""Most members that are remembered. New members replace those that have been gone for the longest time."""

_QUIET = Heartbeat(busy=0.0, memory_bytes=0, holds=(), bytes_sent={})


class Registry:
    """All members. Every change of a record is handed to `keep`, every deletion to `drop`.

    Observers are here while they look, but are not kept.
    """

    def __init__(
        self,
        keep: Callable[[MemberRecord], None],
        drop: Callable[[PeerId], None],
        *,
        most: int = MOST_MEMBERS,
    ) -> None:
        self._keep = keep
        self._drop = drop
        self._most = most
        self._members: dict[PeerId, MemberRecord] = {}
        self._names: dict[str, PeerId] = {}
        self._activity: dict[PeerId, Heartbeat] = {}
        self._leases: dict[PeerId, JobId] = {}
        self._leaving: set[PeerId] = set()

    def restore(self, records: Iterable[MemberRecord], alive_s: float = 0.0) -> None:
        """Take members from before a restart: whoever was there is unreachable until it registers again.

        `alive_s` is the Unix time at which the broker was last known to run: stays are counted up to it.
        """
        for record in records:
            if record.state in PRESENT:
                stayed = departed(record.presence, "unreachable", alive_s)
                record = replace(record, state="unreachable", presence=stayed)
            self._put(record)

    # --- joining and going ------------------------------------------------------------------------------------

    def register(self, peer: PeerId, message: RegisterMember, now_s: float) -> MemberRecord:
        """Enter a member, new or back again, and return its record.

        Raises:
            AuthenticationError: the pool is full of members that are present.
        """
        known = self._members.get(peer)
        if known is None:
            self._make_room()
        elif known.name != message.name:
            self._names.pop(known.name, None)
        name = message.name
        if known is not None and _stem(known.name, message.name):
            name = known.name
        record = MemberRecord(
            peer=peer,
            name=self._unique(name, peer),
            role=message.role,
            state="working" if peer in self._leases else "idle",
            device=message.device,
            addresses=message.addresses,
            lab=message.lab,
            seen_s=now_s,
            disk=message.disk,
            presence=arrived(Presence() if known is None else known.presence, now_s),
        )
        self._activity.pop(peer, None)
        self._leaving.discard(peer)
        self._put(record)
        if record.role != "observer":
            self._keep(record)
        return record

    def depart(self, peer: PeerId, state: MemberState, now_s: float) -> MemberRecord | None:
        """Note that a member is gone, and how; return its record. A departure by `left` stands."""
        record = self._members.get(peer)
        if record is None or record.state not in PRESENT:
            return record
        record = replace(record, state=state, seen_s=now_s, presence=departed(record.presence, state, now_s))
        self._leaving.discard(peer)
        if peer in self._activity:
            # What it held is still asked for; whom it sent how much is only shown of members that are here.
            self._activity[peer] = replace(self._activity[peer], bytes_sent={})
        self._put(record)
        self._keep(record)
        return record

    def forget(self, peer: PeerId) -> None:
        """Delete a member."""
        record = self._members.pop(peer, None)
        if record is not None:
            self._names.pop(record.name, None)
            if record.role != "observer":
                self._drop(peer)
        self._activity.pop(peer, None)
        self._leases.pop(peer, None)
        self._leaving.discard(peer)

    def heartbeat(self, peer: PeerId, message: Heartbeat, now_s: float) -> None:
        """Note what a member does. Not written to the store: it would be old when read."""
        record = self._members.get(peer)
        if record is not None:
            self._activity[peer] = message
            self._put(replace(record, seen_s=now_s))

    def wants_to_leave(self, peer: PeerId) -> None:
        """Note that a member waits to leave and gets no further work, until it registers anew or goes."""
        self._leaving.add(peer)

    def is_leaving(self, peer: PeerId) -> bool:
        """Return whether a member waits to leave."""
        return peer in self._leaving

    # --- leases ---------------------------------------------------------------------------------------------
    # One job for each compnode, although a compnode itself takes as many shares as its memory allows: a plan predicts
    # speeds as of a machine that works for nobody else.

    def lease(self, peer: PeerId, job: JobId) -> None:
        """Give a member to a job."""
        self._leases[peer] = job
        self._settle(peer)

    def release(self, peer: PeerId, job: JobId) -> bool:
        """Take a member back from a job; False when the job did not have it."""
        if self._leases.get(peer) != job:
            return False
        del self._leases[peer]
        self._settle(peer)
        return True

    def job_of(self, peer: PeerId) -> JobId | None:
        """Return the job that a member is leased to."""
        return self._leases.get(peer)

    def _settle(self, peer: PeerId) -> None:
        record = self._members.get(peer)
        if record is not None and record.state in PRESENT:
            self._put(replace(record, state="working" if peer in self._leases else "idle"))

    # --- asking ---------------------------------------------------------------------------------------------

    def get(self, peer: PeerId) -> MemberRecord | None:
        """Return a member's record."""
        return self._members.get(peer)

    def name(self, peer: PeerId) -> str:
        """Return a member's name, or the start of its key."""
        record = self._members.get(peer)
        return record.name if record is not None else peer[:12]

    def present(self, role: str) -> list[MemberRecord]:
        """Return the members of a role that have a link with the broker."""
        return [each for each in self._members.values() if each.role == role and each.state in PRESENT]

    def is_present(self, peer: PeerId) -> bool:
        """Whether a member has a link with the broker."""
        record = self._members.get(peer)
        return record is not None and record.state in PRESENT

    def idle(self) -> list[MemberRecord]:
        """Return the compnodes that are leased to no job and do not wait to leave."""
        taken = self._leases.keys() | self._leaving
        return [each for each in self.present("compnode") if each.peer not in taken]

    def activity(self, peer: PeerId) -> Heartbeat:
        """Return a member's last heartbeat."""
        return self._activity.get(peer, _QUIET)

    def bytes_sent(self, source: PeerId, target: PeerId) -> int:
        """Return the tensor bytes that one member has sent another since it joined."""
        return self.activity(source).bytes_sent.get(target, 0)

    def disk(self, peer: PeerId) -> DiskProfile | None:
        """Return a member's disk, with the free bytes that it told last."""
        record = self._members.get(peer)
        if record is None or record.disk is None:
            return None
        told = self.activity(peer).disk_free_bytes
        return record.disk if told is None else replace(record.disk, free_bytes=told)

    def status(self, now_s: float, access: Mapping[PeerId, AccessProfile] | None = None) -> tuple[MemberStatus, ...]:
        """Return every compnode as `fusionai status` shows it, those present first, then by name.

        `access` is what is estimated of their links.
        """
        found = sorted(
            (each for each in self._members.values() if each.role == "compnode"),
            key=lambda each: (each.state not in PRESENT, each.name),
        )
        return tuple(self._status(each, now_s, (access or {}).get(each.peer)) for each in found)

    def _status(self, record: MemberRecord, now_s: float, access: AccessProfile | None) -> MemberStatus:
        activity = self.activity(record.peer) if record.state in PRESENT else _QUIET
        return MemberStatus(
            peer=record.peer,
            name=record.name,
            role=record.role,
            state=record.state,
            # What a plane can run is for planning; it would be most of a status.
            device=None if record.device is None else replace(record.device, abilities=None),
            busy=activity.busy,
            memory_bytes=activity.memory_bytes,
            holds=activity.holds,
            last_seen_s=max(0.0, now_s - record.seen_s),
            lab=record.lab,
            disk=self.disk(record.peer),
            availability=availability(record.presence, now_s),
            access=access,
        )

    # --- inside ---------------------------------------------------------------------------------------------

    def _put(self, record: MemberRecord) -> None:
        self._members[record.peer] = record
        self._names[record.name] = record.peer

    def _unique(self, name: str, peer: PeerId) -> str:
        """Return `name`, or with the first number that makes it unique."""
        candidate, number = name, 1
        while self._names.get(candidate, peer) != peer:
            holder = self._members[self._names[candidate]]
            if holder.state == "left" and holder.peer not in self._leases:
                # A machine that was set up anew comes with a new key; the name is free for it.
                self.forget(holder.peer)
                continue
            number += 1
            candidate = f"{name}-{number}"
        return candidate

    def _make_room(self) -> None:
        if len(self._members) < self._most:
            return
        gone = [each for each in self._members.values() if each.state not in PRESENT and each.peer not in self._leases]
        if not gone:
            raise AuthenticationError(f"the pool is full: it has {self._most:,} members; try again later")
        self.forget(min(gone, key=lambda each: each.seen_s).peer)


def _stem(known: str, asked: str) -> bool:
    """Whether `known` is `asked` with the number that made it unique, so that a member that returns keeps it."""
    return known == asked or (known.startswith(f"{asked}-") and known.removeprefix(f"{asked}-").isdigit())
