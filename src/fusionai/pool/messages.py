"""What members (compnodes and owners) and the broker say to each other.

All are requests or notices with msgspec payloads; the kind on the wire is the tag: the class's name, as in
"broker.submit_job". The OP-DAG of a job and the sub-DAGs of an assignment may be large, so they travel as bulk
("broker.graph", "broker.assignment") ahead of the request that names them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fusionai.execution.plane import ProgramOptions
from fusionai.graph.model import Sizes
from fusionai.pool.identifiers import Epoch, JobId
from fusionai.scheduling.plan import Plan
from fusionai.scheduling.profile import AccessProfile, Availability, DeviceProfile, DiskProfile, LinkProfile

# --- members to broker ------------------------------------------------------------------------------------


class RegisterMember(msgspec.Struct, frozen=True, tag="broker.register_member"):
    """Request: be a member. Answer: `MemberRegistered`."""

    name: str
    role: Literal["compnode", "owner", "observer"]
    device: DeviceProfile | None
    """Measured profile; None for an observer."""
    addresses: tuple[str, ...]
    """Where others may dial this member; empty when it does not listen."""
    lab: bool = False
    """Whether this member emulates its speed or its links."""
    disk: DiskProfile | None = None
    """Disk of its state folder; None: not measured."""


class MemberRegistered(msgspec.Struct, frozen=True, tag="broker.member_registered"):
    """The broker's answer to `RegisterMember`."""

    name: str
    """The member's name, made unique by the broker."""
    heartbeat_s: float


class HeldShare(msgspec.Struct, frozen=True):
    """A share that a machine holds, made or about to be made."""

    job: JobId
    epoch: Epoch
    """Epoch of the plan that the share was made for."""
    line: str
    """For people, such as "stage 1: layers 0-5"."""


class Heartbeat(msgspec.Struct, frozen=True, tag="broker.heartbeat"):
    """Notice: a compnode lives, and what it does."""

    busy: float
    """Fraction of the time since the last heartbeat spent computing."""
    memory_bytes: int
    holds: tuple[HeldShare, ...]
    bytes_sent: dict[str, int]
    """Tensor bytes since joining, by receiving peer."""
    disk_free_bytes: int | None = None
    """Under its state folder now; None: not said."""


class LeavePool(msgspec.Struct, frozen=True, tag="broker.leave_pool"):
    """Request: go; the broker gives this member no further work."""

    reason: str


class WishToLeave(msgspec.Struct, frozen=True, tag="broker.wish_to_leave"):
    """Request by a compnode: go, once others hold what it holds. It gets no further work from then on.

    `ReleaseShare` tells it that its part is over, `NoReplacement` that nobody takes it.
    """

    reason: str


class SubmitJob(msgspec.Struct, frozen=True, tag="broker.submit_job"):
    """Request: plan and launch a job whose OP-DAG came as "broker.graph" bulk. Answer: `JobLaunched`.

    When it returns, every compnode of the plan has its assignment and waits for links and weights.
    """

    job_name: str
    config: str
    """The job as run, as TOML, for the record and `status`. Holds no data of the owner."""
    graph_hash: str
    """Content hash of the OP-DAG *as arranged for the privacy asked for*: the very graph that is cut."""
    front: int
    back: int
    """Nodes [0, front) and [back, N) stay with the owner; (0, N) when nothing is pinned."""
    sizes: Sizes
    microbatches: int
    privacy: Literal["private", "open"]
    options: ProgramOptions
    compnodes: int
    """How many compnodes to use; 0: as many as serve the job best."""
    cuts: tuple[int, ...] | None = None
    """Cut positions chosen by the owner instead of the planner."""
    machines: tuple[str, ...] = ()
    """Names of the only compnodes that may be used; with `cuts` in the order of the shares. Empty: any."""


class JobLaunched(msgspec.Struct, frozen=True, tag="broker.job_launched"):
    """The broker's answer to `SubmitJob`."""

    job: JobId
    plan: Plan
    names: dict[str, str]
    """Names of the plan's peers, for people."""
    lab: bool
    """Whether any machine of the plan emulates its speed or its links."""


class ReplanJob(msgspec.Struct, frozen=True, tag="broker.replan_job"):
    """Request by the owner: look for a better plan for a running job. Answer: `PlanPrepared`.

    The OP-DAG comes as "broker.graph" bulk ahead of it, as for `SubmitJob`: the broker keeps none. When it returns with
    a plan, every machine of that plan holds its new share beside the old one, without weights, and is linked to those
    with which it will exchange weights; the job goes on stepping meanwhile. The owner then answers with `SwitchPlan` or
    `ForgetPlan`.
    """

    job: JobId
    factors: dict[str, float]
    """How many times longer than its profile says a machine's passes take now, by peer; others are as measured."""
    steps_left: int
    front: int
    back: int
    options: ProgramOptions
    compnodes: int
    """How many compnodes to use; 0: as many as serve the job best."""
    machines: tuple[str, ...] = ()
    """Names of the only compnodes to be used; empty: any."""


class PlanPrepared(msgspec.Struct, frozen=True, tag="broker.plan_prepared"):
    """The broker's answer to `ReplanJob`."""

    reason: str
    """Why the plan is better, or why the running one is kept."""
    epoch: Epoch | None = None
    """Epoch of the new plan; None: keep the running one."""
    plan: Plan | None = None
    names: dict[str, str] = {}
    """Names of the plan's peers, for people."""
    lab: bool = False
    gain_s: float = 0.0
    """Predicted gain over the steps left, the move's own seconds taken off."""
    move_s: float = 0.0


class SwitchPlan(msgspec.Struct, frozen=True, tag="broker.switch_plan"):
    """Request by the owner: every machine of the new plan has its weights; the job goes on there."""

    job: JobId
    epoch: Epoch


class ForgetPlan(msgspec.Struct, frozen=True, tag="broker.forget_plan"):
    """Request by the owner: the new plan is not taken; the job goes on by the running one."""

    job: JobId
    epoch: Epoch
    reason: str


class DeclineReplan(msgspec.Struct, frozen=True, tag="broker.decline_replan"):
    """Notice by the owner: its job cannot do without the machines that asked to be relieved."""

    job: JobId
    reason: str


class JobProgress(msgspec.Struct, frozen=True, tag="broker.job_progress"):
    """Notice by the owner, at most one a second."""

    job: JobId
    step: int
    steps: int
    loss: float
    tokens_per_s: float


class JobEnded(msgspec.Struct, frozen=True, tag="broker.job_ended"):
    """Request by the owner: the job is over; the broker frees its compnodes."""

    job: JobId
    state: Literal["finished", "failed", "cancelled"]
    reason: str


class StatusQuery(msgspec.Struct, frozen=True, tag="broker.status_query"):
    """Request: answer with `Status`."""


class MeasureLinks(msgspec.Struct, frozen=True, tag="broker.measure_links"):
    """Request: measure all links between idle compnodes again, then answer with `Status`."""


class MemberStatus(msgspec.Struct, frozen=True):
    """One member, as `fusionai status` shows it."""

    peer: str
    name: str
    role: str
    state: Literal["idle", "working", "left", "lost", "unreachable"]
    device: DeviceProfile | None
    busy: float
    memory_bytes: int
    holds: tuple[HeldShare, ...]
    last_seen_s: float
    """Seconds since the broker heard from it."""
    lab: bool
    disk: DiskProfile | None = None
    """As measured when it joined, with the free bytes it told last."""
    availability: Availability | None = None
    access: AccessProfile | None = None
    """What it can send and receive, estimated from probes; None: nothing is known yet."""


class LinkStatus(msgspec.Struct, frozen=True):
    """One direction of a link: measured, or in small pools estimated where no probe has measured the pair."""

    source: str
    target: str
    profile: LinkProfile | None
    """None: neither side can dial the other. Its `estimated` says whether a probe measured it."""
    bytes_sent: int
    reachable: bool = True


class JobStatus(msgspec.Struct, frozen=True):
    """One job."""

    job: JobId
    name: str
    owner: str
    state: Literal["launching", "running", "finished", "failed", "cancelled"]
    reason: str
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float
    compnodes: tuple[str, ...]


class Status(msgspec.Struct, frozen=True, tag="broker.status"):
    """The pool as the broker knows it."""

    broker: str
    compnodes: tuple[MemberStatus, ...]
    links: tuple[LinkStatus, ...]
    jobs: tuple[JobStatus, ...]


# --- broker to members ------------------------------------------------------------------------------------


class AssignShare(msgspec.Struct, frozen=True, tag="broker.assign_share"):
    """Request to a compnode: hold a share of a job; its `Assignment` came as "broker.assignment" bulk.

    The answer comes when the program is made, without weights. The owner gets its own share the same way.
    """

    job: JobId
    epoch: Epoch
    kind: str = "training"
    """The kind of work, which says what the `Assignment` is and what the machines of the job say to each other."""


class ReleaseShare(msgspec.Struct, frozen=True, tag="broker.release_share"):
    """Notice to a compnode or owner: drop the share of this epoch; the job is over for you, or goes on by another
    plan."""

    job: JobId
    epoch: Epoch
    reason: str


class JobLost(msgspec.Struct, frozen=True, tag="broker.job_lost"):
    """Notice to the owner: the job cannot go on; `reason` names the compnode."""

    job: JobId
    reason: str


class PlanLost(msgspec.Struct, frozen=True, tag="broker.plan_lost"):
    """Notice to the owner: the plan prepared for its job cannot be taken; the job goes on by the running one."""

    job: JobId
    epoch: Epoch
    reason: str


class PoolChanged(msgspec.Struct, frozen=True, tag="broker.pool_changed"):
    """Notice to the owner: the pool is another one than the running plan was made for."""

    job: JobId
    names: tuple[str, ...]
    """Names of the machines that it is about, or of the first few of them."""
    leaving: bool
    """Whether these machines of the job wait to be relieved; if not, they are new and the plan might use them."""
    more: int = 0
    """How many machines came beside those named."""


class NoReplacement(msgspec.Struct, frozen=True, tag="broker.no_replacement"):
    """Notice to a compnode that asked to be relieved: nobody takes its part."""

    reason: str


class LinkNeighbours(msgspec.Struct, frozen=True, tag="broker.link_neighbours"):
    """Request to a member that holds an assignment: link to its neighbours. Answered when all links are up."""

    job: JobId
    epoch: Epoch


class ExpectProbe(msgspec.Struct, frozen=True, tag="broker.expect_probe"):
    """Request: admit a link from this peer for a while; it will probe."""

    peer: str


class ProbeLink(msgspec.Struct, frozen=True, tag="broker.probe_link"):
    """Request: dial a peer, measure the link, close it if it was not there before. Answer: `LinkProbed`."""

    peer: str
    addresses: tuple[str, ...]


class LinkProbed(msgspec.Struct, frozen=True, tag="broker.link_probed"):
    """The answer to `ProbeLink`: the link to the peer and back."""

    there: LinkProfile
    back: LinkProfile
