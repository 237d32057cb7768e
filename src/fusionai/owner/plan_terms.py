"""What an owner has asked for, and what therefore stays the same in every plan of its job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fusionai.execution.plane import ProgramOptions
from fusionai.graph.model import OpDag, Sizes


@dataclass(frozen=True, kw_only=True)
class PlanTerms:
    """What stays the same in every plan of a job. Plans are checked against it (`owner.plan_check`)."""

    graph: OpDag
    """As arranged for the job's privacy."""
    graph_hash: str
    front: int
    back: int
    """Nodes [0, front) and [back, N) stay on the owner's machine; (0, N) when nothing is pinned."""
    sizes: Sizes
    privacy: Literal["private", "open"]
    options: ProgramOptions
    """Of the owner's own stages."""
    compnodes: int
    """How many to use; 0: as many as serve best."""
    machines: tuple[str, ...] = ()
    """Names of the only ones to use; empty: any."""
    cuts: tuple[int, ...] | None = None
    """Cuts of the part for compnodes, chosen by the owner; None: the planner's."""
    steps: int
    microbatches: int
    allowed: bool
    """Whether the job may be planned anew at all."""
