"""Plans: which machine runs which part of an OP-DAG."""

from __future__ import annotations

from typing import Literal

import msgspec

from fusionai.graph.model import Sizes


class StagePrediction(msgspec.Struct, frozen=True):
    """What the estimator says of a stage: seconds per microbatch (the update: per step) and bytes."""

    forward_s: float
    backward_s: float
    update_s: float
    memory_bytes: int
    send_s: float
    """Seconds to send its outputs of one microbatch, forward and backward."""


class StagePlan(msgspec.Struct, frozen=True):
    """One stage: nodes [start, stop) of the OP-DAG, on one machine."""

    stage: int
    peer: str
    start: int
    stop: int
    in_flight: int
    """Most microbatches held between forward and backward."""
    predicted: StagePrediction


class Plan(msgspec.Struct, frozen=True):
    """A whole plan. Stages are in order and cover every node of the graph once."""

    graph_hash: str
    sizes: Sizes
    microbatches: int
    privacy: Literal["private", "open"]
    owner: str
    stages: tuple[StagePlan, ...]
    predicted_step_s: float
    bottleneck: str
    """Stage or link that limits the speed, in words."""
    explanation: tuple[str, ...] = ()
    """Lines for people."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions at which the graph is cut, for `fusionai.graph.cuts.cut`."""
        return tuple(stage.start for stage in self.stages[1:])

    def stages_of(self, peer: str) -> tuple[StagePlan, ...]:
        """Return the stages of one machine."""
        return tuple(stage for stage in self.stages if stage.peer == peer)
