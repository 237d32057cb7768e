"""Chains of the search, given to the evaluator."""

from __future__ import annotations

from collections.abc import Sequence

from fusionai.scheduling.evaluation import Evaluated, evaluate
from fusionai.scheduling.search.chain import Chain
from fusionai.scheduling.search.segment_costs import SegmentCosts
from fusionai.scheduling.worked_pipeline import WorkedPipeline, worked_through


def worked_chain(costs: SegmentCosts, chain: Chain, microbatches: int) -> WorkedPipeline:
    """Return a chain's pipeline, worked through with so many of a step's microbatches."""
    return worked_through(
        costs.problem, costs.choice(chain.machines, chain.bounds, microbatches, chain.in_flight_limit)
    )


def evaluated_chains(costs: SegmentCosts, pipelines: Sequence[WorkedPipeline]) -> Evaluated:
    """Return what a step takes with pipelines that are cut at the segments' positions."""
    return evaluate(costs.problem, pipelines, costs.trained)
