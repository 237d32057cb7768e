"""Training problems of hand-made graphs, with what most tests leave as it is."""

from __future__ import annotations

from typing import Any

from decoder_graph import SIZES

from fusionai.graph.model import OpDag
from fusionai.graph.privacy import arrange_private
from fusionai.scheduling.problem import PlanLimits, TrainingProblem
from fusionai.scheduling.profile import Member, Pool


def problem_of(graph: OpDag, *, private: bool = False, **changes: Any) -> TrainingProblem:
    """Return a problem without machines, the graph arranged if it is `private`."""
    front, back = 0, len(graph.nodes)
    if private:
        graph, front, back = arrange_private(graph)
    fields: dict[str, Any] = {
        "graph_hash": "hash",
        "sizes": SIZES,
        "microbatches": 8,
        "optimizer_states": 2,
        "precision": "fp32",
        "privacy": "private" if private else "open",
        "front": front,
        "back": back,
    }
    return TrainingProblem(graph=graph, **(fields | changes))


def one_pipeline(
    graph: OpDag,
    pool: Pool,
    owner: Member,
    *,
    compnodes: int = 0,
    cuts: tuple[int, ...] | None = None,
    in_order: bool = False,
    leaving: frozenset[str] = frozenset(),
    **changes: Any,
) -> TrainingProblem:
    """Return a problem of one pipeline on a pool."""
    limits = PlanLimits(compnodes=compnodes, cuts=cuts, in_order=in_order, most_pipelines=1, leaving=leaving)
    return problem_of(graph, limits=limits, **changes).on_pool(pool, owner)
