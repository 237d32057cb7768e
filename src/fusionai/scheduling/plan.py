"""Plans: which machine runs which part of an OP-DAG.

A plan has one pipeline or several. A pipeline takes some of each step's microbatches through the whole model, over
machines of its own. Pipelines need not be alike: each has its own cuts and its own share of the microbatches. At the
end of a step the gradients of every weight are summed over the machines that hold it, so a step gives what one
pipeline would give.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fusionai.errors import PlacementError
from fusionai.graph.model import Sizes

PRIVATE_LINE = (
    "private: tokens and labels are not sent, but a compnode can reconstruct them; use machines that you trust, or "
    "data that may be read"
)
"""What is said wherever a plan of a private job is shown (docs/guarantees.md has the figures)."""


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


class PipelinePlan(msgspec.Struct, frozen=True):
    """One pipeline: stages that cover every node of the graph once, in order."""

    stages: tuple[StagePlan, ...]
    microbatches: int
    """How many of each step's microbatches it takes."""
    predicted_s: float
    """Seconds from the first forward to the last backward of its microbatches."""

    @property
    def cuts(self) -> tuple[int, ...]:
        """Return the node positions at which it cuts the graph, for `fusionai.graph.cuts.cut`."""
        return tuple(stage.start for stage in self.stages[1:])


class Plan(msgspec.Struct, frozen=True):
    """A whole plan. Every machine but the owner's is in at most one pipeline.

    The training runtime runs plans of one pipeline. `stages`, `cuts` and `stages_of` are for it: they are those of the
    only pipeline, and raise PlacementError for a plan of several.
    """

    graph_hash: str
    sizes: Sizes
    microbatches: int
    """Microbatches of one step, over all pipelines."""
    privacy: Literal["private", "open"]
    owner: str
    """Peer of the owner's machine; "" in an open job whose driver costs nothing."""
    pipelines: tuple[PipelinePlan, ...]
    end_of_step_s: float
    """Seconds between the last backward and the next step's first forward: gradients are summed, machines report to
    the driver, and weights are updated."""
    predicted_step_s: float
    bottleneck: str
    """The machine, link or phase that limits the speed, in words."""
    bound_step_s: float | None = None
    """No plan on these machines is faster (`bound`); None where it was not worked out."""
    left_out: tuple[str, ...] = ()
    """Peers that would only slow the step down, or hold too little."""
    explanation: tuple[str, ...] = ()
    """Lines for people."""

    def only_pipeline(self) -> PipelinePlan:
        """Return the one pipeline of the plan. Raises PlacementError if it has several."""
        if len(self.pipelines) != 1:
            raise PlacementError(
                f"the plan has {len(self.pipelines)} pipelines, and the training runtime runs one; plan the job with "
                "one pipeline (`limits.most_pipelines = 1`)"
            )
        return self.pipelines[0]

    @property
    def stages(self) -> tuple[StagePlan, ...]:
        """Return the stages of the only pipeline."""
        return self.only_pipeline().stages

    @property
    def cuts(self) -> tuple[int, ...]:
        """Return the node positions at which the only pipeline cuts the graph."""
        return self.only_pipeline().cuts

    def stages_of(self, peer: str) -> tuple[StagePlan, ...]:
        """Return the stages that one machine has in the only pipeline."""
        return tuple(stage for stage in self.stages if stage.peer == peer)

    @property
    def peers(self) -> frozenset[str]:
        """Return every machine that has a stage."""
        return frozenset(stage.peer for pipeline in self.pipelines for stage in pipeline.stages)
