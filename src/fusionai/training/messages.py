"""What drivers and stages of one job say to each other, as typed messages.

Control messages are small and travel as notices or requests; tensors travel as bulk, with one of the bulk
headers below and the raw bytes as body. The kind on the wire is the tag, such as "train.begin".

A *round* is one pass over a fixed set of microbatches: a training step, or one evaluation. Rounds of a job
are numbered from 0 without gaps; a stage works on one round at a time and accepts early arrivals for
the next one only.
"""

from __future__ import annotations

import msgspec

from fusionai.execution.plane import ProgramOptions
from fusionai.graph.model import Sizes, SubDag, ValueName, WeightKey
from fusionai.pool.identifiers import JobId
from fusionai.tensor import DType


class Neighbour(msgspec.Struct, frozen=True):
    """Another machine of the job, and how to reach it."""

    peer: str
    name: str
    addresses: tuple[str, ...]
    dial: bool
    """True: this side dials; False: wait for the other side to dial."""


class Assignment(msgspec.Struct, frozen=True):
    """Everything a machine needs to hold its share of a job, weights apart."""

    job: JobId
    owner: str
    """Peer that drives the job; only it may give commands."""
    subdags: tuple[SubDag, ...]
    in_flight: dict[int, int]
    """Stage to the most microbatches it may hold between forward and backward."""
    stage_peers: tuple[str, ...]
    """Peer of every stage of the job, by stage."""
    tied: dict[WeightKey, tuple[str, ...]]
    """Trainable weights of this machine that others hold too, with all holders' peers, lowest stage first."""
    options: ProgramOptions
    neighbours: tuple[Neighbour, ...]
    """Machines to hold links with: those that this one exchanges tensors with, and the owner."""
    memory_bytes: int
    """Memory that the plan reckons with on this machine."""
    handing: tuple[Neighbour, ...] = ()
    """Further machines to hold links with until weights are handed over (`HandOver`): by a new plan of a running job,
    those that the weights of this machine come from or go to."""


# --- driver to stages -------------------------------------------------------------------------------------


class Begin(msgspec.Struct, frozen=True, tag="train.begin"):
    """Start a round."""

    job: JobId
    round: int
    step: int
    train: bool
    sizes: Sizes
    loss_weights: tuple[float, ...]
    """Weight of each microbatch in the round's loss; its length is the number of microbatches."""


class Commit(msgspec.Struct, frozen=True, tag="train.commit"):
    """End a training round: apply the update, or with `apply` false drop the gradients."""

    job: JobId
    round: int
    learning_rate: float
    gradient_scale: float
    apply: bool


class Ready(msgspec.Struct, frozen=True, tag="train.ready"):
    """Request: answer once every weight is loaded and every neighbour is linked."""

    job: JobId
    tensors: int
    """Tensors sent to load; bulk may arrive after this request."""
    optimizer_step: int
    """Updates that the loaded optimizer state has seen (0 when training starts)."""


class Inherit(msgspec.Struct, frozen=True, tag="train.inherit"):
    """Request to the new generation of a job: its weights come from machines of the running one, not the driver."""

    job: JobId
    sources: dict[WeightKey, str]
    """Every weight held here, with the one peer that may send it and its optimizer states."""


class HandOver(msgspec.Struct, frozen=True, tag="train.hand_over"):
    """Request to the running generation, between two steps: send weights and their optimizer states to machines of
    the new one as `Tensor` bulk. Answered with `HandedOver` when all are sent; nothing changes here."""

    job: JobId
    to: JobId
    """The new generation."""
    targets: dict[WeightKey, tuple[str, ...]]


class HandedOver(msgspec.Struct, frozen=True):
    """The answer to `HandOver`."""

    bytes_sent: dict[str, int]
    """Tensor bytes by receiving peer; what stays on the machine does not count."""


class Pull(msgspec.Struct, frozen=True, tag="train.pull"):
    """Request: send the named tensors to the driver as `Pulled` bulk, then answer."""

    job: JobId
    tensors: tuple[tuple[WeightKey, str | None], ...]
    """Weight key and optimizer-state name (None for the weight itself)."""


class End(msgspec.Struct, frozen=True, tag="train.end"):
    """The job is over; free everything."""

    job: JobId
    reason: str = ""


# --- stages to driver -------------------------------------------------------------------------------------


class Report(msgspec.Struct, frozen=True, tag="train.report"):
    """A machine has counted every microbatch of a round once, in each of its stages."""

    job: JobId
    round: int
    losses: dict[int, float]
    """Loss by microbatch, from the machine that computes it; empty elsewhere."""
    norms: dict[WeightKey, float]
    """Norms of the gradients of the weights this machine answers for; empty in an evaluation."""
    busy_s: float
    wall_s: float
    """Seconds computing, and seconds from the round's begin to its last microbatch."""
    bytes_sent: dict[str, int]
    """Tensor bytes sent in this round, by receiving peer."""
    memory_bytes: int
    forward_s: dict[int, float]
    backward_s: dict[int, float]
    """Compute seconds by stage, summed over microbatches."""


class Failed(msgspec.Struct, frozen=True, tag="train.failed"):
    """A machine cannot go on with the job."""

    job: JobId
    error: str
    """Class name of the error."""
    text: str


# --- bulk headers -----------------------------------------------------------------------------------------


class Boundary(msgspec.Struct, frozen=True, tag="train.boundary"):
    """A boundary tensor (or with `gradient` its gradient), or a graph input fed by the driver."""

    job: JobId
    round: int
    index: int
    """Microbatch."""
    value: ValueName
    source: int
    """Stage it comes from; -1 for the driver."""
    target: int
    gradient: bool
    dtype: DType
    shape: tuple[int, ...]


class TiedGradient(msgspec.Struct, frozen=True, tag="train.tied"):
    """One holder's gradient of a tied weight."""

    job: JobId
    round: int
    key: WeightKey
    dtype: DType
    shape: tuple[int, ...]


class Tensor(msgspec.Struct, frozen=True, tag="train.tensor"):
    """A weight, or with `state` its optimizer state, to a stage that is to load it: from the driver, or by its order
    from the machine that holds it."""

    job: JobId
    key: WeightKey
    state: str | None
    dtype: DType
    shape: tuple[int, ...]


class Pulled(msgspec.Struct, frozen=True, tag="train.pulled"):
    """A weight, or with `state` its optimizer state, from a stage to the driver that asked for it by `Pull`."""

    job: JobId
    key: WeightKey
    state: str | None
    dtype: DType
    shape: tuple[int, ...]


Control = Begin | Commit | Ready | Inherit | HandOver | Pull | End | Report | Failed
Bulk = Boundary | TiedGradient | Tensor | Pulled
