"""What drivers and stages of one job say to each other, as typed messages.

Control messages are small and travel as notices or requests; tensors travel as bulk, with one of the bulk
headers below and the raw bytes as body. The kind on the wire is the tag: the class's name, as in "train.begin_round".

Every message names its job and the epoch that it belongs to: a new plan of a running job is a further epoch, whose
machines get its messages beside those of the running one.

A *round* is one pass over a fixed set of microbatches: a training step, or one evaluation. Rounds of a job
are numbered from 0 without gaps; a stage works on one round at a time and accepts early arrivals for
the next one only.
"""

from __future__ import annotations

from typing import get_args

import msgspec

from fusionai.graph.model import Sizes, ValueName, WeightKey
from fusionai.pool.identifiers import Epoch, JobId
from fusionai.pool.job_wire import MessageKinds
from fusionai.tensor import DType

# --- driver to stages -------------------------------------------------------------------------------------


class BeginRound(msgspec.Struct, frozen=True, tag="train.begin_round"):
    """Start a round."""

    job: JobId
    epoch: Epoch
    round: int
    step: int
    train: bool
    sizes: Sizes
    loss_weights: tuple[float, ...]
    """Weight of each microbatch in the round's loss; its length is the number of microbatches."""


class CommitRound(msgspec.Struct, frozen=True, tag="train.commit_round"):
    """End a training round: apply the update, or with `apply` false drop the gradients."""

    job: JobId
    epoch: Epoch
    round: int
    learning_rate: float
    gradient_scale: float
    apply: bool


class FinishLoading(msgspec.Struct, frozen=True, tag="train.finish_loading"):
    """Request: answer once every weight is loaded and every neighbour is linked."""

    job: JobId
    epoch: Epoch
    tensors: int
    """Tensors sent to load; bulk may arrive after this request."""
    optimizer_step: int
    """Updates that the loaded optimizer state has seen (0 when training starts)."""


class InheritWeights(msgspec.Struct, frozen=True, tag="train.inherit_weights"):
    """Request to a machine of a new plan: its weights come from machines of the running plan, not from the driver."""

    job: JobId
    epoch: Epoch
    sources: dict[WeightKey, str]
    """Every weight held here, with the one peer that may send it and its optimizer states."""


class HandOverWeights(msgspec.Struct, frozen=True, tag="train.hand_over_weights"):
    """Request to a machine of the running plan, between two steps: send weights and their optimizer states to machines
    of the new plan as `WeightTensor` bulk. Answered with `WeightsHandedOver` when all are sent; they stay here too."""

    job: JobId
    epoch: Epoch
    to: Epoch
    """Epoch of the new plan."""
    targets: dict[WeightKey, tuple[str, ...]]


class WeightsHandedOver(msgspec.Struct, frozen=True):
    """The answer to `HandOverWeights`."""

    bytes_sent: dict[str, int]
    """Tensor bytes by receiving peer; what stays on the machine does not count."""


class PullWeights(msgspec.Struct, frozen=True, tag="train.pull_weights"):
    """Request: send the named tensors to the driver as `PulledWeight` bulk, then answer."""

    job: JobId
    epoch: Epoch
    tensors: tuple[tuple[WeightKey, str | None], ...]
    """Weight key and optimizer-state name (None for the weight itself)."""


class EndShare(msgspec.Struct, frozen=True, tag="train.end_share"):
    """The share is not needed any more, since the job is over or goes on by another plan; free everything."""

    job: JobId
    epoch: Epoch
    reason: str = ""


# --- stages to driver -------------------------------------------------------------------------------------


class RoundReport(msgspec.Struct, frozen=True, tag="train.round_report"):
    """A machine has counted every microbatch of a round once, in each of its stages."""

    job: JobId
    epoch: Epoch
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


class ShareFailed(msgspec.Struct, frozen=True, tag="train.share_failed"):
    """A machine cannot go on with the job."""

    job: JobId
    epoch: Epoch
    error: str
    """Class name of the error."""
    text: str


# --- bulk headers -----------------------------------------------------------------------------------------


class Boundary(msgspec.Struct, frozen=True, tag="train.boundary"):
    """A boundary tensor (or with `gradient` its gradient), or a graph input fed by the driver."""

    job: JobId
    epoch: Epoch
    round: int
    index: int
    """Microbatch."""
    value: ValueName
    source: int
    """Stage it comes from; `roster.DRIVER` for the driver."""
    target: int
    gradient: bool
    dtype: DType
    shape: tuple[int, ...]


class TiedGradient(msgspec.Struct, frozen=True, tag="train.tied_gradient"):
    """One holder's gradient of a tied weight."""

    job: JobId
    epoch: Epoch
    round: int
    key: WeightKey
    dtype: DType
    shape: tuple[int, ...]


class WeightTensor(msgspec.Struct, frozen=True, tag="train.weight_tensor"):
    """A weight, or with `state` its optimizer state, to a stage that is to load it: from the driver, or by its order
    from the machine that holds it."""

    job: JobId
    epoch: Epoch
    key: WeightKey
    state: str | None
    dtype: DType
    shape: tuple[int, ...]


class PulledWeight(msgspec.Struct, frozen=True, tag="train.pulled_weight"):
    """A weight, or with `state` its optimizer state, from a stage to the driver that asked for it by `PullWeights`."""

    job: JobId
    epoch: Epoch
    key: WeightKey
    state: str | None
    dtype: DType
    shape: tuple[int, ...]


Control = (
    BeginRound
    | CommitRound
    | FinishLoading
    | InheritWeights
    | HandOverWeights
    | PullWeights
    | EndShare
    | RoundReport
    | ShareFailed
)
BulkHeader = Boundary | TiedGradient | WeightTensor | PulledWeight

TRAINING_MESSAGES = MessageKinds("train.", get_args(Control), get_args(BulkHeader))
