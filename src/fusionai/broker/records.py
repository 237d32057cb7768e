"""What the broker remembers, as frozen data: it is kept in memory and, as JSON, in the store."""

from __future__ import annotations

from typing import Literal

import msgspec

from fusionai.broker.presence import Presence
from fusionai.network.identity import PeerId
from fusionai.pool.identifiers import FIRST_EPOCH, Epoch, JobId
from fusionai.pool.names import MemberRole
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import DeviceProfile, DiskProfile, LinkProfile

MemberState = Literal["idle", "working", "left", "lost", "unreachable"]
JobState = Literal["launching", "running", "finished", "failed", "cancelled"]

PRESENT: frozenset[str] = frozenset({"idle", "working"})
"""States of a member that has a link with the broker."""
OVER: frozenset[str] = frozenset({"finished", "failed", "cancelled"})
"""States of a job that is over."""


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A compnode or an owner."""

    peer: PeerId
    name: str
    """Unique in the pool."""
    role: MemberRole
    state: MemberState
    device: DeviceProfile | None
    addresses: tuple[str, ...]
    lab: bool
    seen_s: float
    """Unix time when the broker last heard from it."""
    disk: DiskProfile | None = None
    presence: Presence = Presence()


class Preparation(msgspec.Struct, frozen=True, kw_only=True):
    """A new plan for a running job whose machines hold their shares already, or are about to."""

    epoch: Epoch = FIRST_EPOCH
    """Epoch of the new plan. Records of versions without epochs lack it; a restart gives their preparations up."""
    plan: Plan
    compnodes: dict[PeerId, str]
    """Names by peer of the machines that it uses, the owner apart."""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A job, from its launch on."""

    job: JobId
    name: str
    owner: PeerId
    owner_name: str
    state: JobState
    reason: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float = 0.0
    compnodes: dict[PeerId, str] = {}
    """Names by peer, the owner apart."""
    config: str = ""
    plan: Plan | None = None
    submitted_s: float
    """Unix time."""
    epochs: tuple[Epoch, ...] = (FIRST_EPOCH,)
    """Those of which machines may hold shares: the running plan's and older ones first."""
    prepared: int = 0
    """New plans prepared so far, taken or not: the last epoch given out."""
    preparing: Preparation | None = None

    @property
    def epoch(self) -> Epoch:
        """Epoch of the running plan."""
        return self.epochs[-1 if self.preparing is None else -2]

    @property
    def leased(self) -> dict[PeerId, str]:
        """Names by peer of the machines that the broker gave to this job: for its plan, or one that is prepared."""
        return {**self.compnodes, **(self.preparing.compnodes if self.preparing is not None else {})}


class LinkRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe found of a pair; `there` is from `source` to `target`."""

    source: PeerId
    """The side that dialled."""
    target: PeerId
    there: LinkProfile | None
    """None: neither side can dial the other."""
    back: LinkProfile | None
    measured_s: float
    """Unix time."""
