"""Plans of many pipelines: the whole model several times over, each pipeline on machines of its own.

A pipeline takes some of each step's microbatches through the whole model. Pipelines need not be alike: each has its own
cuts, machines and share of the microbatches. At the end of a step the gradients of every weight are summed over the
pipelines that hold it, so a step gives what a single pipeline would give. A `SwarmPlan` of one pipeline is a `Plan`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fusionai.graph.model import Sizes
from fusionai.scheduling.plan import StagePlan


class PipelinePlan(msgspec.Struct, frozen=True):
    """One pipeline: stages that cover every node of the graph once, in order."""

    stages: tuple[StagePlan, ...]
    microbatches: int
    """Of each step's, how many it takes."""
    predicted_s: float
    """Seconds from the first forward to the last backward of its microbatches."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions at which it cuts the graph."""
        return tuple(stage.start for stage in self.stages[1:])


class SwarmPlan(msgspec.Struct, frozen=True):
    """A whole plan. Every machine but the owner's is in at most one pipeline."""

    graph_hash: str
    sizes: Sizes
    microbatches: int
    """Of a step, over all pipelines."""
    privacy: Literal["private", "open"]
    owner: str
    """Peer of the owner's machine; "" in an open job that does not use it."""
    pipelines: tuple[PipelinePlan, ...]
    sync_s: float
    """Seconds of summing gradients over pipelines, reporting and updating, at the end of a step."""
    predicted_step_s: float
    bound_step_s: float
    """No plan on these machines is faster: computing divided without loss, the best link everywhere, and the sum of
    gradients that so many pipelines need (`bound.least_step_of_pipelines_s`)."""
    bottleneck: str
    """Stage or link that limits the speed, in words."""
    left_out: tuple[str, ...] = ()
    """Peers that would only slow the step down, or hold too little."""
    explanation: tuple[str, ...] = ()
    """Lines for people."""

    @property
    def peers(self) -> frozenset[str]:
        """Return every machine that takes part."""
        return frozenset(stage.peer for pipeline in self.pipelines for stage in pipeline.stages)
