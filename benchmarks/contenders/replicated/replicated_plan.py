"""Plans of replicated stages: each stage on one machine or several, and every microbatch routed stage by stage.

A `SwarmPlan` gives each machine a place in one pipeline. Here machines belong to a stage, and which of a stage's
holders takes a microbatch is decided when it gets there (`fusionai.scheduling.routing`). At the end of a step the
gradients of every weight are summed among its holders, so a step gives what a single pipeline would give. With one
holder for each stage, it is a `Plan`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fusionai.graph.model import Sizes
from fusionai.scheduling.plan import StagePrediction


class HolderPlan(msgspec.Struct, frozen=True):
    """One machine of a stage."""

    peer: str
    in_flight: int
    """Most microbatches held between forward and backward: what its memory allows."""
    share: float
    """Of the microbatches, what it is expected to take: its part of the stage's speed."""
    predicted: StagePrediction


class ReplicatedStage(msgspec.Struct, frozen=True):
    """Nodes [start, stop) of the OP-DAG, on every one of its holders."""

    stage: int
    start: int
    stop: int
    holders: tuple[HolderPlan, ...]


class ReplicatedPlan(msgspec.Struct, frozen=True):
    """A whole plan. Stages are in order and cover every node once; only the owner's machine may hold two."""

    graph_hash: str
    sizes: Sizes
    microbatches: int
    """Of a step."""
    privacy: Literal["private", "open"]
    owner: str
    """Peer of the owner's machine; "" in an open job that does not use it."""
    stages: tuple[ReplicatedStage, ...]
    sync_s: float
    """Seconds of summing gradients, reporting and updating, at the end of a step."""
    predicted_step_s: float
    bottleneck: str
    """What limits the speed, in words."""
    left_out: tuple[str, ...] = ()
    """Peers that would only slow the step down, or hold too little: the pool for those that die."""
    explanation: tuple[str, ...] = ()
    """Lines for people."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions at which the graph is cut, for `fusionai.graph.cuts.cut`."""
        return tuple(stage.start for stage in self.stages[1:])

    @property
    def peers(self) -> frozenset[str]:
        """Return every machine that takes part."""
        return frozenset(holder.peer for stage in self.stages for holder in stage.holders)
